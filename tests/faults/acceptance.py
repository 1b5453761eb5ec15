"""Wrong acceptance rules: each gives tokens that are not distributed as the target says. `test_speculative_sampling`
must catch them all."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from freehold.engine.sampling_state import Row, draw
from freehold.engine.speculate import accept_or_resample


def always_accept(p_V: Row, q_V: Row, draft: int, uniform: Callable[[], float]) -> tuple[int, bool]:
    """Unless the target forbids it."""
    if p_V[draft] > 0:
        return draft, True
    return draw(p_V, uniform()), False


def resample_from_the_target(p_V: Row, q_V: Row, draft: int, uniform: Callable[[], float]) -> tuple[int, bool]:
    """A rejected draft is replaced by a token of p, not of what p has more than q."""
    if uniform() * q_V[draft] < p_V[draft]:
        return draft, True
    return draw(p_V, uniform()), False


def accept_the_likelier(p_V: Row, q_V: Row, draft: int, uniform: Callable[[], float]) -> tuple[int, bool]:
    """By comparing, without a random number."""
    if p_V[draft] >= q_V[draft]:
        return draft, True
    return draw(np.maximum(p_V - q_V, 0.0), uniform()), False


def forget_what_drafting_did(p_V: Row, q_V: Row, draft: int, uniform: Callable[[], float]) -> tuple[int, bool]:
    """As if every token that could be drafted had been equally likely to be."""
    return accept_or_resample(p_V, (q_V > 0).astype(q_V.dtype) / (q_V > 0).sum(), draft, uniform)


def half_as_often(p_V: Row, q_V: Row, draft: int, uniform: Callable[[], float]) -> tuple[int, bool]:
    """Right drafts are rejected by a coin, too, and still replaced as if q had had its say."""
    if uniform() < 0.5:
        return draw(np.maximum(p_V - q_V, 0.0) + 1e-12 * p_V, uniform()), False
    return accept_or_resample(p_V, q_V, draft, uniform)


WRONG_RULES = (
    always_accept,
    resample_from_the_target,
    accept_the_likelier,
    forget_what_drafting_did,
    half_as_often,
)
