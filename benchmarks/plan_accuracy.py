"""How far the planner's TTFT and TPOT lie from measured ones, on runs it was fitted to and on runs it never saw.

Every group of runs (one GPU, one precision) is left out in turn: the efficiencies are fitted to the other groups alone,
and the group is predicted with them. Both errors are shown for every run: in-sample and left-out. Runs at the end are
never fitted to: other vendors' software, drafts of a known acceptance length, IndexShare.

`--quick` takes the schedules of one simulation of each run as they are and solves for the factors once, instead of
repeating until both agree.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from _common import Report, arguments

from freehold.plan.calibrate import Outcome, Residual, fit, mape, outcome, residuals, solve
from freehold.plan.kept import bundled
from freehold.plan.measured import Measured, checks, runs
from freehold.plan.roofline import CAUSES, Efficiencies, seconds

TPOT_LIMIT, GROUP_LIMIT, TTFT_LIMIT = 0.07, 0.12, 0.20


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--starved", type=float, default=10.0, help="seconds of TTFT of a run that waits for cache")
    options = parser.parse_args()
    report = Report("plan_accuracy", options.quick)
    measured = runs()
    fitted, inside, outside = _quick(measured) if options.quick else _full(measured)
    _show(measured, inside, outside)
    print("\nefficiencies (all runs):")
    for name, value in fitted.as_dict().items():
        print(f"  {name:<10} {value:.4g}")
    bars = _bars(report, measured, inside, outside, options.starved)
    report.samples = {
        "efficiencies": fitted.as_dict(),
        "bundled": bundled().as_dict(),
        "rows": [_row(*rows) for rows in zip(measured, inside, outside, strict=True)],
        "figures": bars,
        "checks": _checks(fitted),
    }
    return report.finish()


def _full(measured: Sequence[Measured]) -> tuple[Efficiencies, list[Residual], list[Residual]]:
    around = bundled()
    first = {id(run): outcome(run, around) for run in measured}
    fitted = fit(measured, around, first=list(first.values()))
    inside = residuals(measured, fitted)
    by_run: dict[int, Residual] = {}
    for group in _groups(measured):
        print(f"without {group} ...", flush=True)
        others = [run for run in measured if run.setup.group != group]
        held = [run for run in measured if run.setup.group == group]
        alone = fit(others, around, first=[first[id(run)] for run in others])
        by_run |= {id(found.run): found for found in residuals(held, alone)}
    return fitted, inside, [by_run[id(run)] for run in measured]


def _quick(measured: Sequence[Measured]) -> tuple[Efficiencies, list[Residual], list[Residual]]:
    around = bundled()
    outcomes = [outcome(run, around) for run in measured]
    everything = solve(measured, outcomes, around)
    inside = [_linear(run, found, everything) for run, found in zip(measured, outcomes, strict=True)]
    by_run: dict[int, Residual] = {}
    for group in _groups(measured):
        others = [(run, found) for run, found in zip(measured, outcomes, strict=True) if run.setup.group != group]
        factors = solve([run for run, _ in others], [found for _, found in others], around)
        for run, found in zip(measured, outcomes, strict=True):
            if run.setup.group == group:
                by_run[id(run)] = _linear(run, found, factors)
    return Efficiencies.from_factors(tuple(everything)), inside, [by_run[id(run)] for run in measured]


def _linear(run: Measured, found: Outcome, factors: Iterable[float]) -> Residual:
    """The same schedule with other factors."""
    factors = tuple(factors)
    ttft, tpot = seconds(found.to_first, factors), seconds(found.per_token, factors)
    made = Outcome(ttft, tpot, found.to_first, found.per_token)
    return Residual(
        run,
        made,
        None if run.ttft is None else ttft / run.ttft - 1,
        None if run.tpot is None else tpot / run.tpot - 1,
    )


def _groups(measured: Sequence[Measured]) -> list[str]:
    return list(dict.fromkeys(run.setup.group for run in measured))


def _show(measured: Sequence[Measured], inside: Sequence[Residual], outside: Sequence[Residual]) -> None:
    print(f"\n{'run':<32}{'TTFT s':>9}{'in':>8}{'left out':>10}{'TPOT ms':>10}{'in':>8}{'left out':>10}")
    for run, here, there in zip(measured, inside, outside, strict=True):
        assert run.ttft is not None
        assert run.tpot is not None
        print(
            f"{run.name:<32}{run.ttft:9.3f}{_percent(here.ttft):>8}{_percent(there.ttft):>10}"
            f"{run.tpot * 1e3:10.2f}{_percent(here.tpot):>8}{_percent(there.tpot):>10}"
        )


def _bars(
    report: Report,
    measured: Sequence[Measured],
    inside: Sequence[Residual],
    outside: Sequence[Residual],
    starved: float,
) -> dict[str, float]:
    figures = {
        "TPOT in-sample": mape(found.tpot for found in inside),
        "TTFT in-sample": mape(found.ttft for found in inside),
    }
    print(f"\nin-sample: TPOT {figures['TPOT in-sample']:.1%}, TTFT {figures['TTFT in-sample']:.1%}; left out:")
    report.bar("mean error of TPOT, left out", mape(found.tpot for found in outside), "<=", TPOT_LIMIT)
    for group in _groups(measured):
        mine = [found for found in outside if found.run.setup.group == group]
        report.bar(f"mean error of TPOT, left out: {group}", mape(found.tpot for found in mine), "<=", GROUP_LIMIT)
        figures[f"TTFT left out: {group}"] = mape(found.ttft for found in mine)
    report.bar("mean error of TTFT, left out", mape(found.ttft for found in outside), "<=", TTFT_LIMIT)
    waiting = [found.ttft for found in outside if (found.run.ttft or 0) > starved]
    report.bar("runs that waited for cache", len(waiting), ">=", 1)
    report.bar("error of TTFT where calls waited for cache, left out", mape(waiting), "<=", TTFT_LIMIT)
    return figures


def _row(run: Measured, inside: Residual, outside: Residual) -> dict[str, Any]:
    return {
        "run": run.name,
        "ttft": run.ttft,
        "tpot": run.tpot,
        "in_sample": {"ttft": inside.ttft, "tpot": inside.tpot},
        "left_out": {"ttft": outside.ttft, "tpot": outside.tpot},
        "tpot_by_cause": dict(zip(CAUSES, outside.outcome.per_token, strict=True)),
    }


def _checks(fitted: Efficiencies) -> list[dict[str, Any]]:
    """Runs of other software, shown and not judged: what interval a bare roofline needs."""
    print("\nnever fitted to:")
    found = residuals(checks(), fitted)
    for one in found:
        print(f"  {one.run.name:<44} TTFT {_percent(one.ttft):>7}  TPOT {_percent(one.tpot):>7}")
    ratios = [1 / (1 + one.tpot) for one in found if one.tpot is not None]
    print(f"  measured over predicted TPOT: {min(ratios):.2f} to {max(ratios):.2f}, median {np.median(ratios):.2f}")
    return [{"run": one.run.name, "ttft": one.ttft, "tpot": one.tpot} for one in found]


def _percent(error: float | None) -> str:
    return "-" if error is None else f"{100 * error:+.1f}%"


if __name__ == "__main__":
    sys.exit(main())
