"""A `Guide` as a grammar for llguidance (its Lark dialect). Text in, text out; torch-free.

Tool calls are in GLM's grammar, whose tags are single control tokens that no text can spell:

    <tool_call>NAME(<arg_key>KEY</arg_key><arg_value>VALUE</arg_value>)*</tool_call>

Arguments come in the order the schema declares them, each at most once, the required ones always. A VALUE is raw text
where the schema asks for a string, and JSON elsewhere. Where it allows both (`["string", "null"]`), both forms are
allowed, as `serve/arguments.py` reads them.

`format` is an annotation in JSON Schema: formats that llguidance knows are enforced inside JSON, no others are.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from freehold.engine.schema_shape import Schema, check_shape, rewritten
from freehold.engine.tool_schema import Document, properties, take_apart
from freehold.errors import InvalidRequest, UnsupportedField
from freehold.types import Guide, ToolSpec

# Enough to indent deeply nested JSON, and a bound on a model that would write white space for ever.
_WHITESPACE = r"[ \t\r\n]{1,64}"
_ANY_TEXT = "/(?s:.*)/"
_ENFORCED_FORMATS = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
)


@dataclass(frozen=True, slots=True)
class Grammar:
    """Lark text, and rules that are each a complete grammar to be tried on its own: one that nothing satisfies would
    otherwise be noticed only in the middle of a generation."""

    lark: str
    to_try: tuple[str, ...] = ()


def grammar_of(guide: Guide, special_id: Callable[[str], int | None]) -> Grammar:
    """The grammar of everything a guided generation may produce, without the end-of-sequence token.

    special_id gives the id of a control token. Raises InvalidRequest for a schema that cannot be expressed, and
    UnsupportedField if the tokenizer lacks a control token that is needed.
    """
    try:
        return _Builder(special_id).build(guide)
    except RecursionError:
        raise InvalidRequest("the schema is nested too deeply", param=_param(guide)) from None


def _param(guide: Guide) -> str:
    return "tools" if guide.kind == "tool_call" else "response_format"


class _Builder:
    """Collects the rules of one grammar."""

    def __init__(self, special_id: Callable[[str], int | None]) -> None:
        self._special_id = special_id
        self._rules: list[str] = []
        self._to_try: list[str] = []

    def build(self, guide: Guide) -> Grammar:
        match guide.kind:
            case "json_object":
                body = self._json({"type": "object"})
            case "json_schema":
                if guide.schema is None:
                    raise InvalidRequest("json_schema needs a schema", param="response_format")
                check_shape(guide.schema, "schema", "response_format")
                body = self._json(guide.schema)
            case "tool_call":
                body = self._tool_calls(guide)
        if guide.thinking:
            thought = self._rule(_ANY_TEXT, terminal=True)
            body = f"{thought} {self._token('</think>')} {body}"
        return Grammar(f"start: {body}\n" + "".join(self._rules), tuple(self._to_try))

    def _rule(self, body: str, *, terminal: bool = False) -> str:
        """Add a rule and return its name. Terminals are matched by the lexer: names are upper case."""
        name = f"{'T' if terminal else 'r'}{len(self._rules)}"
        self._rules.append(f"{name}: {body}\n")
        return name

    def _token(self, text: str) -> str:
        token_id = self._special_id(text)
        if token_id is None:
            raise UnsupportedField(f"this model's tokenizer has no {text} token, which structured output needs here")
        return f"<[{token_id}]>"

    def _json(self, schema: Schema) -> str:
        options = {"whitespace_pattern": _WHITESPACE}
        return self._rule(f"%json {json.dumps({**_prepared(schema), 'x-guidance': options})}")

    def _tool_calls(self, guide: Guide) -> str:
        if not guide.tools:
            raise InvalidRequest("a tool call is required, but there are no tools", param="tools")
        tools = " | ".join(self._rule(self._tool(tool)) for tool in guide.tools)
        call = self._rule(f"{self._token('<tool_call>')} ({tools}) {self._token('</tool_call>')}")
        return f"{call}+" if guide.parallel else call

    def _tool(self, tool: ToolSpec) -> str:
        where = f"tool {tool.name!r}"
        parts = [_literal(tool.name)]
        root = Document(tool.schema, where)
        for key, schema, required in properties(root, where):
            value = self._value(root, schema, f"{where}, argument {key!r}")
            argument = self._rule(
                f"{self._token('<arg_key>')} {_literal(key)} {self._token('</arg_key>')} "
                f"{self._token('<arg_value>')} {value} {self._token('</arg_value>')}"
            )
            parts.append(argument if required else f"{argument}?")
        return " ".join(parts)

    def _value(self, root: Document, schema: Any, where: str) -> str:
        forms = take_apart(root, schema, where)
        options = [self._raw(string, where) for string in forms.strings]
        if forms.others:
            other = {"anyOf": forms.others} if len(forms.others) > 1 else forms.others[0]
            options.append(self._json(root.standalone(other)))
        if not options:
            raise InvalidRequest(f"{where}: no value satisfies the schema", param="tools")
        return f"({' | '.join(options)})"

    def _raw(self, schema: Schema, where: str) -> str:
        """The alternatives of a string given as text, not as JSON."""
        if "enum" in schema:
            return " | ".join(_literal(value) for value in schema["enum"])
        terms = []
        if "minLength" in schema or "maxLength" in schema:
            low, high = schema.get("minLength", 0), schema.get("maxLength")
            if high is not None and low > high:
                raise InvalidRequest(f"{where}: minLength {low} is more than maxLength {high}", param="tools")
            terms.append(f"/(?s:.{{{low},{'' if high is None else high}}})/")
        if "pattern" in schema:
            terms.append(f"/{_search_regex(schema['pattern'])}/")
        terminal = self._rule(" & ".join(terms) or _ANY_TEXT, terminal=True)
        if terms:
            self._to_try.append(f"start: {terminal}\n{self._rules[-1]}")
        return terminal


def _literal(text: str) -> str:
    """A string literal of the grammar."""
    return json.dumps(text)  # escaped to ASCII: its lexer does not take every character as it is


def _search_regex(pattern: str) -> str:
    """A JSON schema pattern, which may match anywhere, as a regex of the whole string for use between slashes."""
    from llguidance import regex_to_lark

    whole = []
    for branch in _top_level_branches(pattern):
        start, end = branch.startswith("^"), branch.endswith("$") and not _is_escaped(branch, len(branch) - 1)
        inner = branch[1 if start else 0 : len(branch) - 1 if end else len(branch)]
        whole.append(f"{'' if start else '(?s:.*)'}(?:{inner}){'' if end else '(?s:.*)'}")
    return str(regex_to_lark("|".join(whole), "dw"))


def _top_level_branches(pattern: str) -> list[str]:
    """Split a regex at the `|`s outside of groups and classes."""
    branches, start, depth, in_class = [], 0, 0, False
    for i, character in enumerate(pattern):
        if _is_escaped(pattern, i):
            continue
        if in_class:
            in_class = character != "]"
        elif character == "[":
            in_class = True
        elif character in "()":
            depth += 1 if character == "(" else -1
        elif character == "|" and depth == 0:
            branches.append(pattern[start:i])
            start = i + 1
    return [*branches, pattern[start:]]


def _is_escaped(text: str, index: int) -> bool:
    before = text[:index]
    return (len(before) - len(before.rstrip("\\"))) % 2 == 1


def _prepared(schema: Schema) -> dict[str, Any]:
    """A copy without `format`s that llguidance would refuse."""

    def prepare(part: Schema) -> Schema:
        if str(part.get("format", "date")) in _ENFORCED_FORMATS:
            return part
        return {key: value for key, value in part.items() if key != "format"}

    copy: dict[str, Any] = rewritten(schema, prepare)
    return copy
