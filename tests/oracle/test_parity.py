"""The engine against `transformers` through every path, on every configuration of the parity benchmark, briefly."""

from __future__ import annotations

import pytest
from _common import Report
from oracle_parity import check, configs


@pytest.mark.parametrize("name", configs())
def test_every_path_equals_transformers(name: str) -> None:
    report = Report("oracle_parity", quick=True)
    check(report, name, configs()[name], new=12, unpatched=False)
    failed = [bar for bar in report.bars if not bar.passed]
    assert not failed
    assert len(report.bars) == 10
