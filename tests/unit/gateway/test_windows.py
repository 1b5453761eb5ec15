"""What a window makes of rows and notes: sums per unit, intention to treat, pairs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from freehold.gateway.canary.windows import METRICS, Compared, Window, bucket, edge, histogram_of
from freehold.ledger import FAILURES, Note, Row
from tests.canarying import row


def window(*metrics: str) -> Window:
    return Window([METRICS[metric] for metric in metrics], "old", "new")


def one(metric: str, *rows: Row) -> Compared:
    made = window(metric)
    for each in rows:
        made.add(each)
    return made.metrics[0]


def test_every_failure_is_a_metric_of_its_own_and_an_error() -> None:
    for name in FAILURES:
        failed = row(1, "new", 0.0, error=name)
        assert one("error", failed).canary.total == 1
        assert one(name, failed).canary.total == 1
        assert one("refusal" if name == "cut" else "cut", failed).canary.total == (name == "cut" and 0)
    gone = row(1, "new", 0.0, error="client_gone")
    assert (one("error", gone).canary.trials, one("error", gone).canary.total) == (1, 0)


def test_what_was_never_tried_is_not_counted() -> None:
    made = window("error")
    assert not made.add(row(1, "new", 0.0, error="refused_here"))
    assert not made.add(row(2, "another", 0.0))
    assert not made.add(row(3, "new", 0.0, shadow_of="r9"))
    assert made.requests == [0, 0]


def test_a_fallback_hides_nothing() -> None:
    """The canary fails, the control answers: a failure of the canary, with the times that its user saw."""
    failed = row(1, "new", 0.0, error="connect", ttft=None, cost=None)
    rescued = row(2, "new", 0.0, attempt=1, served_arm="old", ttft=2.0, cost=700, unit="u1")
    errors, times, costs = (one(name, failed, rescued) for name in ("error", "ttft", "cost"))
    assert (errors.canary.trials, errors.canary.total) == (1, 1)
    assert math.exp(times.canary.mean) == pytest.approx(2.0)
    assert (costs.canary.trials, costs.canary.total) == (1, 700)
    assert not errors.control.trials


def test_an_arm_that_could_not_even_be_tried_has_failed() -> None:
    skipped = row(1, "new", 0.0, served_arm="old")
    assert one("error", skipped).canary.total == 1


def test_attempts_of_one_call_add_up_to_one_request() -> None:
    made = window("cost", "error")
    made.add(row(1, "new", 0.0, error="timeout", cost=300))
    made.add(row(2, "new", 0.0, attempt=1, unit="u1", cost=500))
    assert made.requests == [0, 1]
    assert (made.metrics[0].canary.trials, made.metrics[0].canary.total) == (1, 800)
    assert (made.metrics[1].canary.trials, made.metrics[1].canary.total) == (1, 1)


def test_rows_one_by_one_are_what_whole_units_are() -> None:
    """The simulations' short cut makes the same sums as the rows, clustered or not."""
    names = ("error", "ttft", "ttft_p95", "cost")
    generator = np.random.default_rng(4)
    slow, fast = window(*names), window(*names)
    first = 0
    for _ in range(3):
        units = np.cumsum(generator.random(200) < 0.4)
        units -= units[0]
        failed, ttft = generator.random(200) < 0.2, generator.lognormal(0, 0.5, 200)
        cost = generator.integers(1, 5000, 200)
        for index in range(200):
            more: dict[str, Any] = {"error": "http", "ttft": None} if failed[index] else {"ttft": float(ttft[index])}
            unit = f"u{first + units[index]}"
            slow.add(row(0, "old", 0.0, unit=unit, cost=int(cost[index]), **more))
        seen = np.where(failed, np.nan, ttft)
        fast.absorb(0, {"error": failed, "ttft": seen, "ttft_p95": seen, "cost": cost}, units)
        first += int(units[-1]) + 1
        slow.look()
        fast.look()
    assert slow.units == fast.units
    assert slow.requests == fast.requests
    for a, b in zip(slow.metrics, fast.metrics, strict=True):
        assert a.blocks == b.blocks
        assert a.reference == b.reference
        for name in ("units", "trials", "total", "total2", "cross", "trials2"):
            assert getattr(a.control, name) == pytest.approx(getattr(b.control, name)), (a.metric.name, name)
        if a.control.histogram is not None and b.control.histogram is not None:
            assert (a.control.histogram == b.control.histogram).all()
        assert a.design == pytest.approx(b.design)


def test_the_error_of_a_mean_is_that_of_units_not_of_calls() -> None:
    alone = one("cost", *(row(n, "old", 0.0, cost=100 * (n % 7)) for n in range(70))).control
    again = one("cost", *(row(n, "old", 0.0, cost=100 * (n // 4 % 7), unit=f"u{n // 4}") for n in range(280))).control
    assert again.mean == pytest.approx(alone.mean)
    assert again.squared_error == pytest.approx(alone.squared_error)
    values = [100 * (n % 7) for n in range(70)]
    assert alone.squared_error == pytest.approx(np.var(values, ddof=1) / 70)


def test_buckets_are_a_quarter_of_a_percent_wide() -> None:
    for value in (1e-9, 1e-5, 0.0123, 1.0, 99.0, 1e4):
        assert histogram_of([value])[bucket(value)] == 1
        assert value <= 1e-5 or edge(bucket(value)) <= value <= edge(bucket(value) + 1) * (1 + 1e-12)
    assert edge(101) / edge(100) == pytest.approx(1.0025, abs=1e-5)
    assert bucket(1e9) == len(histogram_of([1.0])) - 1


def test_scores_of_both_halves_make_a_pair_one_for_each_unit() -> None:
    made = window("quality")
    made.add(row(1, "old", 0.0))
    made.add(row(2, "new", 0.0, shadow_of="r1"))
    made.add(row(3, "new", 0.0, shadow_of="r9"))

    def say(row_id: str, value: float, unit: str, name: str = "judge.quality") -> None:
        made.note(Note(row_id=row_id, at=0.0, name=name, value=value), 0, unit)

    say("r1", 0.9, "u1")
    assert not made.metrics[0].pairs
    say("r2", 0.7, "u1", name="judge.groundedness")
    assert not made.metrics[0].pairs
    say("r2", 0.7, "u1")
    assert made.metrics[0].pairs == {-0.2: 1}
    say("r3", 0.5, "u9")
    say("r9", 0.4, "u9")
    assert made.metrics[0].pairs == {-0.2: 1, 0.1: 1}
    say("r2", 0.1, "u1")  # the same unit again
    say("r1", 0.2, "u1")
    assert sum(made.metrics[0].pairs.values()) == 2


def test_feedback_counts_for_the_arm_of_its_call() -> None:
    made = window("feedback")
    made.add(row(1, "new", 0.0))
    made.note(Note(row_id="r1", at=0.0, name="feedback", value=0.25), 1, "u1")
    assert (made.metrics[0].canary.trials, made.metrics[0].canary.total) == (1, 0.25)


def test_units_whose_calls_may_still_run_are_not_compared_in_number() -> None:
    """A slow canary's calls come late into the ledger: that must not look like an uneven split."""
    made = window("error")
    for n in range(100):
        made.add(row(n, "old", float(n), duration=1.0))
    assert made.arrived() == (100, 0)
    made.add(row(100, "new", 20.0, duration=80.0))
    assert made.arrived() == (21, 1)
