"""The argument lists of vLLM and SGLang, and whether a command line obeys them. Torch-free.

`tables/` holds every flag of both engines with the type of its value, read from their published packages by
`benchmarks/plan_flags.py`. A launch that Freehold emits is checked against them before anybody sees it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

ServingEngine = Literal["vllm", "sglang"]
VERSIONS: Mapping[ServingEngine, str] = {"vllm": "0.32", "sglang": "0.5.23"}
"""Versions whose argument lists are bundled."""
_HUMAN = re.compile(r"\d+(\.\d+)?[kKmMgGtT]?|-1|auto")


@dataclass(frozen=True)
class Flag:
    """One option. type: of each value. nargs: None for one value, else "?", "+" or "*". keys: of a JSON object."""

    name: str
    type: Literal["int", "float", "str", "bool", "json"]
    choices: tuple[Any, ...] = ()
    nargs: str | None = None
    human: bool = False
    negatable: bool = False
    deprecated: str | None = None
    keys: Mapping[str, Flag] | None = None


@dataclass(frozen=True)
class FlagTable:
    """All options of one engine version, by every spelling."""

    engine: ServingEngine
    version: str
    source: str
    flags: Mapping[str, Flag]

    def problems(self, arguments: Sequence[str]) -> list[str]:
        """What is wrong with the options of a command line (without program, sub-command and model), in words.

        Unknown and deprecated flags, repeated flags, missing and surplus values, values of another type, values that
        are not among the choices, unknown keys of a JSON object and of a dotted flag (`--speculative-config.method`).
        """
        found: list[str] = []
        seen: set[str] = set()
        for spelled, values in _options(arguments, found):
            name, _, key = spelled.partition(".")
            flag = self._flag(name)
            if flag is None:
                found.append(f"{self.engine} {self.version} has no {name}")
                continue
            if spelled in seen:
                found.append(f"{spelled} is given twice")
            seen.add(spelled)
            if flag.deprecated is not None:
                found.append(f"{name} is deprecated: {flag.deprecated}")
            if key:
                inner = (flag.keys or {}).get(key)
                if inner is None:
                    found.append(f"{name} has no key {key}")
                    continue
                flag = inner
            found += _wrong_values(flag, spelled, values, negated=name.startswith("--no-"))
        return found

    def _flag(self, name: str) -> Flag | None:
        flag = self.flags.get(name)
        if flag is None and name.startswith("--no-"):
            positive = self.flags.get("--" + name.removeprefix("--no-"))
            flag = positive if positive is not None and positive.negatable else None
        return flag


@cache
def flag_table(engine: ServingEngine) -> FlagTable:
    """The bundled table of an engine."""
    version = VERSIONS[engine]
    file = resources.files("freehold.plan") / "tables" / f"{engine}-{version}.json"
    raw = json.loads(file.read_text())
    flags: dict[str, Flag] = {}
    for name, entry in raw["flags"].items():
        flag = _parse(name, entry)
        for spelling in (name, *entry.get("aliases", ())):
            flags[spelling] = flag
    return FlagTable(engine, version, raw["source"], flags)


def _parse(name: str, entry: Mapping[str, Any]) -> Flag:
    keys = {key: _parse(key, inner) for key, inner in entry["keys"].items()} if "keys" in entry else None
    return Flag(
        name=name,
        type=entry["type"],
        choices=tuple(entry.get("choices", ())),
        nargs=entry.get("nargs"),
        human=entry.get("human", False),
        negatable=entry.get("negatable", False),
        deprecated=entry.get("deprecated"),
        keys=keys,
    )


def _options(arguments: Sequence[str], found: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Each option with the values that follow it; what stands before the first option is reported."""
    current: tuple[str, list[str]] | None = None
    for argument in arguments:
        if argument.startswith("-") and not re.fullmatch(r"-\d+(\.\d+)?", argument):
            if current is not None:
                yield current
            name, equals, value = argument.partition("=")
            current = (name, [value] if equals else [])
        elif current is None:
            found.append(f"{argument!r} belongs to no option")
        else:
            current[1].append(argument)
    if current is not None:
        yield current


def _wrong_values(flag: Flag, spelled: str, values: Sequence[str], *, negated: bool) -> Iterator[str]:
    if flag.type == "bool":
        # A dotted key is a value inside a JSON object, so there a boolean is spelled out.
        wants_word = "." in spelled
        if wants_word != bool(values) or (wants_word and list(values) not in (["true"], ["false"])):
            yield f"{spelled} takes {'true or false' if wants_word else 'no value'}, got {' '.join(values) or 'none'}"
        return
    if negated:
        yield f"{spelled}: only switches can be negated"
    least, most = {None: (1, 1), "?": (0, 1), "+": (1, None), "*": (0, None)}[flag.nargs]
    if len(values) < least or (most is not None and len(values) > most):
        yield f"{spelled} takes {'one value' if most == 1 else 'values'}, got {len(values)}"
    for value in values:
        if not _is_of_type(flag, value):
            yield f"{spelled} takes {flag.type}, got {value!r}"
        elif flag.choices and value not in {str(choice) for choice in flag.choices}:
            yield f"{spelled} has no choice {value!r}"
        elif flag.type == "json" and flag.keys is not None:
            unknown = sorted(set(json.loads(value)) - set(flag.keys))
            if unknown:
                yield f"{spelled} has no key {', '.join(unknown)}"


def _is_of_type(flag: Flag, value: str) -> bool:
    if flag.human:
        return _HUMAN.fullmatch(value) is not None
    try:
        match flag.type:
            case "int":
                int(value)
            case "float":
                float(value)
            case "json":
                return isinstance(json.loads(value), dict | list)
    except ValueError:
        return False
    return True
