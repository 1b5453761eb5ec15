"""Micro-dollars are exact, and a reservation is never less than what it is for."""

from __future__ import annotations

import pytest

from freehold.gateway.call import Price
from freehold.gateway.config import Prices
from freehold.gateway.prices import at_most, cost, price_of


@pytest.mark.parametrize(
    ("dollars", "micro"),
    [(0.0, 0), (0.15, 150_000), (0.1, 100_000), (2.0, 2_000_000), (0.0000015, 2), (75.123456, 75_123_456)],
)
def test_prices_are_read_as_they_are_written(dollars: float, micro: int) -> None:
    assert price_of(Prices(input=dollars)).input == micro


def test_cached_input_has_its_own_price_or_that_of_input() -> None:
    assert price_of(Prices(input=1.0)).cached_input is None
    price = price_of(Prices(input=1.0, cached_input=0.0, output=2.0))
    assert cost(price, 1000, 400, 10) == 600 + 20
    assert cost(price_of(Prices(input=1.0, output=2.0)), 1000, 400, 10) == 1000 + 20


def test_cached_tokens_are_at_most_the_input() -> None:
    assert cost(Price(input=1_000_000, cached_input=0), 10, 50, 0) == 0
    assert cost(Price(input=1_000_000, cached_input=0), 10, None, 0) == 10


def test_a_call_is_not_free_because_it_is_small() -> None:
    assert cost(Price(output=1), 0, 0, 1) == 1
    assert cost(Price(output=1_000_001), 0, 0, 1) == 2
    assert cost(Price(output=1_000_000), 0, 0, 1) == 1


def test_unknown_tokens_have_no_cost_but_where_all_is_free() -> None:
    assert cost(Price(input=1), None, None, 5) is None
    assert cost(Price(output=1), 5, None, None) is None
    assert cost(Price(), None, None, None) == 0


def test_at_most_rounds_up_and_takes_the_dearest_input() -> None:
    assert at_most(Price(output=1), 0, 1) == 1
    assert at_most(Price(input=1_000_000, cached_input=3_000_000), 10, 0) == 30
    assert at_most(Price(), 10**9, 10**9) == 0
