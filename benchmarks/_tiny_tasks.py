"""Held-out tasks for a trained model: generated with a seed and words that training never sees, answered by our engine,
judged by the checkers of `freehold.train.data.checks`."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import Progress

from freehold import LLM
from freehold.serve.answers import ChatResult
from freehold.stats import Interval, wilson
from freehold.train.data.checks import Verdict, judge
from freehold.train.data.example import Example
from freehold.train.data.mixture import generate

T = TypeVar("T")
R = TypeVar("R")

SEED = 50_000  # of everything held out; training counts its seeds from 0
TOGETHER = 16  # prompts in the engine at a time: the rows of a step that adds up in one order
CALLS = ("tool_call", "tool_calls")  # checks of calls
MAX_TOKENS = 640
CONTEXT = 4096


@dataclass(frozen=True)
class Answered:
    """An example, what the model answered, and what the checker says of that."""

    example: Example
    result: ChatResult
    verdict: Verdict

    @property
    def right(self) -> bool:
        return self.verdict.right

    @property
    def truncated(self) -> bool:
        return self.result.finish_reason == "length"


def open_model(directory: str | Path, **options: Any) -> LLM:
    """A checkpoint as the benchmarks load it."""
    options = {"max_model_len": _longest(Path(directory)), "cache_bytes": 1 << 29} | options
    return LLM(directory, progress=False, **options)


def _longest(directory: Path) -> int:
    positions = json.loads((directory / "config.json").read_text())["max_position_embeddings"]
    return min(CONTEXT, int(positions))


def held_out(kind: str, count: int, seed: int = SEED) -> list[Example]:
    """The first `count` test examples of a kind."""
    return [generate(kind, "test", seed, index) for index in range(count)]


def checked(
    kind: str, count: int, seed: int = SEED, among: int = 20, checks: Collection[str] | None = None
) -> list[Example]:
    """The first test examples of a kind that have something to check; by one of `checks`, if given."""
    found: list[Example] = []
    for index in range(count * among):
        example = generate(kind, "test", seed, index)
        if example.check is not None and (checks is None or example.check["type"] in checks):
            found.append(example)
        if len(found) == count:
            return found
    raise ValueError(f"{kind}: {len(found)} of {count * among} examples can be checked, {count} were asked for")


def answer(
    llm: LLM, examples: Sequence[Example], *, max_tokens: int = MAX_TOKENS, effort: str | None = None
) -> list[ChatResult]:
    """Greedy answers in the order of the examples; effort replaces theirs."""

    def one(example: Example) -> ChatResult:
        fields: dict[str, Any] = {"tools": list(example.tools)} if example.tools else {}
        return llm.chat(
            [_sent(message) for message in example.prompt],
            temperature=0.0,
            max_tokens=max_tokens,
            effort=effort or example.effort,
            **fields,
        )[0]

    return together(one, examples)


def _sent(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message as the API takes it: the arguments of calls are JSON text there, and objects in examples."""
    if not message.get("tool_calls"):
        return message
    calls = [
        call | {"function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def together(one: Callable[[T], R], jobs: Iterable[T], label: str = "answering") -> list[R]:
    """one(job) for each, several at a time, in their order; a bar on a terminal."""
    jobs = list(jobs)
    console = Console(stderr=True)
    with (
        Progress(console=console, transient=True, disable=not console.is_terminal) as bar,
        ThreadPoolExecutor(TOGETHER) as pool,
    ):
        task = bar.add_task(label, total=len(jobs))
        found = []
        for result in pool.map(one, jobs):
            found.append(result)
            bar.advance(task)
    return found


def solve(llm: LLM, examples: Sequence[Example], *, max_tokens: int = MAX_TOKENS) -> list[Answered]:
    """Answer and judge."""
    results = answer(llm, examples, max_tokens=max_tokens)
    return [
        Answered(example, result, judge(example, result.content, calls_of(result), result.reasoning))
        for example, result in zip(examples, results, strict=True)
    ]


def calls_of(result: ChatResult) -> list[tuple[str, Any]]:
    """The calls of an answer as checkers take them: name, and arguments decoded where they are JSON."""
    return [(call.name, _decoded(call.arguments)) for call in result.tool_calls]


def _decoded(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except ValueError:
        return {"not JSON": arguments}


def rate(answered: Sequence[Answered]) -> Interval:
    return wilson(sum(each.right for each in answered), len(answered))


def shown(interval: Interval, digits: int = 1) -> str:
    """A rate as "97.5 % (95.1 to 98.8)"."""
    return f"{interval.value:.{digits}%} ({100 * interval.low:.{digits}f} to {100 * interval.high:.{digits}f})"
