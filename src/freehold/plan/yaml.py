"""Plain data as YAML: mappings, lists, strings, numbers and booleans, in block style. Torch-free.

Strings that could be read as something else are quoted as in JSON, which YAML 1.2 contains. There is no reader. The
few lines here spare every installation of the core a YAML library; a test reads what they write with one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

_PLAIN = re.compile(r"(--)?[A-Za-z/$][A-Za-z0-9_./$()@=+-]*(:[A-Za-z0-9_./-]+)*")
# YAML allows these only escaped, or would take them for the end of a line; JSON lets them stand.
_UNPRINTABLE = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")
_WORDS = frozenset("true false yes no on off null none y n".split())


def to_yaml(documents: Sequence[Mapping[str, Any]]) -> str:
    """YAML text, documents separated by `---`."""
    return "---\n".join("".join(f"{line}\n" for line in _lines(document)) for document in documents)


def _lines(value: Any) -> list[str]:
    if isinstance(value, Mapping) and value:
        lines = []
        for key, item in value.items():
            lines += _entry(f"{_scalar(key)}:", item)
        return lines
    if isinstance(value, list | tuple) and value:
        lines = []
        for item in value:
            inner = _lines(item)
            lines += [f"- {inner[0]}", *(f"  {line}" for line in inner[1:])]
        return lines
    return [_scalar(value)]


def _entry(head: str, item: Any) -> list[str]:
    if isinstance(item, Mapping | list | tuple) and item:
        return [head, *(f"  {line}" for line in _lines(item))]
    return [f"{head} {_scalar(item)}"]


def _scalar(value: Any) -> str:
    if isinstance(value, str):
        plain = _PLAIN.fullmatch(value) is not None and value.lower() not in _WORDS
        return value if plain else _UNPRINTABLE.sub(_escaped, json.dumps(value, ensure_ascii=False))
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value)
    if isinstance(value, Mapping) and not value:
        return "{}"
    if isinstance(value, list | tuple) and not value:
        return "[]"
    raise TypeError(f"no YAML for {type(value).__name__}")


def _escaped(match: re.Match[str]) -> str:
    return f"\\u{ord(match[0]):04x}"
