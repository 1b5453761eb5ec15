"""The same prompts with thinking off, High and Max: how many tokens each takes, and whether each is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from _tiny_tasks import MAX_TOKENS, answer, calls_of

from freehold import LLM
from freehold.serve.answers import ChatResult
from freehold.stats import Interval, wilson
from freehold.train.data.checks import judge_answer
from freehold.train.data.example import EFFORTS, Example
from freehold.train.data.mixture import KINDS, generate


@dataclass(frozen=True)
class Row:
    """One prompt. tokens: of all that the model wrote, thinking included, by effort."""

    kind: str
    tokens: dict[str, int]
    thinking: dict[str, int]
    right: dict[str, bool | None]

    @property
    def in_order(self) -> bool:
        return self.tokens["none"] < self.tokens["high"] < self.tokens["max"]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def thinking_kinds() -> list[str]:
    """The kinds whose answers are thought about when that is asked for."""
    return [kind for kind in KINDS if thinks(generate(kind, "train", 0, 0, effort="max"))]


def thinks(example: Example) -> bool:
    return bool(example.messages) and bool(example.messages[-1].get("reasoning_content"))


def efforts_of(llm: LLM, count: int, seed: int) -> list[Row]:
    """About `count` prompts, as many of each kind that thinks, answered at each effort."""
    kinds = thinking_kinds()
    each = -(-count // len(kinds))
    examples = [generate(kind, "test", seed, index, effort="max") for index in range(each) for kind in kinds]
    return answered_at(llm, [example for example in examples if thinks(example)][:count])


def answered_at(llm: LLM, examples: Sequence[Example]) -> list[Row]:
    by_effort = {effort: answer(llm, examples, max_tokens=2 * MAX_TOKENS, effort=effort) for effort in EFFORTS}
    return [
        Row(
            example.kind,
            {effort: found[i].usage.completion_tokens for effort, found in by_effort.items()},
            {effort: found[i].reasoning_tokens for effort, found in by_effort.items()},
            {effort: _right(example, found[i]) for effort, found in by_effort.items()},
        )
        for i, example in enumerate(examples)
    ]


def _right(example: Example, result: ChatResult) -> bool | None:
    """None where there is nothing to check."""
    if example.check is None:
        return None
    return judge_answer(example.check, result.content, calls_of(result)).right


def in_order(rows: Sequence[Row]) -> Interval:
    return wilson(sum(row.in_order for row in rows), len(rows))
