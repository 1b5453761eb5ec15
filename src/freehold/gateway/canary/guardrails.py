"""One guardrail at one look: is the canary worse, is it shown to be within the margin, and what could be seen by now.

**Worse**: the lower bound of the effect is above 0. **Fine**: its upper bound is below the margin. Both bounds hold at
every look (`freehold.stats.sequences`). Effects are signed so that more is worse; relative for means and quantiles.

    rates      lower: the ratio of the rates, given the failures of both arms (`ratio_lower`); upper: of their
               difference (`difference_upper`)
    quantiles  bounds of the canary's quantile over those of the control's
    means      log of the ratio of means, arithmetic or geometric; scores: their difference; squared errors over
               sticky units
    pairs      differences of judged scores, by betting
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from freehold.gateway.canary.windows import Cell, Compared, edge
from freehold.stats import Interval
from freehold.stats.sequences import (
    difference_upper,
    fewest_above,
    log_odds_evidence,
    most_above,
    normal_distance,
    ratio_lower,
    score_lower,
    score_upper,
)

MIN_UNITS = 50
"""Units of an arm below which nothing is said of means: their bounds hold in the limit only."""
FOR_CONTROL = 0.1
"""Part of alpha that goes to the control's own bound, where there is one: it mostly has many more calls."""
POWER_Z = 0.8416
"""Standard errors between 50% and 80% power."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A guardrail at a look. control, canary: the figure in each arm; effect: the difference, with both bounds."""

    metric: str
    margin: float
    control: float
    canary: float
    effect: Interval

    @property
    def worse(self) -> bool:
        return self.effect.low > 0.0

    @property
    def fine(self) -> bool:
        return self.effect.high < self.margin


def judge(compared: Compared, margin: float, alpha_worse: float, alpha_fine: float) -> Finding:
    """The finding of a guardrail. alpha_worse, alpha_fine: probability that it is ever wrongly worse, wrongly fine."""
    by_kind: dict[str, Callable[..., Finding]] = {
        "rate": _rate,
        "quantile": _quantile,
        "mean": _mean,
        "geometric": _mean,
        "score": _mean,
        "pairs": _pairs,
    }
    return by_kind[compared.metric.kind](compared, margin, alpha_worse, alpha_fine)


def _nothing(compared: Compared, margin: float, control: float = 0.0, canary: float = 0.0) -> Finding:
    return Finding(compared.metric.name, margin, control, canary, Interval(canary - control, -math.inf, math.inf))


def _rate(compared: Compared, margin: float, alpha_worse: float, alpha_fine: float) -> Finding:
    control, canary, design = compared.control, compared.canary, compared.design
    if not control.trials or not canary.trials:
        return _nothing(compared, margin, control.mean, canary.mean)
    blocks = (compared.blocks.events_B, compared.blocks.canary_B, compared.blocks.control_B)
    ratio = ratio_lower(canary.total, *blocks, alpha_worse, design)
    base = control.mean or 1.0 / control.trials  # no failure yet: less than one in all its calls
    high = difference_upper(canary.total, canary.trials, control.total, control.trials, alpha_fine, design)
    effect = Interval(canary.mean - control.mean, (ratio - 1.0) * base, high)
    return Finding(compared.metric.name, margin, control.mean, canary.mean, effect)


def _quantile(compared: Compared, margin: float, alpha_worse: float, alpha_fine: float) -> Finding:
    level, design = compared.metric.level, compared.design
    if not compared.control.values or not compared.canary.values:
        return _nothing(compared, margin)
    control, canary = _Order(compared.control), _Order(compared.canary)
    low = canary.lower(level, (1 - FOR_CONTROL) * alpha_worse, design) / control.upper(
        level, FOR_CONTROL * alpha_worse, design
    )
    base = control.lower(level, FOR_CONTROL * alpha_fine, design)
    high = canary.upper(level, (1 - FOR_CONTROL) * alpha_fine, design) / base if base else math.inf
    middle = canary.quantile(level) / control.quantile(level)

    effect = Interval(middle - 1.0, low - 1.0, high - 1.0)
    return Finding(compared.metric.name, margin, control.quantile(level), canary.quantile(level), effect)


class _Order:
    """Order statistics of a cell's histogram, rounded to the safe side."""

    def __init__(self, cell: Cell) -> None:
        assert cell.histogram is not None
        self._at_most_V = np.cumsum(cell.histogram)
        self.count = int(self._at_most_V[-1])

    def quantile(self, level: float) -> float:
        return math.sqrt(edge(index := int(np.searchsorted(self._at_most_V, level * self.count))) * edge(index + 1))

    def lower(self, level: float, alpha: float, design: float) -> float:
        """The largest edge that has enough values above it; 0 if none has."""
        above = most_above(self.count, level, alpha, design)
        if above > self.count:
            return 0.0
        return edge(int(np.searchsorted(self._at_most_V, self.count - above, side="right")))

    def upper(self, level: float, alpha: float, design: float) -> float:
        """The smallest edge that has few enough values above it; infinite if none has."""
        above = fewest_above(self.count, level, alpha, design)
        if above < 0:
            return math.inf
        return edge(int(np.searchsorted(self._at_most_V, self.count - above)) + 1)


def _mean(compared: Compared, margin: float, alpha_worse: float, alpha_fine: float) -> Finding:
    control, canary = compared.control.mean, compared.canary.mean
    if compared.metric.kind == "geometric":
        control, canary = math.exp(control), math.exp(canary)
    effect, squared = _contrast(compared)
    if not squared:
        return _nothing(compared, margin, control, canary)
    scale, back = (math.log1p(margin), math.expm1) if compared.metric.relative else (margin, float)
    low = effect - normal_distance(1.0 / squared, scale, alpha_worse)
    high = effect + normal_distance(1.0 / squared, scale, alpha_fine)
    found = Interval(back(effect), back(low), back(high))
    return Finding(compared.metric.name, margin, control, canary, found)


def _contrast(compared: Compared) -> tuple[float, float]:
    """(effect, its squared standard error) of means: log of the ratio, or the loss of score; 0 error: too few units."""
    control, canary = compared.control, compared.canary
    if min(control.units, canary.units) < MIN_UNITS:
        return 0.0, 0.0
    squared = canary.squared_error + control.squared_error
    if compared.metric.kind == "score":
        return control.mean - canary.mean, squared
    if compared.metric.kind == "geometric":
        return canary.mean - control.mean, squared
    if min(control.total, canary.total) <= 0.0:
        return 0.0, 0.0
    squared = canary.squared_error / canary.mean**2 + control.squared_error / control.mean**2
    return math.log(canary.mean / control.mean), squared


def _pairs(compared: Compared, margin: float, alpha_worse: float, alpha_fine: float) -> Finding:
    if not compared.pairs:
        return _nothing(compared, margin)
    loss = _losses(compared)
    mean = sum(value * times for value, times in loss.items()) / sum(loss.values())
    low, high = score_lower(loss, alpha_worse), score_upper(loss, alpha_fine)
    effect = Interval(2.0 * mean - 1.0, 2.0 * low - 1.0, 2.0 * high - 1.0)
    return Finding(compared.metric.name, margin, 0.0, -effect.value, effect)


def _losses(compared: Compared) -> dict[float, int]:
    """How often each loss of score came, moved from -1..1 to 0..1."""
    return {(1.0 - difference) / 2.0: times for difference, times in compared.pairs.items()}


def detectable(compared: Compared, margin: float, alpha: float) -> float:
    """The smallest effect that would by now have been found worse with 80% probability; infinite: none would.

    margin: what the test of means is tuned for. alpha: of being wrongly worse.
    """
    kind = compared.metric.kind
    if kind == "rate":
        return _detectable_rate(compared, alpha)
    if kind == "quantile":
        return _detectable_quantile(compared, alpha)
    if kind == "pairs":
        return _detectable_loss(compared, alpha)
    _, squared = _contrast(compared)
    if not squared:
        return math.inf
    relative = compared.metric.relative
    scale = math.log1p(margin) if relative else margin
    effect = normal_distance(1.0 / squared, scale, alpha) + POWER_Z * math.sqrt(squared)
    return math.expm1(effect) if relative else effect


def _detectable_rate(compared: Compared, alpha: float) -> float:
    control, canary, design = compared.control, compared.canary, compared.design
    if not control.trials or not canary.trials:
        return math.inf
    share = canary.trials / (canary.trials + control.trials)

    def seen(more: float) -> bool:
        few = _unlucky(canary.trials, control.mean + more, design)
        return log_odds_evidence(few, few + control.total, share, design=design) >= -math.log(alpha)

    return _least(seen, 1.0 - control.mean)


def _detectable_quantile(compared: Compared, alpha: float) -> float:
    """So many more of the canary's calls beyond the control's quantile, as if all of them were slower by one factor."""
    level, design = compared.metric.level, compared.design
    if not compared.control.values or not compared.canary.values:
        return math.inf
    control, count = _Order(compared.control), compared.canary.values
    needed = -math.log((1 - FOR_CONTROL) * alpha)

    def seen(more: float) -> bool:
        few = _unlucky(count, 1.0 - level + more, design)
        return log_odds_evidence(few, count, 1.0 - level, design=design) >= needed

    beyond = _least(seen, level)
    if math.isinf(beyond):
        return beyond
    return control.upper(level, FOR_CONTROL * alpha, design) / control.quantile(level - beyond) - 1.0


def _detectable_loss(compared: Compared, alpha: float) -> float:
    loss = _losses(compared)
    total = sum(loss.values())
    if not total:
        return math.inf
    mean = sum(value * times for value, times in loss.items()) / total
    spread = math.sqrt(sum((value - mean) ** 2 * times for value, times in loss.items()) / total)
    low = score_lower(loss, alpha)
    return 2.0 * (mean - low + POWER_Z * spread / math.sqrt(total)) if low > 0.0 else math.inf


def _unlucky(trials: float, rate: float, design: float) -> float:
    """Hits that at least 80% of samples have."""
    return max(0.0, trials * rate - POWER_Z * math.sqrt(max(0.0, trials * rate * (1.0 - rate) * design)))


def _least(holds: Callable[[float], bool], most: float) -> float:
    """The smallest effect up to `most` for which it holds; infinite if for none."""
    if not holds(most):
        return math.inf
    low, high = 0.0, most
    for _ in range(20):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
