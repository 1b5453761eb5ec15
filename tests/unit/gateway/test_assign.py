"""Keyed points, weighted rendezvous, and conversations that stay where they began."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from freehold.gateway.routing.assign import Pins, Points, ranking
from tests.routing import SECRET


def test_points_are_the_same_everywhere() -> None:
    # Another gateway, another release and another machine must agree; so these values never change.
    points = Points(SECRET, "experiment/int4")
    assert [points(unit) for unit in ("", "a", "conversation-7")] == [
        0.08952463907255626,
        0.37538044743994503,
        0.6532820655202326,
    ]


def test_secret_and_salt_make_other_points() -> None:
    unit = "u"
    found = {Points(key, salt)(unit) for key in (SECRET, SECRET[::-1]) for salt in ("a", "b")}
    assert len(found) == 4


@pytest.mark.parametrize("secret", [b"", b"short", bytes(65)])
def test_a_weak_secret_is_refused(secret: bytes) -> None:
    with pytest.raises(ValueError, match="16 to 64 bytes"):
        Points(secret, "x")


def test_points_are_even() -> None:
    points = Points(SECRET, "even")
    tenths = Counter(int(points(f"u{number}") * 10) for number in range(20_000))
    # Five standard deviations of a tenth's count.
    assert all(abs(tenths[tenth] - 2000) < 5 * math.sqrt(20_000 * 0.1 * 0.9) for tenth in range(10))


def test_experiments_divide_the_units_independently() -> None:
    first, second = Points(SECRET, "experiment/a"), Points(SECRET, "experiment/b")
    both = sum(first(unit) < 0.3 and second(unit) < 0.3 for unit in map(str, range(20_000)))
    assert abs(both - 1800) < 5 * math.sqrt(20_000 * 0.09 * 0.91)


def test_weights_are_shares() -> None:
    weights = {"a": 1.0, "b": 3.0, "c": 0.0, "d": 6.0}
    arms = [(Points(SECRET, name), weight, name) for name, weight in weights.items()]
    found = Counter(ranking(arms, str(unit))[0] for unit in range(20_000))
    assert found["c"] == 0
    for name, weight in weights.items():
        assert abs(found[name] - 2000 * weight) < 5 * math.sqrt(20_000 * 0.25)


def test_the_ranking_without_its_first_is_that_of_the_others() -> None:
    arms = [(Points(SECRET, name), weight, name) for name, weight in (("a", 1.0), ("b", 2.0), ("c", 0.5))]
    for unit in map(str, range(200)):
        first, *others = ranking(arms, unit)
        assert ranking([arm for arm in arms if arm[2] != first], unit) == others


def test_one_arm_without_weight_is_none() -> None:
    assert ranking([(Points(SECRET, "a"), 0.0, "a")], "u") == []


def test_pins_end_when_a_conversation_is_idle() -> None:
    pins = Pins(idle_seconds=60)
    pins.pin("c", 0)
    assert pins.holds("c", 60)
    assert not pins.holds("c", 61)
    assert not pins.holds("other", 0)
    pins.pin("c", 50)
    assert pins.holds("c", 110)


def test_pins_are_bounded_by_number_and_age() -> None:
    pins = Pins(idle_seconds=60, most=3)
    for number in range(10):
        pins.pin(str(number), number)
    assert len(pins) == 3
    assert pins.holds("7", 10)
    assert not pins.holds("6", 10)
    pins.pin("late", 1000)
    assert len(pins) == 1


def test_a_late_row_does_not_make_a_pin_older() -> None:
    pins = Pins(idle_seconds=60)
    pins.pin("c", 100)
    pins.pin("c", 50)
    assert pins.holds("c", 150)


def test_what_is_heard_of_elsewhere_is_remembered_in_order_and_takes_no_place_from_the_living() -> None:
    pins = Pins(idle_seconds=60, most=4)
    pins.pin("living", 100.0)
    pins.pin("also", 101.0)
    pins.recall([("old", 50.0), ("older", 45.0), ("oldest", 44.0), ("old", 43.0), ("living", 70.0)])
    assert list(pins.living(101.0).items()) == [("older", 45.0), ("old", 50.0), ("living", 100.0), ("also", 101.0)]
    pins.recall([("living", 102.0)])  # on another gateway
    pins.pin("new", 103.0)
    assert list(pins.living(103.0)) == ["old", "also", "living", "new"]
