"""An example, and its tokens as the server would show and the model would write them. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from freehold.model.chat.template import ChatTemplate
from freehold.model.tokenizer import GLM_SPECIAL_TOKENS, Tokenizer

Effort = Literal["none", "high", "max"]
EFFORTS: tuple[Effort, ...] = ("none", "high", "max")
ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
TEXT_START = "[gMASK]<sop>"
TEXT_END = "<|endoftext|>"


@dataclass(frozen=True, slots=True)
class Example:
    """A chat whose last message is the assistant's answer, or plain text when there are no messages.

    messages: OpenAI chat form as `ChatTemplate` takes it (reasoning_content, tool_calls, role "tool").
    check: what makes an answer right (`checks.judge`); None when there is nothing to check.
    """

    kind: str
    messages: tuple[Mapping[str, Any], ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    effort: Effort = "none"
    text: str = ""
    check: Mapping[str, Any] | None = None

    @property
    def prompt(self) -> tuple[Mapping[str, Any], ...]:
        """The messages before the final answer: what a server is sent."""
        return self.messages[:-1]


@dataclass(frozen=True, slots=True)
class Encoded:
    """ids: the tokens. trained: of the same length, True where the token is one that the assistant writes."""

    ids: list[int]
    trained: list[bool] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Markers:
    """The ids that delimit turns in one tokenizer."""

    assistant: int
    user: int
    think: int
    end_think: int
    roles: frozenset[int]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Markers:
        """Raises KeyError if the tokenizer lacks one of GLM's control tokens."""
        found = {text: tokenizer.special_id(text) for text in (*ROLE_TOKENS, "<think>", "</think>")}
        ids = {text: token for text, token in found.items() if token is not None}
        return cls(
            ids["<|assistant|>"],
            ids["<|user|>"],
            ids["<think>"],
            ids["</think>"],
            frozenset(ids[role] for role in ROLE_TOKENS),
        )


def rendered(example: Example, template: ChatTemplate) -> str | None:
    """The example as one text with control tokens spelled out; None if its content spells one, which would forge it.

    A chat ends with the role token that ends the last turn: `<|user|>`, or `<|observation|>` after tool calls.
    """
    if not example.messages:
        return None if _forges(example.text) else f"{TEXT_START}{example.text}{TEXT_END}"
    prompt = template.render(example.messages, example.tools, effort=example.effort, add_generation_prompt=False)
    if any(not segment.control and _forges(segment.text) for segment in prompt.segments):
        return None
    return prompt.text + _end(example)


def encode(example: Example, tokenizer: Tokenizer, template: ChatTemplate) -> Encoded:
    """Tokens of an example and which of them the assistant writes.

    Trained are the tokens after the prompt that the server would give (`<|assistant|><think>`, or
    `<|assistant|><think></think>` without thinking) up to and with the role token that ends the turn. With thinking,
    only the turns since the last user message are: the template clears the thinking of earlier ones, so they do not
    look as the model wrote them. Of plain text everything after the opening is trained.
    """
    if not example.messages:
        start = tokenizer.encode(TEXT_START)
        body = [*tokenizer.encode(example.text, special=False), *tokenizer.encode(TEXT_END)]
        return Encoded([*start, *body], [False] * len(start) + [True] * len(body))
    prompt = template.render(example.messages, example.tools, effort=example.effort, add_generation_prompt=False)
    ids = [*prompt.encode(tokenizer), *tokenizer.encode(_end(example))]
    return Encoded(ids, trained_mask(ids, Markers.of(tokenizer), thinking=example.effort != "none"))


def trained_mask(ids: Sequence[int], markers: Markers, *, thinking: bool) -> list[bool]:
    """True where a chat's token is the assistant's. The control tokens must be the template's own."""
    mask = [False] * len(ids)
    # With thinking, turns before the last user message are history. The final token only ends the last turn.
    first = 0
    if thinking:
        first = max((i for i, token in enumerate(ids[:-1]) if token == markers.user), default=0)
    position = first
    while position < len(ids):
        if ids[position] != markers.assistant:
            position += 1
            continue
        position += 2 if thinking else 3  # <|assistant|> <think> [</think>]
        while position < len(ids):
            mask[position] = True
            if ids[position] in markers.roles:
                break
            position += 1
    return mask


def _end(example: Example) -> str:
    return "<|observation|>" if example.messages[-1].get("tool_calls") else "<|user|>"


_CONTROL = re.compile("|".join(map(re.escape, sorted(GLM_SPECIAL_TOKENS, key=len, reverse=True))))


def _forges(text: str) -> bool:
    return _CONTROL.search(text) is not None


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def assistant(
    content: str, *, thinking: str = "", calls: Sequence[tuple[str, Mapping[str, Any]]] = ()
) -> dict[str, Any]:
    """An assistant message. calls: (function name, arguments), given ids call_0, call_1, …"""
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if thinking:
        message["reasoning_content"] = thinking
    if calls:
        message["tool_calls"] = [
            {"id": f"call_{i}", "type": "function", "function": {"name": name, "arguments": dict(arguments)}}
            for i, (name, arguments) in enumerate(calls)
        ]
    return message


def tool(content: str, index: int = 0) -> dict[str, Any]:
    """The result of call number index."""
    return {"role": "tool", "tool_call_id": f"call_{index}", "content": content}


def pieces(example: Example, template: ChatTemplate) -> list[str]:
    """The texts between the control tokens of an example."""
    if not example.messages:
        return [example.text]
    prompt = template.render(example.messages, example.tools, effort=example.effort, add_generation_prompt=False)
    return [segment.text for segment in prompt.segments if not segment.control]
