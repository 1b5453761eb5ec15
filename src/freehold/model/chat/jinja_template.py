"""A checkpoint's own `chat_template.jinja`, rendered in a sandbox, with user text kept apart from control tokens.

A Jinja template gives one string, in which a "<|user|>" that the template wrote and one that the user typed look the
same. So every control token spelled in a message, a tool or a template variable is replaced by one private-use code
point before rendering, and turned back afterwards, when the control tokens that the template wrote have been split
off. The template cannot tell: it sees text of the same words, and no rule of GLM's templates looks for control
tokens in user text (`<think>` in assistant content is split out before, by `conversation`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from freehold.errors import ConfigError, InvalidRequest
from freehold.model.chat.conversation import Message
from freehold.model.chat.effort import LEVELS, PROFILES, Effort, EffortProfile
from freehold.model.tokenizer import GLM_SPECIAL_TOKENS

_GIVEN = frozenset({"messages", "tools", "add_generation_prompt"})  # not for callers to set
_FIRST = 0xF0000  # private-use plane 15: this code point escapes, and those after it stand for control tokens
_ESCAPE = chr(_FIRST)


class JinjaTemplate:
    """One compiled template. reads: the variables it reads, apart from the conversation itself."""

    def __init__(
        self,
        source: str,
        *,
        name: str = "chat_template.jinja",
        constants: Mapping[str, str] | None = None,
        control_tokens: Sequence[str] = GLM_SPECIAL_TOKENS,
    ) -> None:
        """Compile. constants: variables with fixed values, like bos_token. Raises ConfigError naming the line."""
        self._source, self._name, self._constants = source, name, dict(constants or {})
        environment = _environment()
        try:
            inputs = _inputs(environment.parse(source))
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"{name}, line {error.lineno}: {error.message}") from None
        self.reads = inputs - _GIVEN - set(environment.globals) - set(self._constants)
        longest_first = sorted(set(control_tokens), key=len, reverse=True)
        self._codes = {token: chr(_FIRST + 1 + i) for i, token in enumerate(longest_first)}
        self._texts = {code: token for token, code in self._codes.items()}
        reserved = f"{_ESCAPE}-{chr(_FIRST + len(longest_first))}"
        if re.search(f"[{reserved}]", source):
            raise ConfigError(f"{name}: uses private-use code points from U+{_FIRST:X}, which are reserved here")
        alternatives = "|".join(map(re.escape, longest_first)) or "(?!)"
        self._control = re.compile(f"({alternatives})")
        self._to_escape = re.compile(f"{alternatives}|[{reserved}]")
        self._escaped = re.compile(f"{_ESCAPE}([{reserved}])|([{reserved}])")

    @classmethod
    def from_dir(cls, path: str | Path) -> JinjaTemplate | None:
        """The template of a checkpoint directory, None if it has none. Raises ConfigError if it cannot be read."""
        directory = Path(path)
        config = _read_json(directory / "tokenizer_config.json")
        named = {key: _token_text(value) for key, value in config.items() if key.endswith("_token")}
        constants = {key: text for key, text in named.items() if text is not None}
        file, inline = directory / "chat_template.jinja", config.get("chat_template")
        if file.is_file():
            try:
                source = file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"{file}: cannot be read: {error}") from None
            return cls(source, name=str(file), constants=constants)
        if isinstance(inline, str):
            return cls(inline, name=f"{directory / 'tokenizer_config.json'}: chat_template", constants=constants)
        return None

    def with_control_tokens(self, control_tokens: Sequence[str]) -> JinjaTemplate:
        """The same template, with these texts as the control tokens."""
        return JinjaTemplate(self._source, name=self._name, constants=self._constants, control_tokens=control_tokens)

    def effort_profile(self) -> EffortProfile:
        """What the template does with efforts, found by rendering a short conversation with each.

        It is the profile of a published template (`effort.PROFILES`) if it does the same. Raises ConfigError if the
        template cannot render one user message.
        """

        def probe(**variables: Any) -> str:
            try:
                return self._render([{"role": "user", "content": "."}], None, variables, True)
            except InvalidRequest as error:
                raise ConfigError(f"{self._name}: cannot render one user message: {error.message}") from None

        unset = probe()
        rendered = {value: probe(reasoning_effort=value) for value in reversed(LEVELS)}
        levels = {value: next(v for v in rendered if rendered[v] == rendered[value]) for value in LEVELS}
        if len(set(rendered.values())) == 1 and unset in rendered.values():
            levels = {}
        default = next((value for value in levels if rendered[value] == unset), None)
        default = levels[default] if default is not None else None
        can_disable = not probe(enable_thinking=False).rstrip().endswith("<think>")
        for known in PROFILES.values():
            if (known.levels, known.default, known.can_disable) == (levels, default, can_disable):
                return EffortProfile(known.name, levels, default, can_disable)
        return EffortProfile("custom", levels, default, can_disable)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        effort: Effort,
        kwargs: Mapping[str, Any],
        add_generation_prompt: bool,
    ) -> list[tuple[str, bool]]:
        """The prompt as (text, whether it is a control token). Raises InvalidRequest or ConfigError."""
        variables = {name: value for name, value in kwargs.items() if name in self.reads and value is not None}
        if effort.asked is not None and effort.asked != "none":
            variables["reasoning_effort"] = effort.asked
        if not effort.thinking:
            variables["enable_thinking"] = False
        text = self._render(
            self._escape([_as_dict(message) for message in messages]),
            self._escape(list(tools)) if tools else None,
            self._escape(variables),
            add_generation_prompt,
        )
        return [
            (piece if i % 2 else self._restore(piece), i % 2 == 1) for i, piece in enumerate(self._control.split(text))
        ]

    def _render(
        self, messages: list[Any], tools: list[Any] | None, variables: Mapping[str, Any], generate: bool
    ) -> str:
        try:
            return self._template.render(
                **{**self._constants, **variables}, messages=messages, tools=tools, add_generation_prompt=generate
            )
        except SecurityError as error:
            raise ConfigError(f"{self._name}: does what a chat template may not do: {error}") from None
        except jinja2.TemplateError as error:  # raise_exception, too: the template's own words
            raise InvalidRequest(f"messages: refused by the chat template: {error.message}", param="messages") from None
        except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError) as error:
            raise InvalidRequest(f"messages: the chat template cannot render them: {error}", param="messages") from None

    def _escape(self, value: Any) -> Any:
        """A deep copy in which control tokens in strings are code points; plain JSON types only."""
        if isinstance(value, str):
            return self._to_escape.sub(lambda m: self._codes.get(m[0], _ESCAPE + m[0]), str(value))
        if isinstance(value, Mapping):
            return {self._escape(key): self._escape(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._escape(item) for item in value]
        return value

    def _restore(self, text: str) -> str:
        return self._escaped.sub(lambda m: m[1] or self._texts.get(m[2], ""), text)


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`: marks for training; here only the text inside."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's own attribute)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """The environment that `transformers` renders chat templates in, which is what template authors test with."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _inputs(template: jinja2.nodes.Template) -> frozenset[str]:
    """The variables a caller may set: those it reads, but for names that it sets itself and only seem undeclared
    because it does so in a branch. `{% set x = x or 1 %}` gives an input a default, and keeps it one."""

    def names(node: jinja2.nodes.Node) -> set[str]:
        found = {name.name for name in node.find_all(jinja2.nodes.Name)}
        return found | {node.name} if isinstance(node, jinja2.nodes.Name) else found

    own = {macro.name for macro in template.find_all(jinja2.nodes.Macro)}
    for loop in template.find_all(jinja2.nodes.For):
        own |= names(loop.target)
    for block in template.find_all(jinja2.nodes.AssignBlock):
        own |= names(block.target)
    for assignment in template.find_all(jinja2.nodes.Assign):
        own |= names(assignment.target) - names(assignment.node)
    return frozenset(jinja2.meta.find_undeclared_variables(template)) - own


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    if not ensure_ascii:
        return text
    # Our code points must survive as they are, to be turned back into the text they stand for.
    return re.sub(r"[^\x00-\x7f]", lambda m: m[0] if m[0] >= _ESCAPE else json.dumps(m[0])[1:-1], text)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:  # the name of the argument is the one that templates may use
    return datetime.now().astimezone().strftime(format)


def _as_dict(message: Message) -> dict[str, Any]:
    """A canonical message in the shape that chat templates read."""
    found: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.references:
        found["content"] = [{"type": "tool_reference", "name": name} for name in message.references]
    if message.reasoning is not None:
        found["reasoning_content"] = message.reasoning
    if message.tool_calls:
        found["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        found["tool_call_id"] = message.tool_call_id
    return found


def _read_json(file: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: not readable as JSON: {error}") from None
    return found if isinstance(found, dict) else {}


def _token_text(value: Any) -> str | None:
    """A special token of tokenizer_config.json, written as a string or as an object with its content."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None
