"""Messages to prompt: the checkpoint's own `chat_template.jinja` when there is one, else GLM's grammar built in.

Either way the result is a list of segments, each a control token that the template wrote, or text. Text is encoded
without control tokens, so a user who writes "<|assistant|>" or "</think>" gets those characters and not a new turn.

Grammar and rules: the chat templates published with GLM-5.2 and GLM-5.3.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from freehold.errors import ConfigError, InvalidRequest
from freehold.model.chat.conversation import Message, read_messages, read_tools, tool_results_in_call_order
from freehold.model.chat.effort import GLM_5_2, GLM_5_3, KNOWN_KWARGS, PROFILES, Effort, EffortProfile, resolve
from freehold.model.chat.jinja_template import JinjaTemplate
from freehold.model.tokenizer import GLM_SPECIAL_TOKENS, Tokenizer

_TOOLS_HEAD = (
    "\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
)
_TOOLS_TAIL = (
    "</tools>\n\nFor each function call, output the function name and arguments within the following XML format:\n"
    "<tool_call>{function-name}<arg_key>{arg-key-1}</arg_key><arg_value>{arg-value-1}</arg_value>"
    "<arg_key>{arg-key-2}</arg_key><arg_value>{arg-value-2}</arg_value>...</tool_call>"
)
_BUILTIN = (GLM_5_2.name, GLM_5_3.name)


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a prompt: one control token (control true), or text in which nothing is a control token."""

    text: str
    control: bool = False


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """A prompt. thinking: generation starts inside `<think>`. Neighbouring text segments are one segment."""

    segments: tuple[Segment, ...]
    thinking: bool
    warnings: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        return "".join(segment.text for segment in self.segments)

    def encode(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Token ids. Raises InvalidRequest for text that is not Unicode (a lone surrogate)."""
        ids: list[int] = []
        for segment in join(
            # A control token that this tokenizer does not have is the text it looks like.
            Segment(s.text, s.control and tokenizer.special_id(s.text) is not None)
            for s in self.segments
        ):
            try:
                segment.text.encode("utf-8")
            except UnicodeEncodeError as error:
                code = ord(segment.text[error.start])
                raise InvalidRequest(
                    f"messages: U+{code:04X} is half of a character, not text", param="messages"
                ) from None
            ids += tokenizer.encode(segment.text, special=segment.control)
        return tuple(ids)


class ChatTemplate:
    """Renders conversations. Immutable, and safe to use from several threads.

    profile: what it does with efforts (`effort`). source: the Jinja file, or None for the built-in renderer.
    """

    def __init__(self, profile: EffortProfile, source: JinjaTemplate | None = None) -> None:
        self.profile = profile
        self.source = source

    @classmethod
    def builtin(cls, profile: str = GLM_5_2.name) -> ChatTemplate:
        """The built-in renderer of `glm-5.2` or `glm-5.3`. Raises ConfigError for another name."""
        if profile not in _BUILTIN:
            raise ConfigError(f"chat template profile {profile!r}: the built-in ones are {', '.join(_BUILTIN)}")
        return cls(PROFILES[profile])

    @classmethod
    def from_dir(cls, path: str | Path, *, profile: str = GLM_5_2.name) -> ChatTemplate:
        """The checkpoint's `chat_template.jinja`, or `chat_template` in tokenizer_config.json; else `builtin(profile)`.

        What the file does with efforts is found by rendering it. Raises ConfigError if it is not a template.
        """
        source = JinjaTemplate.from_dir(path)
        if source is None:
            return cls.builtin(profile)
        return cls(source.effort_profile(), source)

    def for_tokenizer(self, tokenizer: Tokenizer) -> ChatTemplate:
        """The same template, told which texts are control tokens (without this: GLM's)."""
        if self.source is None:
            return self
        added = tokenizer.backend.get_added_tokens_decoder().values()
        return ChatTemplate(self.profile, self.source.with_control_tokens([token.content for token in added]))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        effort: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> RenderedPrompt:
        """Render OpenAI chat messages and function tools.

        effort and template_kwargs (`chat_template_kwargs`) are those of the request; see `effort.resolve`.
        Raises InvalidRequest naming what is wrong, ConfigError if the checkpoint's template cannot be run.
        """
        kwargs = dict(template_kwargs or {})
        reads = KNOWN_KWARGS[:3] if self.source is None else self.source.reads
        found = resolve(self.profile, effort, kwargs, reads=reads)
        conversation = read_messages(messages)
        _check_references(conversation, {tool.name for tool in read_tools(tools)})
        if self.source is None:
            segments = _render(conversation, tools, found, self.profile is GLM_5_3, add_generation_prompt)
        else:
            pieces = self.source.render(conversation, tools, found, kwargs, add_generation_prompt)
            segments = join(Segment(text, control) for text, control in pieces)
        return RenderedPrompt(segments, add_generation_prompt and _ends_in_thinking(segments), found.warnings)


@dataclass(slots=True)
class _Writer:
    """Collects segments: `template` splits the grammar's own text at its control tokens, `user` takes text as it is."""

    segments: list[Segment] = field(default_factory=list)

    def template(self, text: str) -> None:
        for i, piece in enumerate(_CONTROL.split(text)):
            if piece:
                self.segments.append(Segment(piece, control=i % 2 == 1))

    def user(self, text: str) -> None:
        self.segments.append(Segment(text))

    def tagged(self, tag: str, text: str) -> None:
        self.template(f"<{tag}>")
        self.user(text)
        self.template(f"</{tag}>")


_CONTROL = re.compile("(" + "|".join(map(re.escape, sorted(GLM_SPECIAL_TOKENS, key=len, reverse=True))) + ")")


def join(segments: Iterable[Segment]) -> tuple[Segment, ...]:
    """The segments with neighbouring texts joined and empty ones dropped."""
    joined: list[Segment] = []
    for segment in segments:
        if not segment.text:
            continue
        if joined and not segment.control and not joined[-1].control:
            joined[-1] = Segment(joined[-1].text + segment.text)
        else:
            joined.append(segment)
    return tuple(joined)


def _ends_in_thinking(segments: Sequence[Segment]) -> bool:
    last = max((i for i, segment in enumerate(segments) if segment.control), default=None)
    if last is None or segments[last].text != "<think>":
        return False
    return all(segment.text.isspace() for segment in segments[last + 1 :])


def _check_references(messages: Sequence[Message], declared: set[str]) -> None:
    for message in messages:
        for name in message.references:
            if name not in declared:
                raise InvalidRequest(f"tools: a tool_reference names {name!r}, which is not declared", param="tools")


def _render(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], effort: Effort, in_call_order: bool, generate: bool
) -> tuple[Segment, ...]:
    """GLM's grammar. in_call_order: tool results follow the order of their calls (GLM-5.3)."""
    out = _Writer()
    out.template("[gMASK]<sop>")
    if effort.level is not None:
        out.template(f"<|system|>Reasoning Effort: {effort.level.capitalize()}")
    if tools:
        _write_tools(out, tools)
    last_user = max((i for i, message in enumerate(messages) if message.role == "user"), default=-1)
    for i, message in enumerate(messages):
        if message.role == "assistant":
            _write_assistant(out, message, keep_thinking=not effort.clear_thinking or i > last_user)
        elif message.role != "tool":
            out.template(f"<|{message.role}|>")
            out.user(message.content)
        elif i == 0 or messages[i - 1].role != "tool":
            end = next((j for j in range(i, len(messages)) if messages[j].role != "tool"), len(messages))
            run = tuple(messages[i:end])
            if in_call_order and i > 0:
                run = tool_results_in_call_order(run, messages[i - 1].tool_calls)
            out.template("<|observation|>")
            for result in run:
                _write_result(out, result, tools)
    if generate:
        out.template("<|assistant|><think>" if effort.thinking else "<|assistant|><think></think>")
    return join(out.segments)


def _write_tools(out: _Writer, tools: Sequence[Mapping[str, Any]]) -> None:
    out.template("<|system|>" + _TOOLS_HEAD)
    for tool in tools:
        if not tool["function"].get("defer_loading"):
            out.user(tool_json(tool) + "\n")
    out.template(_TOOLS_TAIL)


def _write_assistant(out: _Writer, message: Message, *, keep_thinking: bool) -> None:
    out.template("<|assistant|>")
    out.tagged("think", message.reasoning or "" if keep_thinking else "")
    out.user(message.content.strip())
    for call in message.tool_calls:
        out.template("<tool_call>")
        out.user(call.name)
        for key, value in call.arguments.items():
            out.tagged("arg_key", key)
            out.tagged("arg_value", value if isinstance(value, str) else as_json(value))
        out.template("</tool_call>")


def _write_result(out: _Writer, message: Message, tools: Sequence[Mapping[str, Any]]) -> None:
    if not message.references:
        out.tagged("tool_response", message.content)
        return
    by_name = {tool["function"]["name"]: tool for tool in tools}
    lines = "".join(tool_json(by_name[name]) + "\n" for name in message.references)
    out.tagged("tool_response", f"<tools>\n{lines}</tools>")


def tool_json(tool: Mapping[str, Any]) -> str:
    """A tool as the prompt shows it: its function object without the keys that are not for the model."""
    shown = (item for item in tool["function"].items() if item[0] not in ("defer_loading", "strict"))
    return "{" + ", ".join(f'"{key}": {as_json(value)}' for key, value in shown) + "}"


def as_json(value: Any) -> str:
    """JSON as the templates write it: ", " and ": ", and no escapes for non-ASCII characters."""
    return json.dumps(value, ensure_ascii=False)
