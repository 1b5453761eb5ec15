"""Cost and crossover: exact where they can be, monotone where they must be, and refusing what makes no sense."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from freehold.errors import InvalidRequest
from freehold.plan.cost import Economics, Weights, cost_at, crossing, crossover, curve, gpu_hour, month_bill
from freehold.plan.hardware import gpu
from freehold.plan.prices import (
    HOURS_A_MONTH,
    Api,
    Tokens,
    api,
    apis,
    owning,
    owning_with,
    profile,
    profiles,
    staff_a_month,
)
from freehold.plan.types import Figure, Source

MIX = Tokens(8192, 0, 1024)
WEIGHTS = Weights(uncached=1.0, cached=0.05, output=20.0)
MONTH = HOURS_A_MONTH * 3600


def economics(**changes: object) -> Economics:
    base = Economics(
        hour=Figure.exact(32.0, "test"),
        capacity=Figure.exact(852 * 8 / 9216, "test"),
        utilisation=1.0,
        spare=0,
        staff=0.0,
        tokens=MIX,
        gpus=8,
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def test_published_illustration() -> None:
    """8 x H200 at $4.00, 852 tokens a second and GPU: 13.5 billion tokens a month against the list price, never against
    $1.16 a million.
    """
    found = crossover(economics(), api("z.ai glm-5.2")).expected.first
    assert found is not None
    assert found * 9216 == pytest.approx(13.5e9, rel=0.01)
    cheap = Api("cheap", "", "", "", 1.16, 1.16, None, Source("", ""))
    assert crossover(economics(), cheap).expected.first is None


def brute(model: Economics, price: float, volumes: list[float]) -> list[bool]:
    return [month_bill(model, volume).value <= price * volume * (1 + 1e-9) for volume in volumes]


prices = st.floats(0.001, 0.2)


@given(
    price=prices,
    spare=st.integers(0, 2),
    staff=st.floats(0, 50_000),
    rate=st.floats(5, 100),
    capacity=st.floats(0.2, 3),
)
def test_the_crossing_is_where_the_bills_cross(
    price: float, spare: int, staff: float, rate: float, capacity: float
) -> None:
    model = economics(
        hour=Figure.exact(rate, ""), capacity=Figure.exact(capacity, ""), spare=spare, staff=staff, utilisation=0.5
    )
    found = crossing(model, price, hour=rate, capacity=capacity)
    replica = capacity * 0.5 * MONTH
    if found.first is None or found.settled is None:
        for used in (1, 10, 1000):
            assert month_bill(model, used * replica).value > price * used * replica * (1 - 1e-9)
        return
    assert found.first <= found.settled
    assert brute(model, price, [found.first * (1 + 1e-6)]) == [True]
    below = [found.first * share for share in (0.1, 0.5, 0.9, 1 - 1e-6)]
    assert not any(brute(model, price, below))
    above = [found.settled * share for share in (1 + 1e-6, 1.1, 1.5, 2, 3.3, 10, 100)]
    assert all(brute(model, price, above))


@given(price=prices, more=st.floats(1, 3))
def test_cost_and_crossing_are_monotone_in_price(price: float, more: float) -> None:
    dear = economics(hour=economics().hour.scaled(more))
    assert cost_at(dear, WEIGHTS, 1e6).per_hour.value >= cost_at(economics(), WEIGHTS, 1e6).per_hour.value
    first, later = (
        crossing(item, price, hour=item.hour.value, capacity=item.capacity.value).first for item in (economics(), dear)
    )
    assert later is None or (first is not None and first <= later)
    cheaper_api = crossing(economics(), price / more, hour=32, capacity=economics().capacity.value).first
    assert cheaper_api is None or (first is not None and first <= cheaper_api * (1 + 1e-12))


@given(
    requests=st.floats(1, 1e8),
    cached=st.floats(0, 8192),
    output=st.floats(1, 100_000),
    weight=st.tuples(st.floats(0.1, 10), st.floats(0, 1), st.floats(0.1, 100)),
)
def test_the_bill_is_divided_without_rest(
    requests: float, cached: float, output: float, weight: tuple[float, float, float]
) -> None:
    tokens = Tokens(8192, cached, output)
    cost = cost_at(economics(tokens=tokens, staff=1000.0), Weights(*weight), requests)
    divided = tokens.uncached * cost.per_mtok_input.value + tokens.cached * cost.per_mtok_cached.value
    divided += tokens.output * cost.per_mtok_output.value
    assert divided / 1e6 * requests == pytest.approx(cost.per_hour.value * HOURS_A_MONTH, rel=1e-9)
    whole = cost.per_mtok_whole.value * tokens.output / 1e6 * requests
    assert whole == pytest.approx(cost.per_hour.value * HOURS_A_MONTH, rel=1e-9)


def test_a_task_costs_what_its_tokens_do() -> None:
    plain = cost_at(economics(), WEIGHTS, 1e6, task_output=43_000)
    assert plain.per_task is not None
    assert plain.per_task.value == pytest.approx(plain.per_hour.value * HOURS_A_MONTH / 1e6 * 43_000 / 1024)


def test_a_model_that_needs_fewer_tokens_is_harder_to_beat() -> None:
    full, half = (crossover(economics(), api("z.ai glm-5.2"), token_ratio=ratio) for ratio in (1.0, 0.5))
    assert half.per_request < full.per_request
    assert half.expected.first is None or (full.expected.first or math.inf) < half.expected.first


def test_a_spare_and_staff_are_paid_at_any_volume() -> None:
    bill = month_bill(economics(spare=1, staff=5000.0), 1.0)
    assert bill.value == pytest.approx(2 * 32 * HOURS_A_MONTH + 5000)


def test_the_interval_holds_the_curve() -> None:
    wide = economics(hour=Figure(32, 20, 56, "measured", ""), capacity=Figure(0.74, 0.6, 0.9, "roofline", ""))
    for point in curve(wide, 0.016, [1e3, 1e5, 1e6, 1e7]):
        assert point.low <= point.ours <= point.high
        assert point.api == pytest.approx(0.016 / 1024 * 1e6)
    found = crossover(wide, api("z.ai glm-5.2"))
    assert found.best.first is not None
    assert found.worst.first is None


def test_owning_is_depreciation_power_and_room() -> None:
    rule = owning_with(capital=0.0, upkeep=0.0, rack=0.0, spread=0.0, chassis=0.0)
    h200 = gpu("h200")
    paid = gpu_hour(h200, "own", rule, price=35_064.0)
    power = h200.power * rule.server * rule.busy * rule.pue * rule.kwh / 1000
    assert paid.value == pytest.approx(35_064 / rule.years / 8766 + power)
    assert gpu_hour(h200, "own", owning()).value < gpu_hour(h200, "rent", owning()).value


def test_what_is_not_known_is_asked_for() -> None:
    with pytest.raises(InvalidRequest, match="no rent is known for MI355X; give --gpu-price"):
        gpu_hour(gpu("mi355x"), "rent", owning())
    assert gpu_hour(gpu("mi355x"), "rent", owning(), price=3.0).value == 3.0
    assert "owning: " in gpu_hour(gpu("mi355x"), "own", owning()).source


@pytest.mark.parametrize("price", [-1.0, math.nan, math.inf])
def test_prices_are_not_negative(price: float) -> None:
    with pytest.raises(InvalidRequest, match="not negative"):
        gpu_hour(gpu("h200"), "rent", owning(), price=price)
    with pytest.raises(InvalidRequest):
        Api("", "", "", "", price, 1.0, None, Source("", ""))
    with pytest.raises(InvalidRequest, match="kwh"):
        owning_with(kwh=price)
    with pytest.raises(InvalidRequest):
        staff_a_month(engineer=price)


def test_other_nonsense_is_refused() -> None:
    for make in (
        lambda: economics(utilisation=0.0),
        lambda: economics(utilisation=1.1),
        lambda: economics(spare=-1),
        lambda: Tokens(10, 11, 1),
        lambda: Tokens(10, 0, 0),
        lambda: owning_with(years=0.0),
        lambda: owning_with(pue=0.9),
        lambda: crossover(economics(), api("z.ai glm-5.2"), token_ratio=0.0),
        lambda: api("z.ai"),
        lambda: api("glm-9"),
        lambda: api("1/2/x"),
        lambda: profile("night"),
    ):
        with pytest.raises(InvalidRequest):
            make()  # type: ignore[no-untyped-call]


def test_apis_by_name_part_and_price() -> None:
    assert api("opus-5.5").provider == "Anthropic"
    given = api("1.4/0.26/4.4")
    assert given.of(Tokens(8192, 4096, 1024)) == pytest.approx(api("z.ai glm-5.2").of(Tokens(8192, 4096, 1024)))
    assert api("1.4/4.4").cached is None
    assert api("scaleway glm-5.2").of(Tokens(10, 10, 1)) == pytest.approx((10 * 1.8 + 5.5) / 1e6)


def test_every_price_and_profile_has_a_source() -> None:
    assert all(item.source.where and item.source.date for item in apis().values())
    assert all(item.source and 0 < item.mean <= 1 for item in profiles().values())
    assert profile("office").mean < profile("global").mean < profile("flat").mean == 1
