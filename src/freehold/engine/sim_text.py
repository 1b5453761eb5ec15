"""What the simulated engine says: it reads a prompt in GLM's grammar and writes a fitting answer. Torch-free.

    prompt ends in        the answer
    <think>               reasoning (its length follows the effort header), </think>, then as below
    <think></think>       as below

    last message          tools declared?               then
    user                  and the message asks for one  <tool_call>…</tool_call> (one or more), <|observation|>
    user                  otherwise                     an echo of the message, <|user|>
    tool results                                        a sentence with the results, <|user|>
    (no roles at all)                                   some prose, <|endoftext|>

A message asks for a tool if it has the tool's name in it, or a word of four letters or more of that name
(`get_weather`: "weather"), or the word "tool" (the first tool is meant). With "both" or "parallel" in the message there
are several calls: of all tools it names, or two of the only one. Arguments are made from the schema (`sim_values`).

A guide is honoured: JSON by its schema, or calls of its tools. `[[sim …]]` in the last user message asks for special
behaviour, see `sim`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from itertools import chain, cycle, islice, pairwise
from typing import Any

from freehold.engine.sim_values import ValueMaker
from freehold.model.tokenizer import Tokenizer
from freehold.types import SamplingParams, ToolSpec

_ROLES = {"<|system|>": "system", "<|user|>": "user", "<|assistant|>": "assistant", "<|observation|>": "observation"}
_OPENERS = ("You said:", "I read:", "Let me repeat:", "In your words:")
_PROSE = "and so it goes on from word to word and from line to line until the page is full".split()
_DIRECTIVE = re.compile(r"\s*\[\[sim\b([^\]]*)\]\]\s*")
_THOUGHTS = (
    "The user wrote “{gist}”.",
    "Effort is {effort}, so I look at it from every side.",
    "First I find out what is asked.",
    "Then I check what I know about it.",
    "Then I check whether a tool would help.",
    "Now I weigh the options against each other.",
    "The simplest answer that is right is the best one.",
)


@dataclass(frozen=True)
class Prompt:
    """A prompt, read back from its tokens. last_role is "" for plain text without any role."""

    last_role: str
    thinking: bool
    effort: str  # as in the header; "" without one
    tools: tuple[ToolSpec, ...]
    user_text: str  # of the last user message, directives included
    results: tuple[str, ...]  # of the tools, if those came last

    @property
    def message(self) -> str:
        return _DIRECTIVE.sub(" ", self.user_text).strip()

    @property
    def directives(self) -> tuple[str, ...]:
        """The insides of `[[sim …]]` in the last user message."""
        return tuple(_DIRECTIVE.findall(self.user_text))


def read_prompt(token_ids: Sequence[int], tokenizer: Tokenizer) -> Prompt:
    """Read a rendered conversation. Roles are told by token, so that user text cannot forge them."""
    roles = {tokenizer.special_id(text): role for text, role in _ROLES.items()}
    starts = [at for at, token_id in enumerate(token_ids) if token_id in roles]
    turns = [
        (roles[token_ids[start]], token_ids[start + 1 : end]) for start, end in pairwise([*starts, len(token_ids)])
    ]
    thinking = bool(token_ids) and token_ids[-1] == tokenizer.special_id("<think>")
    asked = turns[:-1] if turns and turns[-1][0] == "assistant" else turns  # the last one is ours to write
    user = next((ids for role, ids in reversed(asked) if role == "user"), ())
    results = asked[-1][1] if asked and asked[-1][0] == "observation" else ()
    system = [tokenizer.decode(ids) for role, ids in asked if role == "system"]
    header = next((text for text in system if text.startswith("Reasoning Effort: ")), "")
    return Prompt(
        last_role=asked[-1][0] if asked else "",
        thinking=thinking,
        effort=header.removeprefix("Reasoning Effort: ").strip(),
        tools=tuple(chain.from_iterable(map(_declared_tools, system))),
        user_text=tokenizer.decode(user),
        results=tuple(_between(results, "<tool_response>", "</tool_response>", tokenizer)),
    )


def _declared_tools(system: str) -> Iterator[ToolSpec]:
    block = re.search(r"<tools>\n(.*?)\n?</tools>", system, re.DOTALL)
    for line in block[1].splitlines() if block else ():
        try:
            tool = json.loads(line)
            yield ToolSpec(tool["name"], tool.get("parameters") or {"type": "object", "properties": {}})
        except (ValueError, KeyError, TypeError, AttributeError):
            continue


def _between(token_ids: Sequence[int], opening: str, closing: str, tokenizer: Tokenizer) -> Iterator[str]:
    first, last = tokenizer.special_id(opening), tokenizer.special_id(closing)
    start = 0
    for at, token_id in enumerate(token_ids):
        if token_id == first:
            start = at + 1
        elif token_id == last:
            yield tokenizer.decode(token_ids[start:at])


@dataclass(frozen=True)
class Style:
    """reasoning_words by effort header; other headers, and none, think as long as the longest.

    answer_words, thought_words: exact lengths, where asked for. unclosed: a tool call follows the reasoning without
    `</think>`, as the model sometimes does.
    """

    reasoning_words: Mapping[str, int]
    answer_words: int | None = None
    thought_words: int | None = None
    unclosed: bool = False


class Script:
    """Every token that one request will generate, by index, as long as anyone asks."""

    def __init__(self, prompt: Prompt, params: SamplingParams, style: Style, tokenizer: Tokenizer) -> None:
        self.prompt = prompt
        self.params = params
        self.style = style
        self._tokenizer = tokenizer
        self._thinking = params.guide.thinking if params.guide is not None else prompt.thinking
        self._end = "<|user|>"
        self.token_ids = tuple(chain.from_iterable(self._pieces()))
        self.end_id = self._special(self._end)[0]
        self.key = blake2b(repr(self.token_ids).encode(), digest_size=8).digest()  # of all pseudo-random choices

    def token(self, index: int) -> int:
        """Token `index` of the output: the text, then padding up to min_tokens, then the end (or no end at all)."""
        params = self.params
        if index < len(self.token_ids):
            token_id = self.token_ids[index]
        elif params.ignore_eos or index < params.min_tokens:
            token_id = self._padding[(index - len(self.token_ids)) % len(self._padding)]
        else:
            return self.end_id
        masked = index < params.min_tokens and token_id in params.stop_token_ids
        return next(iter(set(self._padding) - set(params.stop_token_ids)), token_id) if masked else token_id

    @cached_property
    def _padding(self) -> tuple[int, ...]:
        # White space after a JSON value or a call is harmless; text after a sentence is more to look at.
        return tuple(self._text("\n" if self.params.guide is not None else " " + " ".join(_PROSE) + "."))

    # ── writing ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _text(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, special=False)

    def _special(self, text: str) -> list[int]:
        token_id = self._tokenizer.special_id(text)
        return self._text(text) if token_id is None else [token_id]

    def _pieces(self) -> Iterator[list[int]]:
        calls = self._calls()
        if self._thinking:
            yield self._text(self._reasoning())
            if not (calls and self.style.unclosed):
                yield self._special("</think>")
        guide = self.params.guide
        if calls:
            self._end = "<|observation|>"
            yield from chain.from_iterable(map(self._call, calls))
        elif guide is not None and guide.kind == "json_schema":
            yield self._text(_dump(ValueMaker(guide.schema or {}, self.prompt.message).make()))
        elif guide is not None and guide.kind == "json_object":
            yield self._text(_dump({"answer": self._gist(16)}))
        else:
            if not self.prompt.last_role:
                self._end = "<|endoftext|>"
            yield self._text(self._answer())

    def _reasoning(self) -> str:
        lengths = self.style.reasoning_words
        count = lengths.get(self.prompt.effort, max(lengths.values(), default=0))
        effort = self.prompt.effort or "not given"
        gist = self._gist(8)
        words = chain.from_iterable(cycle([thought.format(gist=gist, effort=effort).split() for thought in _THOUGHTS]))
        return " ".join(islice(words, count if self.style.thought_words is None else self.style.thought_words))

    def _answer(self) -> str:
        if not self.prompt.last_role:
            text = " " + " ".join(_PROSE) + "."
        elif self.prompt.results:
            text = f"The tool says: {'; '.join(self.prompt.results)}"
        else:
            greedy = self.params.temperature == 0 or self.params.seed is None
            opener = _OPENERS[0 if greedy else (self.params.seed or 0) % len(_OPENERS)]
            text = f"{opener} {self._gist(32)}"
        if self.style.answer_words is None:
            return text
        return " ".join(islice(chain(text.split(), cycle(_PROSE)), self.style.answer_words))

    def _gist(self, words: int) -> str:
        """The beginning of the user's message, for an echo that is not longer than it need be."""
        parts = self.prompt.message.split()
        return " ".join(parts[:words]) + (" …" if len(parts) > words else "")

    # ── tools ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _calls(self) -> list[tuple[ToolSpec, int]]:
        """The tools to call, each with the number of its turn (which picks other arguments)."""
        guide = self.params.guide
        message = self.prompt.message
        if guide is not None and guide.kind != "tool_call":
            return []
        if guide is not None:
            asked = tools_asked_for(guide.tools, message) or list(guide.tools[:1])
            parallel = guide.parallel
        else:
            asked = tools_asked_for(self.prompt.tools, message) if self.prompt.last_role == "user" else []
            parallel = True
        if not asked:
            return []
        if not (parallel and re.search(r"\b(both|parallel)\b", message, re.IGNORECASE)):
            return [(asked[0], 0)]
        return [(tool, 0) for tool in asked] if len(asked) > 1 else [(asked[0], 0), (asked[0], 1)]

    def _call(self, call: tuple[ToolSpec, int]) -> Iterator[list[int]]:
        tool, turn = call
        arguments = ValueMaker({"type": "object", **tool.schema}, self.prompt.message, turn).make()
        yield self._special("<tool_call>")
        yield self._text(tool.name)
        for key, value in arguments.items():
            yield self._special("<arg_key>")
            yield self._text(key)
            yield self._special("</arg_key>")
            yield self._special("<arg_value>")
            yield self._text(value if isinstance(value, str) else _dump(value))
            yield self._special("</arg_value>")
        yield self._special("</tool_call>")


def tools_asked_for(tools: Sequence[ToolSpec], message: str) -> list[ToolSpec]:
    """The tools a message mentions, in the order of their declaration (the rule is in the module's docstring)."""

    def mentions(text: str) -> bool:
        return re.search(rf"(?<!\w){re.escape(text)}(?!\w)", message, re.IGNORECASE) is not None

    found = []
    for tool in tools:
        words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", tool.name)
        if mentions(tool.name) or any(len(word) >= 4 and mentions(word) for word in words):
            found.append(tool)
    return found or (list(tools[:1]) if mentions("tool") else [])


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
