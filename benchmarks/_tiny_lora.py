"""An adapter for a task that the model has not seen: what it gains there, loses elsewhere, and how long it takes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from _new_task import SETTINGS, TRAINED_ON, adapt, orders
from _tiny_tasks import checked, open_model, solve

from freehold import LLM
from freehold.stats import Interval, paired_difference
from freehold.train.data.example import Example
from freehold.train.data.mixture import KINDS


@dataclass(frozen=True)
class Outcome:
    """Right answers by prompt, before and after, and the differences in points (per cent of prompts)."""

    seconds: float
    chats: int
    task_before: list[int]
    task_after: list[int]
    general_before: list[int]
    general_after: list[int]

    @property
    def gained(self) -> Interval:
        return _points(self.task_after, self.task_before)

    @property
    def lost(self) -> Interval:
        return _points(self.general_before, self.general_after)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"gained": self.gained.as_list(), "lost": self.lost.as_list()}


def measure(
    checkpoint: Path, scratch: Path, prompts: int, epochs: float | None = None, threads: int | None = None
) -> Outcome:
    """Train and merge the adapter; `prompts` of the task, and as many of all kinds together, before and after.

    epochs: other than what suits a user.
    """
    task, general = orders("test", prompts), general_set(prompts)
    with open_model(checkpoint, threads=threads) as llm:
        before = _right(llm, task), _right(llm, general)
    adapted = adapt(checkpoint, scratch, settings=None if epochs is None else replace(SETTINGS, epochs=epochs))
    with open_model(adapted.merged, threads=threads) as llm:
        after = _right(llm, task), _right(llm, general)
    return Outcome(adapted.seconds, TRAINED_ON, before[0], after[0], before[1], after[1])


def general_set(count: int) -> list[Example]:
    """Prompts of every kind that can be checked, as many of each."""
    found: list[list[Example]] = []
    for kind in KINDS:
        try:
            found.append(checked(kind, -(-count // 4)))
        except ValueError:
            continue  # nothing of this kind can be checked
    return [example for examples in zip(*found, strict=True) for example in examples][:count]


def _right(llm: LLM, examples: list[Example]) -> list[int]:
    return [int(each.right) for each in solve(llm, examples)]


def _points(first: list[int], second: list[int]) -> Interval:
    return paired_difference(100 * np.array(first), 100 * np.array(second))
