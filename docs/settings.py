"""The reference of the gateway's settings, made from the classes in `freehold.gateway.config`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from freehold.gateway.canary.windows import METRICS
from freehold.gateway.config import Name, Settings

SIGNS = {"gt": "> ", "ge": "≥ ", "lt": "< ", "le": "≤ "}  # by the name of the constraint
WORDS = {str: "string", int: "integer", float: "number", bool: "boolean", Path: "path"}
KEYS = {"models": "ALIAS", "upstreams.NAME.models": "MODEL"}  # what stands for the keys of a table; else NAME
_NAME_PATTERN = re.search(r"pattern='([^']+)'", repr(Name))


def settings_reference() -> str:
    """The page without its first lines: a section for each table, with a row for each key.

    Raises ValueError: a key without a description, a class without a docstring.
    """
    parts = ["# Settings of the gateway\n", INTRODUCTION]
    parts += [section(path, cls) for path, cls in tables(Settings, "")]
    return "\n".join(parts)


INTRODUCTION = f"""\
One TOML file. Unknown keys are errors. `freehold gateway check FILE` checks it; a running gateway takes a changed file
within a second or two, or says why it keeps the old settings.

A *name* is a string of at most 128 letters, digits and `. _ : / @ -`, which begins with a letter or digit. *USD* are
dollars; prices are dollars a million tokens. Relative paths are relative to the folder in which the gateway is started.

How to [run a gateway](../how-to/run-a-gateway.md), [route by policy and task](../how-to/route-by-policy-and-task.md),
[use keys, budgets and the ledger](../how-to/keys-budgets-and-the-ledger.md), [roll out a
model](../how-to/roll-out-a-model.md).

Metrics that a guardrail can name: {", ".join(f"`{name}`" for name in METRICS)}.
"""


def tables(cls: type[BaseModel], path: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """Each table of the file and its class: the whole first, then what is in it, in order. path: as TOML writes it."""
    yield path, cls
    for name, field in cls.model_fields.items():
        inner, kind = inner_table(field.annotation)
        if inner is None:
            continue
        below = f"{path.strip('[]')}.{name}".lstrip(".")
        if kind is dict:
            below += f".{KEYS.get(below, 'NAME')}"
        yield from tables(inner, f"[[{below}]]" if kind is tuple else f"[{below}]")


def inner_table(annotation: Any) -> tuple[type[BaseModel] | None, Any]:
    """The class of the tables in a field, and what holds them: dict, tuple, or None for one table."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, None
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (dict, tuple, Union, UnionType):
        for each in arguments:
            found, _ = inner_table(each)
            if found is not None:
                return found, origin if origin in (dict, tuple) else None
    return None, None


def section(path: str, cls: type[BaseModel]) -> str:
    about = cls.__dict__.get("__doc__") or ""
    if not about:
        raise ValueError(f"{cls.__name__} has no docstring")
    title = f"`{path}`" if path else "The whole file"
    text = " ".join(about.split())
    rows = ["| key | type | default | |", "|---|---|---|---|"]
    rows += [row(cls, name, field) for name, field in cls.model_fields.items()]
    return f"## {title}\n\n{text}\n\n" + "\n".join(rows) + "\n"


def row(cls: type[BaseModel], name: str, field: FieldInfo) -> str:
    if not field.description:
        raise ValueError(f"{cls.__name__}.{name} has no description")
    cells = (f"`{name}`", type_words(field.annotation, field.metadata), default_words(field), field.description)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def type_words(annotation: Any, metadata: list[Any]) -> str:
    """A type in words, with its bounds."""
    while hasattr(annotation, "__metadata__"):
        if annotation == Name:
            return "name"
        metadata = [*metadata, *spread(annotation.__metadata__)]
        annotation = annotation.__origin__
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        [given] = [each for each in arguments if each is not type(None)]
        return type_words(given, metadata)
    if origin is Literal:
        return ", ".join(f"`{json.dumps(each)}`" for each in arguments)
    if origin is tuple:
        inner, _ = inner_table(annotation)
        return "list of tables" if inner else f"list of {of_list(arguments[0])}"
    if origin is dict:
        inner, _ = inner_table(annotation)
        return "tables by name" if inner else f"table of {of_list(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "table"
    if is_name(metadata):
        return "name"
    bounds = [
        f"{sign}{getattr(each, name):g}"
        for each in metadata
        for name, sign in SIGNS.items()
        if getattr(each, name, None) is not None
    ]
    return " ".join([WORDS[annotation], ", ".join(bounds)]).strip()


def of_list(annotation: Any) -> str:
    words = type_words(annotation, [])
    kind, _, bounds = words.partition(" ")
    if kind in (*WORDS.values(), "name"):
        return f"{kind}s {bounds}".strip()
    return words


def spread(metadata: tuple[Any, ...]) -> list[Any]:
    """Constraints out of the `Field(...)` that stand in an `Annotated`."""
    return [inner for each in metadata for inner in (each.metadata if isinstance(each, FieldInfo) else [each])]


def is_name(metadata: list[Any]) -> bool:
    """Whether these are the constraints of `Name`, which pydantic has taken apart."""
    return _NAME_PATTERN is not None and any(_NAME_PATTERN[1] in repr(each) for each in metadata)


def default_words(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None or value == () or value == {} or isinstance(value, BaseModel):
        return ""
    if isinstance(value, tuple):
        return ", ".join(f"`{json.dumps(each, ensure_ascii=False)}`" for each in value)
    return f"`{json.dumps(str(value) if isinstance(value, Path) else value)}`"
