"""The same prompts with thinking off, High and Max: how many tokens each takes, and whether each is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from _tiny_tasks import MAX_TOKENS, checked, solve

from freehold import LLM
from freehold.stats import Interval, wilson
from freehold.train.data.example import EFFORTS, Example
from freehold.train.data.mixture import KINDS, generate


@dataclass(frozen=True)
class Row:
    """One prompt. tokens: of all that the model wrote, thinking included, by effort."""

    kind: str
    tokens: dict[str, int]
    thinking: dict[str, int]
    right: dict[str, bool]

    @property
    def in_order(self) -> bool:
        return self.tokens["none"] < self.tokens["high"] < self.tokens["max"]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def thinking_kinds() -> list[str]:
    """The kinds whose examples come with thinking."""
    return [kind for kind in KINDS if any(generate(kind, "train", 0, i).effort != "none" for i in range(40))]


def efforts_of(llm: LLM, count: int, seed: int) -> list[Row]:
    """About `count` prompts, as many of each kind that thinks, answered at each effort."""
    kinds = thinking_kinds()
    examples = [each for kind in kinds for each in checked(kind, -(-count // max(1, len(kinds))), seed)][:count]
    return answered_at(llm, examples)


def answered_at(llm: LLM, examples: Sequence[Example]) -> list[Row]:
    by_effort = {
        effort: solve(llm, [replace(example, effort=effort) for example in examples], max_tokens=2 * MAX_TOKENS)
        for effort in EFFORTS
    }
    return [
        Row(
            example.kind,
            {effort: found[i].result.usage.completion_tokens for effort, found in by_effort.items()},
            {effort: found[i].result.reasoning_tokens for effort, found in by_effort.items()},
            {effort: found[i].right for effort, found in by_effort.items()},
        )
        for i, example in enumerate(examples)
    ]


def in_order(rows: Sequence[Row]) -> Interval:
    return wilson(sum(row.in_order for row in rows), len(rows))
