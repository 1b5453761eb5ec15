"""Wrong schedulers: each breaks a promise to some of those who wait. `test_shares` must catch them all."""

from __future__ import annotations

from collections.abc import Sequence

from freehold.engine.request import Request
from freehold.engine.scheduler import Scheduler


def in_turn(prompts: Sequence[Request], budget: int) -> list[tuple[Request, int]]:
    """The whole budget to one after another."""
    given = []
    for prompt in prompts:
        count = min(budget, prompt.num_tokens - prompt.num_computed_tokens)
        if count:
            given.append((prompt, count))
            budget -= count
    return given


class FirstComeFirstServed(Scheduler):
    """A short prompt waits for all of a long one."""

    def _share(self, prompts: Sequence[Request], budget: int) -> list[tuple[Request, int]]:
        return in_turn(prompts, budget)


class ShortestFirst(Scheduler):
    """A long prompt starves while short ones keep coming."""

    def _share(self, prompts: Sequence[Request], budget: int) -> list[tuple[Request, int]]:
        return in_turn(sorted(prompts, key=lambda prompt: prompt.num_tokens - prompt.num_computed_tokens), budget)


class LatestFirst(Scheduler):
    """The oldest prompt starves."""

    def _share(self, prompts: Sequence[Request], budget: int) -> list[tuple[Request, int]]:
        return in_turn(prompts[::-1], budget)


class EqualSlices(Scheduler):
    """Cuts every prompt into slices that are too small to be computed well."""

    def _share(self, prompts: Sequence[Request], budget: int) -> list[tuple[Request, int]]:
        each = max(1, budget // len(prompts))
        return [(prompt, min(each, prompt.num_tokens - prompt.num_computed_tokens)) for prompt in prompts[:budget]]


class AlwaysWaits(Scheduler):
    """Lets only one prompt on in a step."""

    def _share(self, prompts: Sequence[Request], budget: int) -> list[tuple[Request, int]]:
        return in_turn(prompts[:1], budget)
