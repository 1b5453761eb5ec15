"""How often does the canary raise a false alarm, and how fast does it see a real one?

Simulated canaries at 5% of the traffic, with nine guardrails together, are fed to the gateway's own decision machine:
a look every 50 requests of the canary, up to 4,000 of them. Asked:

1.  How many canaries that equal the control are rolled back, where requests are independent, where they come in
    conversations that share their luck, and where both arms get slow and fail by the hour? And by z-tests that are
    repeated at every look?
2.  How many healthy ones are promoted, and how many that are exactly at a margin?
3.  How many with 5% or 10% failures instead of 1% are rolled back?
4.  After how many requests of the canary is it decided, for several kinds of harm, beside the best known test on the
    affected metric alone and beside an oracle that knows the harm and looks for nothing else? All with the same part of
    alpha.

    python benchmarks/canary_false_alarms.py [--quick] [--runs 1000] [--processes 2]

`--quick` takes 40 canaries of each kind, too few for the bars: those it shows are loose.
"""

from __future__ import annotations

import functools
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

from _canary_peers import asymptotic, naive, oracle, watch
from _canary_sim import GUARDRAILS, Outcome, Truth, experiment, run
from _common import Report, arguments

T = TypeVar("T")
SHARE, LOOKS = 0.05, 80
HEALTHY = Truth("healthy")
EQUAL = (HEALTHY, Truth("conversations", cluster=4.0), Truth("by the hour", drift=True))
FAILING = (Truth("error 1 to 5%", error=0.05), Truth("error 1 to 10%", error=0.10))
HARM = (
    (Truth("error 1 to 2%", error=0.02), "error"),
    (Truth("error 1 to 3%", error=0.03), "error"),
    (Truth("TTFT +20%", ttft=1.2), "ttft"),
    (Truth("cost +15%", cost=1.15), "cost"),
    (Truth("quality -5 points", quality=-0.05), "quality"),
)
AT_MARGIN = (Truth("error at its margin", error=0.02), Truth("cost at its margin", cost=1.10))


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--runs", type=int, default=0, help="simulated canaries of each kind (1000; quick: 40)")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(argv)
    runs = options.runs or (40 if options.quick else 1000)
    report = Report("canary-false-alarms", options.quick)
    with ProcessPoolExecutor(options.processes) as pool:
        judge(report, pool, runs, options.quick)
    return report.finish()


def judge(report: Report, pool: ProcessPoolExecutor, runs: int, quick: bool) -> None:
    """All bars and tables."""
    for truth in EQUAL[: 1 if quick else None]:
        found = simulate(report, pool, truth, runs)
        report.bar(f"{truth.name}: rolled back", share_of(found, "rolled_back"), "<=", 0.05)
        if not truth.drift:
            report.bar(f"{truth.name}: promoted", share_of(found, "promoted"), ">=", 0.60 if quick else 0.80)
    z = each(pool, _naive, runs)
    for index, name in enumerate(("naive z", "naive z of errors only", "naive z, Bonferroni")):
        rate = sum(row[index] for row in z) / runs
        print(f"        {name}: {rate:.1%} of equal canaries rolled back")
        report.samples[name] = rate
    report.bar("naive z: rolled back", report.samples["naive z"], ">", 0.20)
    for truth, least in zip(FAILING, (0.90, 0.99), strict=True):
        report.bar(
            f"{truth.name}: rolled back", share_of(simulate(report, pool, truth, runs), "rolled_back"), ">=", least
        )
    for truth in AT_MARGIN[: 0 if quick else None]:
        report.bar(f"{truth.name}: promoted", share_of(simulate(report, pool, truth, runs), "promoted"), "<=", 0.05)
    table(report, pool, max(20, runs // (4 if quick else 1)))


def table(report: Report, pool: ProcessPoolExecutor, runs: int) -> None:
    """Median requests of the canary to a decision."""
    print(
        f"{'median canary requests to roll back':36}{'canary':>10}{'asymptotic':>12}{'oracle':>10}{'rolled back':>13}"
    )
    kinds = [*((truth, "error") for truth in FAILING), *HARM]
    for truth, metric in kinds:
        done = report.samples.get(truth.name)
        found = [Outcome(*row) for row in done["outcomes"][:runs]] if done else simulate(report, pool, truth, runs)
        own = median([each.requests if each.state == "rolled_back" else math.inf for each in found])
        peers = each(pool, functools.partial(_peers, truth, metric), runs)
        others = [median(column) for column in zip(*peers, strict=True)]
        print(f"{truth.name:36}{own:10.0f}{others[0]:12.0f}{others[1]:10.0f}{share_of(found, 'rolled_back'):13.1%}")
        report.samples.setdefault("medians", {})[truth.name] = [_finite(own), *map(_finite, others)]


def simulate(report: Report, pool: ProcessPoolExecutor, truth: Truth, runs: int) -> list[Outcome]:
    """So many canaries; their outcomes are kept with the report."""
    begun = time.perf_counter()
    found = each(pool, functools.partial(_run, truth), runs)
    states = Counter(outcome.state for outcome in found)
    medians = {state: statistics.median(o.requests for o in found if o.state == state) for state in states}
    shares = ", ".join(f"{state} {count / runs:.1%} (after {medians[state]:.0f})" for state, count in states.items())
    print(f"{truth.name:36}{shares}   [{time.perf_counter() - begun:.0f} s]", flush=True)
    report.samples[truth.name] = {"outcomes": [[o.state, o.requests, o.reason] for o in found]}
    return found


def share_of(found: Sequence[Outcome], state: str) -> float:
    return sum(outcome.state == state for outcome in found) / len(found)


def median(values: Sequence[float]) -> float:
    """Of values that may be infinite: the lower one of the middle two."""
    return statistics.median_low(values)


def each(pool: ProcessPoolExecutor, work: Callable[[int], T], runs: int) -> list[T]:
    return list(pool.map(work, range(runs), chunksize=max(1, min(20, runs // 8))))


def _run(truth: Truth, seed: int) -> Outcome:
    return run(truth, seed, experiment())


def _naive(seed: int) -> tuple[bool, bool, bool]:
    found = watch(HEALTHY, seed, LOOKS, SHARE)
    return naive(found, 0.05), naive({"error": found["error"]}, 0.05), naive(found, 0.05 / len(found))


def _peers(truth: Truth, metric: str, seed: int) -> tuple[float, float]:
    settings = experiment()
    alpha = settings.alpha / 2 / len(GUARDRAILS)  # what the canary's first step gives to each guardrail
    sums = watch(truth, seed, LOOKS, SHARE)[metric]
    return asymptotic(sums, alpha), oracle(metric, sums, truth, alpha)


def _finite(value: float) -> Any:
    return value if math.isfinite(value) else None


if __name__ == "__main__":
    sys.exit(main())
