"""Learning-rate schedules."""

from __future__ import annotations

import pytest

from freehold.errors import InvalidRequest
from freehold.train.schedule import Schedule


def test_wsd_warms_up_holds_and_decays() -> None:
    factors = [Schedule("wsd", warmup=0.1, decay=0.3).factor(step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(1 / 11)
    assert factors[:11] == sorted(factors[:11])
    assert set(factors[10:70]) == {1.0}
    assert factors[70] < 1
    assert factors[70:] == sorted(factors[70:], reverse=True)
    assert factors[-1] == pytest.approx(1 / 31)
    assert factors[84] == pytest.approx(0.5, abs=0.02)


def test_cosine_falls_from_the_warm_up_to_its_floor() -> None:
    factors = [Schedule("cosine", warmup=0, floor=0.1).factor(step, 100) for step in range(100)]
    assert factors == sorted(factors, reverse=True)
    assert factors[49] == pytest.approx(0.55, abs=0.01)
    assert factors[-1] == pytest.approx(0.1, abs=0.001)


def test_constant_stays() -> None:
    assert {Schedule("constant", warmup=0).factor(step, 7) for step in range(7)} == {1.0}


@pytest.mark.parametrize("kind", ["wsd", "cosine", "constant"])
def test_a_run_of_one_step_has_a_factor(kind: str) -> None:
    assert 0 < Schedule(kind).factor(0, 1) <= 1  # type: ignore[arg-type]


def test_what_is_outside_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="warmup"):
        Schedule(warmup=2)
    with pytest.raises(ValueError, match="step 5"):
        Schedule().factor(5, 5)
