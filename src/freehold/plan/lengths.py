"""How long requests are: distributions of prompt and output tokens, and requests of one's own. Torch-free.

- `lengths("8192")`: every request; `lengths("1000-9000")`: evenly spread.
- `read_calls("calls.jsonl")`: own calls, as a gateway's ledger, an API's usage objects or a log has them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from freehold.errors import InvalidRequest
from freehold.plan.drawing import Drawing

_MOST_TOKENS = 100_000_000
_PROMPT = ("prompt_tokens", "input_tokens", "input_length", "prompt_len")
_OUTPUT = ("completion_tokens", "output_tokens", "output_length", "output_len")
_CACHED = ("cached_tokens", "cached_prompt_tokens", "cache_read_input_tokens")
_TIME = ("timestamp", "started", "created", "time", "at")


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens, evenly spread from low to high, both included."""

    low: int
    high: int

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.high <= _MOST_TOKENS:
            raise InvalidRequest(f"lengths from {self.low:,} to {self.high:,} tokens: at least 1, the smaller first")

    @property
    def mean(self) -> float:
        return (self.low + self.high) / 2

    def draw(self, drawing: Drawing, count: int) -> list[int]:
        return drawing.integers(self.low, self.high, count)

    def __str__(self) -> str:
        return f"{self.low:,}" if self.low == self.high else f"{self.low:,} to {self.high:,}"


@dataclass(frozen=True, slots=True)
class Call:
    """One request. cached: tokens of its prompt that a prefix cache has. started: seconds, None if not known."""

    prompt: int
    output: int
    cached: int = 0
    started: float | None = None


def lengths(text: str | float) -> Lengths:
    """From "8192" or "1000-9000". Raises InvalidRequest."""
    match = re.fullmatch(r"\s*(\d[\d_,]*)(?:\.0)?\s*(?:-\s*(\d[\d_,]*))?\s*", str(text))
    if match is None:
        raise InvalidRequest(f"{text!r} is no number of tokens; write 8192, or 1000-9000 for evenly spread lengths")
    low, high = (int(re.sub("[_,]", "", part)) for part in (match[1], match[2] or match[1]))
    return Lengths(low, high)


def read_calls(path: str | Path) -> tuple[Call, ...]:
    """Own calls from a JSONL file, in the order of the file. Raises InvalidRequest that names the line.

    Each line is an object with the tokens of prompt and output, by any of the names that OpenAI's and Anthropic's usage
    objects, Mooncake traces and ledgers use, at its top or under "usage"; cached tokens and a time where it has them.
    Other keys mean nothing here. Calls without output (failed ones) are left out.

    Of a gateway's ledger (rows with `row_id` and `request_id`), one row of each request counts, its last attempt that
    gave output; shadows, which no caller waited for, and notes do not.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path}: not readable: {error}", param="calls") from None
    calls: list[Call] = []
    answered: dict[str, Call] = {}  # of a ledger, by request
    for row, call in _parsed(path, text):
        if call is None or call.output < 1:
            continue
        request = row.get("request_id") if "row_id" in row else None
        if isinstance(request, str):
            answered.pop(request, None)  # a later attempt takes its place, in order of time too
            answered[request] = call
        else:
            calls.append(call)
    calls += answered.values()
    if not calls:
        raise InvalidRequest(f"{path}: no call with output tokens in it", param="calls")
    return tuple(calls)


def _parsed(path: Path, text: str) -> Iterator[tuple[Mapping[str, Any], Call | None]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"{path}, line {number}: not JSON: {error}", param="calls") from None
        if not isinstance(row, Mapping):
            raise InvalidRequest(f"{path}, line {number}: expected an object", param="calls")
        try:
            yield row, None if _no_call(row) else _call(row)
        except InvalidRequest as error:
            raise InvalidRequest(f"{path}, line {number}: {error.message}", param="calls") from None


def _no_call(row: Mapping[str, Any]) -> bool:
    """Of a ledger: a note, a shadow, or an attempt whose tokens nobody counted."""
    if "row_id" not in row:
        return False
    uncounted = row.get("input_tokens") is None or row.get("output_tokens") is None
    return "request_id" not in row or bool(row.get("shadow_of")) or uncounted


def _call(row: Mapping[str, Any]) -> Call:
    places: list[Mapping[str, Any]] = [row]
    for name in ("usage", "prompt_tokens_details", "input_tokens_details"):
        places += [place[name] for place in list(places) if isinstance(place.get(name), Mapping)]
    prompt, output = _count(places, _PROMPT), _count(places, _OUTPUT)
    if prompt is None or output is None:
        missing, names = ("prompt", _PROMPT) if prompt is None else ("output", _OUTPUT)
        raise InvalidRequest(f"no number of {missing} tokens; it is looked for as {', '.join(names)}")
    cached = _count(places, _CACHED) or 0
    if "cache_read_input_tokens" in {key for place in places for key in place}:
        prompt += cached  # Anthropic counts them apart
    if prompt < 1 or cached > prompt:
        raise InvalidRequest(f"{prompt} prompt tokens of which {cached} cached cannot be")
    return Call(prompt, output, cached, _time(row))


def _count(places: list[Mapping[str, Any]], names: tuple[str, ...]) -> int | None:
    for place in places:
        for name in names:
            value = place.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MOST_TOKENS:
                raise InvalidRequest(f"{name} = {value!r} is no number of tokens")
            return value
    return None


def _time(row: Mapping[str, Any]) -> float | None:
    value = next((row[name] for name in _TIME if name in row), None)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
