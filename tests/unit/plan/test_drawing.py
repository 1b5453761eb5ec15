"""Numbers as numpy's legacy generator draws them, which public load generators use."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from freehold.plan.drawing import Drawing, mean, percentile

SEEDS = [0, 1, 7, 8, 123_456_789, 2**32 - 1]


@pytest.mark.parametrize("seed", SEEDS)
def test_integers(seed: int) -> None:
    for low, high in ((1, 1), (0, 1), (819, 1024), (6553, 8192), (0, 2**31), (5, 4 + 2**31)):
        theirs = np.random.RandomState(seed).randint(low, high + 1, size=700)
        assert Drawing(seed).integers(low, high, 700) == theirs.tolist()


@pytest.mark.parametrize("seed", SEEDS)
def test_one_stream_for_all_kinds(seed: int) -> None:
    ours, theirs = Drawing(seed), np.random.RandomState(seed)
    for _ in range(400):
        assert ours.uniform(0, 17) == theirs.uniform(0, 17)
        assert ours.integers(0, 99, 3) == theirs.randint(0, 100, size=3).tolist()
        assert ours.exponential(1 / 2.3, 5) == theirs.exponential(1 / 2.3, size=5).tolist()


def test_percentiles_and_means() -> None:
    for count in (1, 2, 7, 32, 128):
        values = sorted(Drawing(count).exponential(1.0, count))
        for percent in (0, 50, 90, 99, 100):
            assert percentile(values, percent) == pytest.approx(np.percentile(values, percent), rel=1e-14)
        assert mean(values) == pytest.approx(np.mean(values), rel=1e-14)


@pytest.mark.parametrize("wrong", [(2, 1), (0, 2**33)])
def test_impossible_ranges(wrong: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="no integers"):
        Drawing(0).integers(*wrong, 1)
    with pytest.raises(ValueError, match="no seed"):
        Drawing(-1)


def test_planning_does_not_import_numpy() -> None:
    """It takes a tenth of a second, which a plan that answers in less than one does not have."""
    script = (
        "import sys, freehold.plan.planner, freehold.plan.report, freehold.plan.as_json; print('numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "False"
