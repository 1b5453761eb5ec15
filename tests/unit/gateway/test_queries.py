"""What is asked of the ledger, against plain sums in Python; both databases give one answer."""

from __future__ import annotations

import math
import random
from statistics import mean

import pytest

from freehold.errors import InvalidRequest
from freehold.gateway.keeping.filters import Filter
from freehold.gateway.keeping.queries import GROUPS, difference, regressions, sums, tokens
from freehold.gateway.keeping.store import Store
from freehold.ledger import FAILURES, Row
from freehold.stats import Interval, wilson
from tests.unit.gateway.ledger_rows import NOON, full_row, row

REAL = Filter(shadows=False)


async def fill(store: Store, rows: list[Row]) -> None:
    for each in rows:
        store.append(each)
    await store.flush()


async def test_sums_are_those_of_the_rows(store: Store) -> None:
    rng = random.Random(1)
    rows = [
        row(
            request_id=f"r{n // 2}",  # two attempts each
            prompt_version=rng.choice("12"),
            key_id=rng.choice("ab"),
            error=rng.choice(["", "", "http", "client_gone"]),
            status=200,
            cost=rng.choice([None, 5, 2**40]),
            input_tokens=rng.choice([None, 7]),
            output_tokens=rng.randrange(50),
            shadow_of=rng.choice(["", "", "r"]),
        )
        for n in range(80)
    ]
    await fill(store, rows)
    real = [each for each in rows if not each.shadow_of]
    found = await sums(store, ["prompt_version", "key_id"], REAL)
    assert len(found) == 4
    assert [each.cost for each in found] == sorted((each.cost for each in found), reverse=True)
    for each in found:
        mine = [one for one in real if (one.prompt_version, one.key_id) == each.group]
        assert each.requests == len({one.request_id for one in mine})
        assert each.attempts == len(mine)
        assert each.failures == sum(one.error in FAILURES for one in mine)
        assert each.cost == sum(one.cost or 0 for one in mine)
        assert each.uncosted == sum(one.cost is None for one in mine)
        assert each.input_tokens == sum(one.input_tokens or 0 for one in mine)
    everything = await sums(store, ["alias"], Filter())
    assert everything[0].attempts == 80
    assert await sums(store, ["alias"], Filter(alias="none")) == []


async def test_tokens_are_of_requests_and_percentiles_by_rank(store: Store) -> None:
    rows = [row(request_id=f"r{n}", task="t", output_tokens=n) for n in range(1, 101)]
    rows.append(row(request_id="r1", task="t", output_tokens=1000))  # its second attempt
    rows.append(row(request_id="other", task="u", output_tokens=3))
    rows.append(row(request_id="unknown", task="u"))
    await fill(store, rows)
    first, second = await tokens(store, ["task"], "output_tokens", REAL)
    per_request = [1001, *range(2, 101)]
    assert (first.group, first.requests, first.mean) == (("t",), 100, mean(per_request))
    assert (first.p50, first.p95, first.largest) == (51, 96, 1001)
    assert (second.group, second.requests, second.p50, second.p95, second.largest) == (("u",), 1, 3, 3, 3)


@pytest.mark.parametrize("by", [[], ["prompt"], ["task", "task"], ["1; DROP TABLE calls"]])
async def test_only_known_groups_are_asked_for(store: Store, by: list[str]) -> None:
    with pytest.raises(InvalidRequest):
        await sums(store, by, REAL)
    with pytest.raises(InvalidRequest):
        await tokens(store, ["task"], "cost; --", REAL)


async def test_every_group_is_a_column(store: Store) -> None:
    await fill(store, [full_row()])
    assert len(await sums(store, GROUPS, Filter())) == 1


async def test_a_worse_version_is_seen_and_an_equal_one_is_not(store: Store) -> None:
    rng = random.Random(3)

    def calls(version: str, start: float, failing: float, output: float) -> list[Row]:
        return [
            row(
                at=NOON + start + n / 1000,
                request_id=f"{version}{n}",
                unit=f"u{n % 97}",
                prompt_name="p",
                prompt_version=version,
                error="http" if rng.random() < failing else "",
                output_tokens=round(rng.gauss(output, 20)),
                cost=100,
                ttft=rng.expovariate(2),
            )
            for n in range(600)
        ]

    await fill(store, [*calls("9", 0, 0.02, 200), *calls("10", 1, 0.12, 260), row(prompt_name="q", prompt_version="1")])
    found = {each.metric: each for each in await regressions(store, REAL)}
    assert set(found) == {"failures", "output_tokens", "cost", "ttft"}
    assert all(
        (each.before, each.after) == ("9", "10") for each in found.values()
    )  # in the order they came, not by name
    assert found["failures"].worse
    assert found["failures"].difference.low < 0.10 < found["failures"].difference.high
    assert found["output_tokens"].worse
    assert found["output_tokens"].difference.low < 60 < found["output_tokens"].difference.high
    assert found["ttft"].worse is None
    assert found["cost"].worse is None
    back = {each.metric: each for each in await regressions(store, REAL, "10", "9")}
    assert back["failures"].worse is False
    assert await regressions(store, REAL, "9", "none") == []
    with pytest.raises(InvalidRequest, match="both"):
        await regressions(store, REAL, "9")


def test_the_difference_of_rates_is_newcombes() -> None:
    # Newcombe (1998), table II, example (a): 56/70 and 48/80, method 10: 0.0524 to 0.3339.
    found = difference(wilson(48, 80), wilson(56, 70))
    assert math.isclose(found.low, 0.0524, abs_tol=5e-5)
    assert math.isclose(found.high, 0.3339, abs_tol=5e-5)
    assert difference(Interval(1, 1, 1), Interval(3, 3, 3)) == Interval(2, 2, 2)
