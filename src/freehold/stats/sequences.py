"""Bounds that hold at every look: of rates, their ratios, quantiles, means and scores that are watched as they grow.

A test that is made once is wrong with probability alpha. Made again at every look, it is wrong far more often. Here
every statement rests on an **e-process**: the wealth of a gambler who starts with 1 and bets against a hypothesis at
fair odds. If the hypothesis is true, the wealth ever passes 1/alpha with probability at most alpha (Ville 1939),
whenever one looks and whatever makes one stop. `log_*` functions give the logarithm of that wealth; a bound is the
hypothesis at the edge of those that the gambler has not yet made 1/alpha from. All bounds are one-sided: a pair of
them, each with alpha, holds with 1 - 2 alpha.

    rates          `log_odds_evidence`, `rate_lower`, `rate_upper`: exact, also for anything within 0..1
    two rates      `ratio_lower`: exact, whatever the common rate is and however it moves; `difference_upper`: as far as
                   the least evidence against any base rate is found: to about 1e-3 of its logarithm
    quantiles      `most_above`, `fewest_above`: exact; order statistics, by the number of values above
    scores         `log_score_evidence`, `score_lower`: exact, and sharp where scores vary little
    means          `log_normal_evidence`, `normal_distance`: in the limit of many units

**Why mixtures over a grid.** A gambler who knew the effect would bet on it. One who does not splits the stake between
the bets on a grid of effects, equally, and loses at most log(size of the grid). Any finite grid gives an exact
e-process, without integrals to approximate.

Correlated values: `design_effect` says how many values of a unit (a conversation) are worth one independent value;
counts are divided by it, as Rao & Scott do. Where each unit has one value, it is 1 and the bounds stay exact.

Sources: Ville (1939); Howard, Ramdas, McAuliffe & Sekhon (2021), "Time-uniform, nonparametric, nonasymptotic
confidence sequences" (sub-Bernoulli processes, the one-sided normal mixture); Howard & Ramdas (2022), "Sequential
estimation of quantiles"; Waudby-Smith & Ramdas (2024), "Estimating means of bounded random variables by betting";
Waudby-Smith, Arbour, Sinha, Kennedy & Ramdas (2024), "Time-uniform central limit theory and asymptotic confidence
sequences"; Lindon & Malek (2022), "Anytime-valid inference for multinomial count data"; Hoeffding (1963), theorem 4;
Rao & Scott (1992), "A simple method for the analysis of clustered binary data".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

# Bets on log odds ratios from 1.05 to 33, in even steps of their logarithm; and on shares of the largest stake.
_TILT_J: Floats = np.geomspace(0.05, 3.5, 20)
_UP_J: Floats = np.expm1(_TILT_J)
_DOWN_J: Floats = np.expm1(-_TILT_J)
_BETS_2J: Floats = np.stack([_UP_J, _DOWN_J])[:, None]
_TILTS_2J: Floats = np.stack([_TILT_J, -_TILT_J])
# Where the least evidence is looked for first: standard errors of a rate; parts of the way to another one; log odds of
# all rates there are. Then: parts of the way from the best one's left neighbour to the right one.
_ERRORS_P: Floats = np.array([-6.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0])
_PARTS_P: Floats = np.array([0.25, 0.5, 0.75, 0.9, 1.0])
_ALL_P: Floats = np.linspace(-18.0, 18.0, 10)
_EVEN_P: Floats = np.linspace(0.0, 1.0, 11)
_MIDDLE_P: Floats = np.array([-0.02, 0.0, 0.02])
_ROUNDS = 3  # so many times; the least is then known to 1e-3, and far closer where it is near 0
_SHORT = 1e-3  # log evidence that may be lacking at a bound
_TINY = 1e-9
_LEAST = 1e-3  # bounds of scores nearer to 0 than this part of the mean are given as 0
_STAKE_J: Floats = np.geomspace(0.02, 0.98, 20)
_STEPS, _CLOSE = 60, 1e-6  # of finding a root: at most so many, until the log evidence is so close


def log_odds_evidence(
    hits: float, trials: float | Floats, null: float | Floats, *, below: bool = False, design: float = 1.0
) -> float:
    """Log of the evidence that the rate of hits is above `null` (or below it).

    hits: their number, or the sum of values within 0..1. trials, null: one of each; or of each block [B], with `hits`
    over all of them. design: the design effect.

    With odds ratio r the factor r^x / (1 + (r - 1) null) of a value x within 0..1 has expectation at most 1 if the
    mean is at most `null` (r > 1) or at least `null` (r < 1), as r^x is convex in x (Hoeffding 1963).
    """
    return _log_mean_exp((hits * (-_TILT_J if below else _TILT_J) - _growth(trials, null, below)) / design)


def rate_lower(hits: float, trials: float, alpha: float, design: float = 1.0) -> float:
    """The lower bound of a rate: the largest one against which there is evidence of 1/alpha."""
    if hits <= 0:
        return 0.0
    needed = -math.log(alpha)
    return _root(lambda rate: log_odds_evidence(hits, trials, rate, design=design) - needed, 0.0, hits / trials)


def rate_upper(hits: float, trials: float, alpha: float, design: float = 1.0) -> float:
    """The upper bound of a rate."""
    return 1.0 - rate_lower(trials - hits, trials, alpha, design)


def difference_upper(
    hits: float, trials: float, base_hits: float, base_trials: float, alpha: float, design: float = 1.0
) -> float:
    """The upper bound of a rate less another one, `base`: the smallest difference from which on there is evidence of
    1/alpha against each: `log_difference_evidence`. 1 where there is none yet."""
    if not trials or not base_trials:
        return 1.0
    needed = -math.log(alpha)
    most = 1.0 - 4.0 * _TINY
    evidence = _Difference(hits, trials, base_hits, base_trials, design)

    def lacking(difference: float) -> float:
        return needed - evidence.least(difference, rounds=0)[0]

    if lacking(most) >= 0.0:
        return 1.0
    step = 0.25 / math.sqrt(trials)
    bound = _crossing(lacking, max(-most, hits / trials - base_hits / base_trials), most, step)
    for _ in range(_ROUNDS):  # so far, of a few base rates: now of the one against which there is least evidence
        least, rate_P = evidence.least(bound)
        if least > needed - _SHORT:
            break
        bound = _crossing(partial(evidence.lacking, needed, rate_P), bound, most, 0.1 * step)
    return bound if bound < most else 1.0


def log_difference_evidence(
    hits: float, trials: float, base_hits: float, base_trials: float, difference: float, design: float = 1.0
) -> float:
    """Log of the evidence that a rate is less than `difference` above another one, `base`; design: of both.

    Against each rate p that the base may have there are two gamblers, who multiply their wealth: one bets that the base
    is above p, the other that the first rate is below p + difference. The evidence is the least over all p. So what is
    not known of either rate adds up as variances do, not as the widths of two bounds.

    The second one puts half of the stake on what is hoped for: that both rates are p. No mixture is needed for that,
    as p and the difference fix the bet. The first one keeps half of the stake in hand, for where p is the base's rate.
    The least is searched for, and found within about 1e-3 of what it is.
    """
    return _Difference(hits, trials, base_hits, base_trials, design).least(difference)[0]


def ratio_lower(
    hits: float, events_B: ArrayLike, first_B: ArrayLike, other_B: ArrayLike, alpha: float, design: float = 1.0
) -> float:
    """The lower bound of how many times the first group's rate is the other's, up to 1e4: `log_ratio_evidence`."""
    if hits <= 0:
        return 0.0
    needed = -math.log(alpha)
    blocks = (np.asarray(events_B, np.float64), np.asarray(first_B, np.float64), np.asarray(other_B, np.float64))

    def excess(log_ratio: float) -> float:
        return log_ratio_evidence(hits, *blocks, ratio=math.exp(log_ratio), design=design) - needed

    most = math.log(1e4)
    return math.exp(_root(excess, -most, most)) if excess(-most) > 0 else 0.0


def log_ratio_evidence(
    hits: float,
    events_B: ArrayLike,
    first_B: ArrayLike,
    other_B: ArrayLike,
    *,
    ratio: float = 1.0,
    design: float = 1.0,
) -> float:
    """Log of the evidence that the first group's rate is more than `ratio` times the other's.

    The data come in blocks (what came between two looks): events_B in both groups together, of first_B and other_B
    trials. hits: events of the first group over all blocks.

    Given the events of a block, each fell into the first group with odds ratio * first / other, whatever the rate of
    that block is: a bad hour of both groups cannot be mistaken for a difference. For equal rates their number is
    hypergeometric, which Hoeffding's theorem 4 puts below the binomial that is bet against: exact for ratio 1, and for
    others where events are rare.
    """
    events, first, other = (np.asarray(each, np.float64) for each in (events_B, first_B, other_B))
    weighted = ratio * first
    null = np.divide(weighted, weighted + other, out=np.zeros_like(weighted), where=weighted + other > 0)
    return log_odds_evidence(hits, events, null, design=design)


def most_above(trials: float, level: float, alpha: float, design: float = 1.0) -> int:
    """The quantile of `level` is at least x wherever so many of the values, or more, lie above x: the lower bound.

    It may be more than there are values: then there is none yet. Howard & Ramdas (2022), section 3: x is a bound where
    the rate of values above it is.
    """
    growth_J = _growth(trials, 1.0 - level, below=False)
    return math.ceil(_hits_needed(growth_J, -math.log(alpha) * design, trials, trials * (1.0 - level)) - 1e-6)


def fewest_above(trials: float, level: float, alpha: float, design: float = 1.0) -> int:
    """The quantile of `level` is at most x wherever so many of the values, or fewer, lie above x; below 0: none yet."""
    growth_J = _growth(trials, level, below=False)
    return math.floor(trials - _hits_needed(growth_J, -math.log(alpha) * design, trials, trials * level) + 1e-6)


def log_score_evidence(counts: Mapping[float, int], null: float) -> float:
    """Log of the evidence that the mean of values within 0..1 is above `null`, 0 < null < 1. counts: how often each
    value came.

    The gambler stakes a fixed share s/null, s < 1, of the wealth on x - null: wealth is a product of factors
    1 + s (x/null - 1), which are never negative. With fixed shares the order of the values does not matter.
    Waudby-Smith & Ramdas (2024).
    """
    values_V = np.fromiter(counts, np.float64, len(counts))
    times_V = np.fromiter(counts.values(), np.float64, len(counts))
    return _log_mean_exp(np.log1p(_STAKE_J[:, None] * (values_V / null - 1.0)) @ times_V)


def score_lower(counts: Mapping[float, int], alpha: float) -> float:
    """The lower bound of the mean of values within 0..1."""
    total = sum(counts.values())
    mean = sum(value * times for value, times in counts.items()) / total if total else 0.0
    needed = -math.log(alpha)
    if mean <= 0.0 or log_score_evidence(counts, _LEAST * mean) < needed:
        return 0.0
    below = mean / total
    while below < mean and log_score_evidence(counts, mean - below) < needed:
        below *= 2.0
    low = max(mean - below, _LEAST * mean)
    return _root(lambda null: log_score_evidence(counts, null) - needed, low, min(mean, 1.0 - 1e-9))


def score_upper(counts: Mapping[float, int], alpha: float) -> float:
    """The upper bound of the mean of values within 0..1."""
    return 1.0 - score_lower({1.0 - value: times for value, times in counts.items()}, alpha)


def log_normal_evidence(distance: float, information: float, scale: float) -> float:
    """Log of the evidence that a mean is above a value that the estimate exceeds by `distance`.

    information: 1 / squared standard error of the estimate. scale: of the half-normal prior of the effect, in the same
    unit as distance: how large an effect the test is tuned for. Howard et al. (2021), one-sided normal mixture; valid
    for means of any distribution in the limit (Waudby-Smith et al. 2024), so not for a handful of units.
    """
    spread = information * scale * scale
    z = distance * information * scale / math.sqrt(1.0 + spread)
    return _log_twice_normal(z) + 0.5 * z * z - 0.5 * math.log1p(spread)


def normal_distance(information: float, scale: float, alpha: float) -> float:
    """How far the estimate must be above a value for evidence of 1/alpha: half the width of the sequence, one-sided."""
    if information <= 0:
        return math.inf
    needed, unit = -math.log(alpha), 1.0 / math.sqrt(information)
    high = unit
    while log_normal_evidence(high, information, scale) < needed:
        high *= 2.0
    return _root(lambda distance: needed - log_normal_evidence(distance, information, scale), 0.0, high)


def log_share_evidence(hits: float, trials: float, share: float) -> float:
    """Log of the evidence that hits do not come with probability `share`: more or fewer. For sample ratios."""
    up = log_odds_evidence(hits, trials, share)
    down = log_odds_evidence(hits, trials, share, below=True)
    return float(np.logaddexp(up, down) - math.log(2.0))


def design_effect(units: int, trials: float, hits: float, hits2: float, cross: float, trials2: float) -> float:
    """How many correlated trials are worth one independent one; at least 1. Rao & Scott (1992).

    Sums over units: trials n, hits x, x^2, x n and n^2. The variance of x - p n over that of independent trials.
    """
    rate = hits / trials if trials else 0.0
    independent = rate * (1.0 - rate) * trials
    if units < 2 or independent <= 0:
        return 1.0
    return max(1.0, (hits2 - 2.0 * rate * cross + rate * rate * trials2) / independent)


class _Difference:
    """The evidence that a rate is less than a difference above the base: see `log_difference_evidence`."""

    def __init__(self, hits: float, trials: float, base_hits: float, base_trials: float, design: float) -> None:
        self._hits, self._trials, self._design = hits, trials, design
        self._estimate = hits / trials
        self._rate = (base_hits + 0.5) / (base_trials + 1.0)
        error = math.sqrt(self._rate * (1.0 - self._rate) / base_trials * design)
        self._near_P = self._rate + _ERRORS_P * error
        self._trials_2 = np.array([base_trials, trials])[:, None, None]
        self._staked_2J = (np.array([[base_hits], [hits]]) * _TILTS_2J)[:, None]

    def of(self, difference: float, p_P: Floats) -> Floats:
        """[rates]: the log of it, if the base has each of some rates."""
        null_P = p_P + difference
        # The log odds ratio of null and p; where p is not below the null there is nothing to hope for.
        hoped_P = np.maximum(0.0, np.log(null_P * (1.0 - p_P) / (p_P * (1.0 - null_P))))
        tuned_P = (-hoped_P * self._hits - np.log1p(np.expm1(-hoped_P) * null_P) * self._trials) / self._design
        grown_2PJ = np.log1p(np.array([p_P, null_P])[:, :, None] * _BETS_2J) * self._trials_2
        logs_2PJ = (self._staked_2J - grown_2PJ) / self._design
        top_2P = logs_2PJ.max(axis=2)
        base_P, spread_P = top_2P + np.log(np.exp(logs_2PJ - top_2P[:, :, None]).sum(axis=2) / len(_TILT_J))
        found: Floats = np.logaddexp(tuned_P, spread_P) + np.logaddexp(0.0, base_P) - 2.0 * math.log(2.0)
        return found

    def lacking(self, needed: float, rate_P: Floats, difference: float) -> float:
        """How much less than needed there is, if the base has one rate. rate_P: that one."""
        low, high = _range(difference)
        return needed - float(self.of(difference, rate_P.clip(low, high))[0])

    def least(self, difference: float, rounds: int = _ROUNDS) -> tuple[float, Floats]:
        """The least of all that the base may have; and where it is (one rate).

        It falls with the rate until the base's bets are worth nothing more, and rises from there on. First it is looked
        for at rates close around the estimate, on the way to the rate that the other estimate gives the base, and
        coarsely everywhere else; then, some rounds, between the neighbours of the best one.
        """
        low, high = _range(difference)
        way_P = self._rate + _PARTS_P * (self._estimate - difference - self._rate)
        rates_P = np.concatenate([self._near_P, way_P, _rates(_ALL_P, low, high)]).clip(low, high)
        rates_P = _apart(rates_P)
        values_P = self.of(difference, rates_P)
        best = int(values_P.argmin())
        least, at_P = float(values_P[best]), rates_P[best : best + 1]
        if not rounds:
            return least, at_P
        odds_P = np.log((rates_P - low + _TINY) / (high - rates_P + _TINY))  # in which it is nearly a parabola
        for _ in range(rounds):
            odds_P = _closer(odds_P, values_P, best)
            rates_P = _rates(odds_P, low, high)
            values_P = self.of(difference, rates_P)
            best = int(values_P.argmin())
            if values_P[best] < least:
                least, at_P = float(values_P[best]), rates_P[best : best + 1]
        return least, at_P


def _range(difference: float) -> tuple[float, float]:
    """The rates that a base may have below one that is so much higher."""
    return _TINY + max(0.0, -difference), 1.0 - _TINY - max(0.0, difference)


def _rates(odds_P: Floats, low: float, high: float) -> Floats:
    """The rates within low..high of some log odds."""
    found: Floats = low + (high - low) / (1.0 + np.exp(-odds_P))
    return found


def _closer(at_P: Floats, values_P: Floats, best: int) -> Floats:
    """Points between the neighbours of the best (least) one: evenly, and where the parabola through the three has its
    least."""
    left, middle, right = at_P[max(0, best - 1)], at_P[best], at_P[min(best + 1, len(at_P) - 1)]
    before, after = middle - left, right - middle
    if before > 0.0 and after > 0.0:
        slope_before = (values_P[best - 1] - values_P[best]) / before
        slope_after = (values_P[best + 1] - values_P[best]) / after
        if slope_before + slope_after > 0.0:
            middle += 0.5 * (slope_before * after - slope_after * before) / (slope_before + slope_after)
    found: Floats = np.concatenate([left + (right - left) * _EVEN_P, middle + (right - left) * _MIDDLE_P])
    return _apart(found.clip(left, right))


def _apart(points: Floats) -> Floats:
    """Rising, without those that are next to another: between them there is nothing but rounding to compare."""
    points.sort()
    return np.concatenate([points[:1], points[1:][points[1:] - points[:-1] > _TINY]])


def _crossing(lacking: Callable[[float], float], low: float, high: float, step: float) -> float:
    """Where a falling function is 0, from low on, in steps that double: close to it false position is fast."""
    while low + step < high and lacking(low + step) > 0.0:
        low, step = low + step, 2.0 * step
    return _root(lacking, low, min(high, low + step), 0.5 * _SHORT)


def _growth(trials: float | Floats, null: float | Floats, below: bool) -> Floats:
    """[bets]: by how much each bet's factors must be divided for fairness, as a logarithm, over all trials."""
    bets_J = _DOWN_J if below else _UP_J
    if isinstance(null, np.ndarray):
        grown: Floats = np.log1p(np.multiply.outer(bets_J, null)) @ trials
        return grown
    return np.log1p(bets_J * null) * trials


def _hits_needed(growth_J: Floats, needed: float, trials: float, start: float) -> float:
    """The number of hits with evidence `needed`: Newton's method, on a convex increasing function."""
    hits = start
    for _ in range(_STEPS):
        logs_J = hits * _TILT_J - growth_J
        top = float(logs_J.max())
        weights_J = np.exp(logs_J - top)
        total = float(weights_J.sum())
        step = (top + math.log(total / len(_TILT_J)) - needed) * total / float(weights_J @ _TILT_J)
        hits -= step
        if abs(step) < _CLOSE:
            break
    return float(hits)


def _log_mean_exp(logs_J: Floats) -> float:
    return float(np.logaddexp.reduce(logs_J)) - math.log(len(logs_J))


def _log_twice_normal(z: float) -> float:
    """log(2 Phi(z)), also far below 0, where Phi itself is no longer a float."""
    if z > -30.0:
        return math.log(math.erfc(-z / math.sqrt(2.0)))
    return -0.5 * z * z - math.log(-z * math.sqrt(math.pi / 2.0))


def _root(excess: Callable[[float], float], low: float, high: float, close: float = _CLOSE) -> float:
    """Where a monotone function with excess(low) > 0 > excess(high) is 0, or so close: false position, Illinois
    method."""
    at_low, at_high = excess(low), excess(high)
    if at_low <= 0.0 or at_high >= 0.0:
        return low if at_low <= 0.0 else high
    at, side = low, 0
    for _ in range(_STEPS):
        at = (low * at_high - high * at_low) / (at_high - at_low)
        value = excess(at)
        if abs(value) < close or high - low < _CLOSE * _CLOSE:
            break
        if value > 0.0:
            low, at_low, at_high = at, value, at_high * (0.5 if side > 0 else 1.0)
            side = 1
        else:
            high, at_high, at_low = at, value, at_low * (0.5 if side < 0 else 1.0)
            side = -1
    return at
