"""What a calibration found, as tables and as data. Torch-free."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from freehold.plan.calibrate import Recalibrated, mape
from freehold.plan.report import table_of

if TYPE_CHECKING:
    from rich.table import Table


def calibration_table(found: Recalibrated) -> list[Table]:
    """Efficiencies before and after, and the error of every run with both."""
    factors = table_of("efficiency", "after")
    for name, value in found.efficiencies.as_dict().items():
        shown = f"{value:.1%} of the peak" if name in ("memory", "compute", "links") else f"{value * 1e6:,.1f} us"
        factors.add_row(name, shown)
    errors = table_of("run", "TTFT before", "after", "TPOT before", "TPOT after")
    for old, new in zip(found.before, found.after, strict=True):
        cells = ["" if error is None else f"{error:+.1%}" for error in (old.ttft, new.ttft, old.tpot, new.tpot)]
        errors.add_row(old.run.name, *cells)
    means = [
        f"{mape(values):.1%}" if any(value is not None for value in values) else ""
        for values in (
            [one.ttft for one in found.before],
            [one.ttft for one in found.after],
            [one.tpot for one in found.before],
            [one.tpot for one in found.after],
        )
    ]
    errors.add_row("mean absolute error", *means)
    return [factors, errors]


def calibration_as_dict(found: Recalibrated) -> dict[str, Any]:
    """For JSON: efficiencies, and relative errors (predicted over measured, minus 1) before and after."""
    return {
        "efficiencies": found.efficiencies.as_dict(),
        "runs": [
            {
                "run": old.run.name,
                "ttft": {"measured": old.run.ttft, "before": old.ttft, "after": new.ttft},
                "tpot": {"measured": old.run.tpot, "before": old.tpot, "after": new.tpot},
            }
            for old, new in zip(found.before, found.after, strict=True)
        ],
    }
