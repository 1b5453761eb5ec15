"""How sure a measured figure is: Wilson intervals of rates, and bootstrap intervals of means and of paired differences.

All intervals are two-sided, 95% unless said otherwise, and the same on every run: resampling is seeded.

Sources: E. B. Wilson (1927) for rates; B. Efron's percentile bootstrap, whole units (prompts, documents) resampled, so
that tokens of one document are not taken for independent ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 4000


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate, and the bounds of its confidence interval."""

    value: float
    low: float
    high: float

    def as_list(self) -> list[float]:
        """[value, low, high], for JSON."""
        return [self.value, self.low, self.high]

    def map(self, increasing: Callable[[float], float]) -> Interval:
        """The interval of an increasing function of the figure: `math.exp` makes a perplexity of a loss."""
        return Interval(increasing(self.value), increasing(self.low), increasing(self.high))


def wilson(right: int, trials: int, level: float = 0.95) -> Interval:
    """The rate right/trials. Unlike the normal approximation it stays within 0..1 and is not empty at 0 or at 1."""
    if not 0 <= right <= trials or trials < 1:
        raise ValueError(f"{right} right of {trials} is not a rate")
    z = NormalDist().inv_cdf(0.5 + level / 2)
    rate = right / trials
    centre = rate + z * z / (2 * trials)
    spread = z * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    low = 0.0 if right == 0 else (centre - spread) / scale  # exact at the ends, where rounding would leave 1e-17
    high = 1.0 if right == trials else (centre + spread) / scale
    return Interval(rate, low, high)


def mean_ratio(numerators: ArrayLike, denominators: ArrayLike, level: float = 0.95, seed: int = 0) -> Interval:
    """sum(numerators) / sum(denominators), units resampled whole: a loss per token from the sums of each document."""
    top, bottom = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    if top.shape != bottom.shape or top.ndim != 1 or not top.size or bottom.sum() <= 0:
        raise ValueError("a ratio needs as many numerators as denominators, and at least one")
    counts = _counts(top.size, seed)
    return _percentiles(float(top.sum() / bottom.sum()), counts @ top / (counts @ bottom), level)


def mean(values: ArrayLike, level: float = 0.95, seed: int = 0) -> Interval:
    """The mean of independent values."""
    array = np.asarray(values, np.float64)
    return mean_ratio(array, np.ones_like(array), level, seed)


def paired_difference(first: ArrayLike, second: ArrayLike, level: float = 0.95, seed: int = 0) -> Interval:
    """mean(first - second) of values measured on the same units, in the same order."""
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"{a.size} and {b.size} values are not pairs")
    return mean(a - b, level, seed)


def paired_ratio_difference(
    first: ArrayLike, second: ArrayLike, weights: ArrayLike, level: float = 0.95, seed: int = 0
) -> Interval:
    """sum(first - second) / sum(weights): how much two losses per token differ, from sums over the same documents."""
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"{a.size} and {b.size} values are not pairs")
    return mean_ratio(a - b, weights, level, seed)


def _counts(units: int, seed: int) -> NDArray[np.float64]:
    """[resamples, units]: how often each resample has each unit."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(units, np.full(units, 1 / units), RESAMPLES).astype(np.float64)


def _percentiles(value: float, resampled: NDArray[np.float64], level: float) -> Interval:
    edges: Sequence[float] = np.quantile(resampled, [0.5 - level / 2, 0.5 + level / 2]).tolist()
    return Interval(value, edges[0], edges[1])
