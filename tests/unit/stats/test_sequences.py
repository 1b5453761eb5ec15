"""Bounds that hold at every look: bets are fair, bounds are the edge of the evidence, and the truth stays inside."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from freehold.stats.sequences import (
    design_effect,
    difference_upper,
    fewest_above,
    log_difference_evidence,
    log_normal_evidence,
    log_odds_evidence,
    log_ratio_evidence,
    log_score_evidence,
    log_share_evidence,
    most_above,
    normal_distance,
    rate_lower,
    rate_upper,
    ratio_lower,
    score_lower,
    score_upper,
)

Case = tuple[int, int, int, int]  # hits and trials, and those of the base


def expected_wealth(log_wealth: Callable[[int], float], trials: int, rate: float) -> float:
    """Over all numbers of hits of `trials` independent trials."""
    return sum(
        math.comb(trials, hits) * rate**hits * (1 - rate) ** (trials - hits) * math.exp(log_wealth(hits))
        for hits in range(trials + 1)
    )


@pytest.mark.parametrize("null", [0.01, 0.3, 0.9])
@pytest.mark.parametrize("below", [False, True])
def test_a_bet_on_a_rate_is_fair_where_the_hypothesis_ends_and_loses_within_it(null: float, below: bool) -> None:
    def wealth(hits: int) -> float:
        return log_odds_evidence(hits, 30, null, below=below)

    assert expected_wealth(wealth, 30, null) == pytest.approx(1.0, rel=1e-9)
    within, beyond = (1.2, 0.8) if below else (0.8, 1.2)
    assert expected_wealth(wealth, 30, min(1.0, within * null)) < 1.0
    assert expected_wealth(wealth, 30, beyond * null if beyond * null < 1 else 1.0) > 1.0


def test_a_bet_on_values_within_0_and_1_is_not_unfair() -> None:
    """The sum of values of mean 0.3 that are not 0 or 1 varies less than that of hits: wealth is at most that."""
    values = (0.0, 0.3, 0.6)
    total = sum(math.exp(log_odds_evidence(sum(drawn), 4, 0.3)) / 3**4 for drawn in itertools.product(values, repeat=4))
    assert 0.5 < total < 1.0


def test_a_bet_on_equal_rates_is_fair_whatever_the_rate() -> None:
    """Given 7 failures in 10 and 25 calls, the first group's number is hypergeometric if the rates are equal."""
    first, other, events = 10, 25, 7

    def wealth(hits: int) -> float:
        return math.exp(log_ratio_evidence(hits, [events], [first], [other]))

    ways = [math.comb(first, hits) * math.comb(other, events - hits) for hits in range(events + 1)]
    assert 0.7 < sum(w * wealth(hits) for hits, w in enumerate(ways)) / sum(ways) <= 1.0
    assert wealth(7) > 20 > 1 > wealth(1)


def test_a_bad_hour_of_both_arms_is_no_evidence() -> None:
    """A pooled comparison is fooled where shares and failures move together; blocks are not."""
    events, canary, control, hits = [1, 60], [50, 50], [950, 50], 31
    assert log_ratio_evidence(hits, events, canary, control) < 1
    assert log_ratio_evidence(hits, [61], [100], [1000]) > 20


@pytest.mark.parametrize("null", [0.2, 0.5, 0.8])
def test_a_bet_on_scores_is_fair(null: float) -> None:
    """All sequences of five values of three kinds whose mean is the null."""
    values = (0.0, 0.5, 1.0)
    chances = {0.2: (0.7, 0.2, 0.1), 0.5: (0.3, 0.4, 0.3), 0.8: (0.1, 0.2, 0.7)}[null]
    total = 0.0
    for drawn in itertools.product(range(3), repeat=5):
        chance = math.prod(chances[index] for index in drawn)
        total += chance * math.exp(log_score_evidence(Counter(values[index] for index in drawn), null))
    assert total == pytest.approx(1.0, rel=1e-9)


def test_the_normal_mixture_is_the_integral_over_half_normal_effects() -> None:
    information, scale, distance = 40.0, 0.3, 0.25
    effects = np.linspace(0, 4, 400_001)
    prior = 2 * np.exp(-((effects / scale) ** 2) / 2) / (scale * math.sqrt(2 * math.pi))
    likelihood = np.exp(effects * distance * information - effects**2 * information / 2)
    integral = float(np.sum(prior * likelihood) * (effects[1] - effects[0]))
    assert math.exp(log_normal_evidence(distance, information, scale)) == pytest.approx(integral, rel=1e-4)
    assert log_normal_evidence(-20.0, information, scale) < -3  # far on the other side, where erfc is 0
    assert math.isfinite(log_normal_evidence(-20.0, information, scale))


def test_bounds_are_where_the_evidence_is_1_to_alpha() -> None:
    alpha, needed = 0.01, -math.log(0.01)
    low = rate_lower(30, 400, alpha)
    assert log_odds_evidence(30, 400, low) == pytest.approx(needed, abs=1e-5)
    high = rate_upper(30, 400, alpha)
    assert log_odds_evidence(30, 400, high, below=True) == pytest.approx(needed, abs=1e-5)
    ratio = ratio_lower(20, [20, 30], [50, 50], [950, 950], alpha)
    assert log_ratio_evidence(20, [20, 30], [50, 50], [950, 950], ratio=ratio) == pytest.approx(needed, abs=1e-5)
    distance = normal_distance(100.0, 0.1, alpha)
    assert log_normal_evidence(distance, 100.0, 0.1) == pytest.approx(needed, abs=1e-5)
    counts = {0.0: 10, 0.5: 50, 1.0: 40}
    assert log_score_evidence(counts, score_lower(counts, alpha)) == pytest.approx(needed, abs=1e-5)


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_ranks_of_a_quantile_are_the_first_with_enough_evidence(level: float) -> None:
    needed = -math.log(0.01)
    most, fewest = most_above(800, level, 0.01), fewest_above(800, level, 0.01)
    assert fewest < 800 * (1 - level) < most
    assert log_odds_evidence(most, 800, 1 - level) >= needed > log_odds_evidence(most - 1, 800, 1 - level)
    assert log_odds_evidence(800 - fewest, 800, level) >= needed > log_odds_evidence(799 - fewest, 800, level)


def test_few_values_have_no_bounds() -> None:
    assert most_above(3, 0.5, 0.001) > 3
    assert fewest_above(20, 0.95, 0.001) < 0
    assert rate_lower(0, 100, 0.05) == 0.0
    assert 0.9 < rate_upper(100, 100, 0.05) <= 1.0
    assert score_lower({}, 0.05) == 0.0
    assert score_upper({}, 0.05) == 1.0
    assert normal_distance(0.0, 1.0, 0.05) == math.inf
    assert ratio_lower(0, [3], [50], [950], 0.05) == 0.0


def test_no_hit_bounds_a_rate_about_as_the_rule_of_three() -> None:
    # One look of a fixed size gives 3/n for 95%; to hold at every look costs a factor.
    assert 3.0 < 1000 * rate_upper(0, 1000, 0.05) < 6.0


LOOKS = [20, 50, 100, 200, 400, 800, 1600]


def missed(bound: Callable[[np.random.Generator], bool], runs: int = 150) -> float:
    """How often a bound was wrong at any look."""
    return sum(bound(np.random.default_rng(seed)) for seed in range(runs)) / runs


def test_bounds_of_rates_hold_at_all_looks_where_repeated_tests_do_not() -> None:
    def wrong(generator: np.random.Generator) -> bool:
        hits = np.cumsum(generator.random(1600) < 0.03)
        return any(rate_lower(int(hits[n - 1]), n, 0.1) > 0.03 for n in LOOKS)

    def wrong_z(generator: np.random.Generator) -> bool:
        hits = np.cumsum(generator.random(1600) < 0.03)
        return any(hits[n - 1] - 0.03 * n > 1.2816 * math.sqrt(n * 0.03 * 0.97) for n in LOOKS)

    assert missed(wrong) <= 0.1
    assert missed(wrong_z) > 0.2


@pytest.mark.parametrize(
    ("base", "difference", "share"), [(0.01, 0.01, 0.05), (0.3, 0.05, 0.25), (0.05, -0.03, 0.5), (0.002, 0.01, 0.05)]
)
def test_the_bound_of_a_difference_holds_at_all_looks(base: float, difference: float, share: float) -> None:
    others = round(50 * (1 - share) / share)

    def wrong(generator: np.random.Generator) -> bool:
        hits = np.cumsum(generator.binomial(50, base + difference, 40))
        base_hits = np.cumsum(generator.binomial(others, base, 40))
        return any(
            log_difference_evidence(hits[n], 50 * n + 50, base_hits[n], others * (n + 1), difference) >= math.log(10)
            for n in range(40)
        )

    assert missed(wrong) <= 0.1


@pytest.mark.parametrize(("base", "difference", "trials"), [(0.05, 0.1, 30), (0.4, 0.2, 12), (0.3, -0.2, 12)])
def test_a_bet_on_a_difference_is_not_unfair(base: float, difference: float, trials: int) -> None:
    def wealth(hits: int, base_hits: int) -> float:
        return math.exp(log_difference_evidence(hits, trials, base_hits, 2 * trials, difference))

    def chance(hits: int, count: int, rate: float) -> float:
        return math.comb(count, hits) * rate**hits * (1 - rate) ** (count - hits)

    expected = sum(
        chance(hits, trials, base + difference) * chance(base_hits, 2 * trials, base) * wealth(hits, base_hits)
        for hits in range(trials + 1)
        for base_hits in range(2 * trials + 1)
    )
    assert 0.0 < expected <= 1.0


def test_the_bound_of_a_difference_is_sharper_than_two_bounds_apart() -> None:
    for hits, trials, base_hits, base_trials in ((10, 1000, 190, 19_000), (0, 500, 0, 9500), (40, 4000, 40, 4000)):
        both = difference_upper(hits, trials, base_hits, base_trials, 0.05)
        apart = rate_upper(hits, trials, 0.045) - rate_lower(base_hits, base_trials, 0.005)
        assert hits / trials - base_hits / base_trials < both < 0.9 * apart
        evidence = log_difference_evidence(hits, trials, base_hits, base_trials, both)
        assert evidence == pytest.approx(math.log(20), abs=1e-3)
        assert both < difference_upper(hits, trials, base_hits, base_trials, 0.05, design=2.0)
    assert difference_upper(0, 0, 1, 10, 0.05) == difference_upper(3, 3, 0, 0, 0.05) == 1.0
    assert difference_upper(2, 2, 0, 2, 0.05) == 1.0
    assert difference_upper(0, 1000, 1000, 1000, 0.05) < -0.9


def least_difference_evidence(case: Case, difference: float, design: float) -> float:
    """Against all rates that the base may have, each on its own: at thousands of them, then around the best."""
    hits, trials, base_hits, base_trials = case

    def against(rate: float) -> float:
        null = rate + difference
        hoped = max(0.0, math.log(null / rate) - math.log((1.0 - null) / (1.0 - rate)))
        tuned = (-hoped * hits - math.log1p(math.expm1(-hoped) * null) * trials) / design
        spread = log_odds_evidence(hits, trials, null, below=True, design=design)
        base = log_odds_evidence(base_hits, base_trials, rate, design=design)
        return float(np.logaddexp(tuned, spread) + np.logaddexp(0.0, base)) - 2.0 * math.log(2.0)

    low, high = max(0.0, -difference) + 1e-9, 1.0 - max(0.0, difference) - 1e-9
    rates = np.concatenate([np.linspace(low, high, 800), low + np.geomspace(1e-8, high - low, 800)]).clip(low, high)
    rates.sort()
    best = int(np.argmin([against(rate) for rate in rates]))
    return min(map(against, np.linspace(rates[max(0, best - 2)], rates[min(best + 2, len(rates) - 1)], 400)))


@pytest.mark.parametrize("design", [1.0, 3.0])
@pytest.mark.parametrize(
    "case",
    [
        (40, 4000, 5, 100),  # most calls go to the canary: the least is far below the estimate of the base
        (300, 10_000, 2, 50),
        (3, 3000, 0, 60),
        (0, 500, 0, 9500),  # no failures in the base: the least is far above its estimate
        (10, 1000, 190, 19_000),
        (500, 1000, 500, 1000),
        (99, 100, 100, 100),
        (400, 40_000, 40, 4000),
    ],
)
def test_the_evidence_of_a_difference_is_the_least_over_all_base_rates(case: Case, design: float) -> None:
    hits, trials, base_hits, base_trials = case
    bound = difference_upper(*case, 0.05, design)
    assert least_difference_evidence(case, bound, design) == pytest.approx(math.log(20), abs=3e-3)
    for further in (-0.02, 0.0, 0.01, 0.05):
        difference = hits / trials - base_hits / base_trials + further
        dense = least_difference_evidence(case, difference, design)
        assert log_difference_evidence(*case, difference, design) == pytest.approx(dense, abs=3e-3)


def test_bounds_of_quantiles_hold_at_all_looks() -> None:
    def wrong(generator: np.random.Generator) -> bool:
        above = np.cumsum(generator.random(1600) < 0.05)  # values above the true 95th percentile
        return any(above[n - 1] >= most_above(n, 0.95, 0.1) for n in LOOKS)

    assert missed(wrong) <= 0.1


def test_bounds_of_scores_hold_at_all_looks_and_are_sharp_where_scores_vary_little() -> None:
    def draw(generator: np.random.Generator) -> list[float]:
        return generator.choice([0.45, 0.5, 0.55], 1600).tolist()

    def wrong(generator: np.random.Generator) -> bool:
        values = draw(generator)
        return any(score_lower(Counter(values[:n]), 0.1) > 0.5 for n in LOOKS)

    assert missed(wrong, 100) <= 0.1
    values = draw(np.random.default_rng(7))
    assert 0.49 < score_lower(Counter(values), 0.05) < 0.5
    assert rate_lower(sum(values), len(values), 0.05) < 0.48  # bets that know only that values are within 0..1


def test_bounds_of_means_hold_at_all_looks() -> None:
    def wrong(generator: np.random.Generator) -> bool:
        values = generator.exponential(1.0, 1600)
        return any(values[:n].mean() - normal_distance(n / values[:n].var(), 0.1, 0.1) > 1.0 for n in LOOKS if n >= 50)

    assert missed(wrong) <= 0.1


def test_uneven_shares_are_seen_both_ways() -> None:
    assert log_share_evidence(50, 1000, 0.05) < 0
    assert log_share_evidence(90, 1000, 0.05) > math.log(1000)
    assert log_share_evidence(18, 1000, 0.05) > math.log(1000)
    rates = [log_share_evidence(hits, 30, 0.3) for hits in range(31)]
    assert expected_wealth(lambda hits: rates[hits], 30, 0.3) == pytest.approx(1.0, rel=1e-9)


def test_what_is_said_four_times_counts_once() -> None:
    once = np.random.default_rng(3).random(2000) < 0.1
    trials, hits = np.full(2000, 4.0), 4.0 * once
    effect = design_effect(2000, trials.sum(), hits.sum(), hits @ hits, hits @ trials, trials @ trials)
    assert effect == pytest.approx(4.0, rel=1e-9)
    ones = np.ones(2000)
    assert design_effect(2000, 2000, once.sum(), once.sum(), once.sum(), ones @ ones) == pytest.approx(1.0)
    assert design_effect(1, 10, 3, 9, 30, 100) == 1.0
    assert rate_lower(hits.sum(), 8000, 0.05, effect) == pytest.approx(rate_lower(once.sum(), 2000, 0.05), rel=1e-6)
