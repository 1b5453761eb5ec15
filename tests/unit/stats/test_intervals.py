"""Intervals: known values, coverage by simulation, and what they must refuse."""

from __future__ import annotations

import math

import numpy as np
import pytest

from freehold.stats import Interval, mean, mean_ratio, paired_difference, paired_ratio_difference, wilson


def test_wilson_gives_the_published_values() -> None:
    # Newcombe (1998), table I, method 3: 81/263, 15/148, 0/20, 1/29.
    for right, trials, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)):
        found = wilson(right, trials)
        assert found.low == pytest.approx(low, abs=6e-5)
        assert found.high == pytest.approx(high, abs=6e-5)


def test_wilson_at_the_ends_is_not_empty() -> None:
    assert wilson(50, 50).high == 1.0
    assert 0.9 < wilson(50, 50).low < 0.95
    assert wilson(0, 50).low == 0.0


@pytest.mark.parametrize(("right", "trials"), [(-1, 5), (6, 5), (0, 0)])
def test_what_is_no_rate_is_refused(right: int, trials: int) -> None:
    with pytest.raises(ValueError, match="not a rate"):
        wilson(right, trials)


def test_bootstrap_covers_the_true_mean_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(100):
        found = mean(generator.exponential(2.0, 80))
        covered += found.low <= 2.0 <= found.high
    assert 86 <= covered <= 100


def test_documents_are_resampled_whole() -> None:
    """Ten documents of a thousand equal tokens each say no more than ten tokens."""
    losses = np.array([1.0, 3.0] * 5)
    few = mean_ratio(losses, np.ones(10))
    many = mean_ratio(losses * 1000, np.full(10, 1000.0))
    assert many.value == few.value == 2.0
    assert many.high - many.low == pytest.approx(few.high - few.low)
    assert many.high - many.low > 0.8


def test_pairs_see_what_two_intervals_do_not() -> None:
    generator = np.random.default_rng(2)
    base = generator.normal(0, 10, 200)
    better = base - 0.5 + generator.normal(0, 0.1, 200)
    found = paired_difference(better, base)
    assert found.high < 0
    assert found.value == pytest.approx(-0.5, abs=0.05)
    weighted = paired_ratio_difference(better, base, np.full(200, 4.0))
    assert weighted.value == pytest.approx(found.value / 4)


def test_unequal_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="not pairs"):
        paired_difference([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="as many"):
        mean_ratio([1.0], [1.0, 1.0])


def test_an_interval_maps_through_an_increasing_function() -> None:
    assert Interval(0.0, -1.0, 1.0).map(math.exp).as_list() == [1.0, math.exp(-1), math.e]
