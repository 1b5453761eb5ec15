"""What is watched of an experiment's calls, and the sums per arm that the comparison needs: a window over one step.

A window keeps no rows. Per arm and metric it has a `Cell`: sums over sticky units (the same unit's calls are not
independent of each other), and for quantiles a histogram of buckets 0.25% wide. Adding rows one by one gives the same
cell whatever part of the work was done before a restart, so that a decision can be made again from the ledger.

Intention to treat: a call counts for the arm that it was assigned to, also when another one answered. Of a call's
attempts, the first says whether the arm failed; costs and tokens of all of them add up; times are those of whichever
attempt had them. Attempts that were never made (limits, policy) and mirrored ones (shadows) are left out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from freehold.ledger import FAILURES, Note, Row
from freehold.stats.sequences import design_effect

Kind: TypeAlias = Literal["rate", "mean", "geometric", "quantile", "score", "pairs"]


@dataclass(frozen=True, slots=True)
class Metric:
    """A thing that may get worse. `margin`: how much worse is still accepted, if the settings do not say; relative for
    means and quantiles, absolute for rates and scores. More is worse, but for scores and pairs. level: of a quantile.

    Times have geometric means: one call that hung for minutes must not hide, or make, a difference of the others.
    """

    name: str
    kind: Kind
    margin: float
    of: str = ""  # the field of the row, the error class, or the name of the notes
    level: float = 0.0

    @property
    def relative(self) -> bool:
        return self.kind in ("mean", "geometric", "quantile")


def _table() -> dict[str, Metric]:
    rates = [Metric("error", "rate", 0.01)]
    rates += [Metric(name, "rate", 0.02 if name == "refusal" else 0.01, of=name) for name in sorted(FAILURES)]
    times = [
        Metric(f"{name}_p{percent}", "quantile", margin, of=name, level=percent / 100)
        for name in ("ttft", "tpot", "duration")
        for percent, margin in ((50, 0.10), (95, 0.20))
    ]
    means = [Metric(name, "geometric", 0.10, of=name) for name in ("ttft", "tpot", "duration")]
    means += [Metric("cost", "mean", 0.10, of="cost")]
    means += [Metric(name, "mean", 0.15, of=name) for name in ("output_tokens", "reasoning_tokens")]
    judged = [Metric(name, "pairs", 0.05, of=f"judge.{name}") for name in ("quality", "groundedness")]
    scores = [Metric("feedback", "score", 0.05, of="feedback")]
    return {metric.name: metric for metric in (*rates, *times, *means, *judged, *scores)}


METRICS: Mapping[str, Metric] = _table()
"""Every metric a guardrail can name."""

BUCKET = 0.0025  # width of a histogram's bucket, of the logarithm
_SMALLEST, _LARGEST = 1e-5, 1e5  # seconds
_BUCKETS = math.ceil(math.log(_LARGEST / _SMALLEST) / BUCKET)
_SMALLEST_LOG = math.log(_SMALLEST)


@dataclass(slots=True)
class Cell:
    """Sums over the units of one arm, of one metric. See `design_effect` for what they are for.

    Of a rate or quantile, the total is a number of hits; of a quantile, hits are values above a reference that was
    fixed before they came, and `histogram` has the values themselves.
    """

    units: int = 0
    trials: float = 0.0
    total: float = 0.0
    total2: float = 0.0
    cross: float = 0.0
    trials2: float = 0.0
    histogram: NDArray[np.int64] | None = None

    def move(self, trials: float, total: float, more_trials: float, more_total: float) -> None:
        """A unit that had `trials` and `total` gets more of them."""
        after, sum_after = trials + more_trials, total + more_total
        self.units += trials == 0.0 and after > 0.0
        self.trials += more_trials
        self.total += more_total
        self.total2 += sum_after * sum_after - total * total
        self.cross += after * sum_after - trials * total
        self.trials2 += after * after - trials * trials

    def absorb(self, trials_U: ArrayLike, totals_U: ArrayLike) -> None:
        """Whole units at once, none of which was here before."""
        trials, totals = np.asarray(trials_U, np.float64), np.asarray(totals_U, np.float64)
        self.units += int(np.count_nonzero(trials))
        self.trials += float(trials.sum())
        self.total += float(totals.sum())
        self.total2 += float(totals @ totals)
        self.cross += float(trials @ totals)
        self.trials2 += float(trials @ trials)

    @property
    def mean(self) -> float:
        return self.total / self.trials if self.trials else 0.0

    @property
    def squared_error(self) -> float:
        """The squared standard error of the mean, units being independent (linearised, of a ratio of sums)."""
        if self.units < 2:
            return math.inf
        mean = self.mean
        spread = max(0.0, self.total2 - 2.0 * mean * self.cross + mean * mean * self.trials2)
        return spread / (self.trials * self.trials) * self.units / (self.units - 1)

    @property
    def values(self) -> int:
        """How many values the histogram has."""
        return 0 if self.histogram is None else int(self.histogram.sum())


def bucket(value: float) -> int:
    """The bucket of a value; those beyond the ends are in the last ones."""
    if value <= _SMALLEST:
        return 0
    return min(_BUCKETS - 1, int((math.log(value) - _SMALLEST_LOG) / BUCKET))


def histogram_of(values: ArrayLike) -> NDArray[np.int64]:
    """The histogram of many values."""
    logs = (np.log(np.maximum(np.asarray(values, np.float64), _SMALLEST)) - _SMALLEST_LOG) / BUCKET
    return np.bincount(np.clip(logs, 0, _BUCKETS - 1).astype(np.int64), minlength=_BUCKETS)


def edge(index: int) -> float:
    """The lower edge of a bucket; the upper one is the next bucket's."""
    return math.exp(_SMALLEST_LOG + index * BUCKET)


@dataclass(slots=True)
class Blocks:
    """What came between looks, of a rate: events of both arms, and the trials of each. See `log_ratio_evidence`."""

    events_B: list[float] = field(default_factory=list)
    canary_B: list[float] = field(default_factory=list)
    control_B: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Compared:
    """The sums of one metric in both arms."""

    metric: Metric
    control: Cell
    canary: Cell
    blocks: Blocks = field(default_factory=Blocks)
    pairs: Counter[float] = field(default_factory=Counter)  # canary's score minus control's: how often
    reference: float | None = None  # of a quantile: control's at the last look

    @classmethod
    def of(cls, metric: Metric) -> Compared:
        def cell() -> Cell:
            return Cell(histogram=np.zeros(_BUCKETS, np.int64) if metric.kind == "quantile" else None)

        return cls(metric, cell(), cell())

    @property
    def design(self) -> float:
        """The design effect of hits, of both arms together: under the hypothesis that is tested they are alike."""
        a, b = self.control, self.canary
        return design_effect(
            a.units + b.units,
            a.trials + b.trials,
            a.total + b.total,
            a.total2 + b.total2,
            a.cross + b.cross,
            a.trials2 + b.trials2,
        )

    def close_block(self) -> None:
        """A look: what comes after it is another block, with another reference."""
        if self.metric.kind == "rate":
            done, events = self.blocks, self.control.total + self.canary.total
            done.events_B.append(events - sum(done.events_B))
            done.canary_B.append(self.canary.trials - sum(done.canary_B))
            done.control_B.append(self.control.trials - sum(done.control_B))
        elif self.metric.kind == "quantile" and self.control.histogram is not None and self.control.values:
            ranks = np.cumsum(self.control.histogram)
            self.reference = edge(int(np.searchsorted(ranks, self.metric.level * ranks[-1])) + 1)


class Window:
    """The calls of one step. control, canary: names of the arms."""

    def __init__(self, metrics: Sequence[Metric], control: str, canary: str) -> None:
        self.metrics = [Compared.of(metric) for metric in metrics]
        self.requests = [0, 0]  # of control and of canary
        self._arms = (control, canary)
        self._units: tuple[dict[str, list[float]], dict[str, list[float]]] = ({}, {})
        self._arrivals: tuple[list[float], list[float]] = ([], [])  # first call of each unit
        self._ended, self._longest = -math.inf, 0.0
        self._absorbed = [0, 0]  # units that came by `absorb`
        self._shadows: dict[str, str] = {}  # row of the mirrored call -> row of the real one
        self._halves: dict[tuple[str, str], tuple[bool, float]] = {}  # (metric, real row) -> (of the mirrored?, score)
        self._judged: dict[str, set[str]] = {}  # metric -> units with a pair

    @property
    def units(self) -> tuple[int, int]:
        """Sticky units of control and of canary."""
        return len(self._units[0]) + self._absorbed[0], len(self._units[1]) + self._absorbed[1]

    def arrived(self) -> tuple[int, int]:
        """Units of control and of canary that came so long ago that no call of then can still be running.

        Otherwise the slower arm would seem to have got less: its calls are not in the ledger before they end.
        """
        before = self._ended - self._longest
        counts = [sum(at <= before for at in arm) for arm in self._arrivals]
        return counts[0] + self._absorbed[0], counts[1] + self._absorbed[1]

    def add(self, row: Row) -> bool:
        """Count an attempt; whether it was one of an arm."""
        if row.arm not in self._arms or row.error == "refused_here":
            return False
        if row.shadow_of:
            self._shadows[row.row_id] = row.shadow_of
            return False
        arm = self._arms.index(row.arm)
        self.requests[arm] += row.attempt == 0
        unit = self._units[arm].get(row.unit)
        if unit is None:
            unit = self._units[arm][row.unit] = [0.0] * (2 * len(self.metrics))
            self._arrivals[arm].append(row.at)
        self._ended = max(self._ended, row.at + row.duration)
        self._longest = max(self._longest, row.duration)
        for index, compared in enumerate(self.metrics):
            if (counted := self._count(compared, row, arm)) is not None:
                self._move(compared, arm, unit, 2 * index, *counted)
        return True

    def note(self, note: Note, arm: int | None, unit: str) -> None:
        """Count a late fact about a row that was counted for an arm (0: control, 1: canary); None: for no arm."""
        for index, compared in enumerate(self.metrics):
            metric = compared.metric
            if metric.of != note.name:
                continue
            if metric.kind == "score" and arm is not None:
                self._move(compared, arm, self._units[arm][unit], 2 * index, 1.0, note.value)
            elif metric.kind == "pairs":
                self._pair(compared, note, unit)

    def absorb(self, arm: int, columns: Mapping[str, ArrayLike], unit_R: NDArray[np.int64]) -> None:
        """Many requests at once, of units that are not here yet and will get no more: for simulations.

        columns: by metric, a value for each request, NaN where it has none: 1 or 0 of a rate, else what is measured;
        of pairs, any number of differences, with the canary. unit_R: the unit of each request, 0, 1, ...
        """
        self.requests[arm] += len(unit_R)
        self._absorbed[arm] += int(unit_R[-1]) + 1 if len(unit_R) else 0
        for compared in self.metrics:
            kind = compared.metric.kind
            if kind == "pairs" and not arm:
                continue
            values = np.asarray(columns[compared.metric.name], np.float64)
            if kind == "pairs":
                compared.pairs.update(np.round(values, 3).tolist())
                continue
            cell, there = (compared.canary if arm else compared.control), ~np.isnan(values)
            hits = np.where(there, np.log(np.maximum(values, _SMALLEST)) if kind == "geometric" else values, 0.0)
            if kind == "quantile":
                assert cell.histogram is not None
                cell.histogram += histogram_of(values[there])
                if compared.reference is None:
                    continue
                hits = (hits >= compared.reference).astype(np.float64)
            cell.absorb(np.bincount(unit_R, there), np.bincount(unit_R, hits))

    def look(self) -> None:
        """Close the blocks."""
        for compared in self.metrics:
            compared.close_block()

    def _count(self, compared: Compared, row: Row, arm: int) -> tuple[float, float] | None:
        """(trials, total) that a row adds to a metric, if any."""
        metric, first = compared.metric, row.attempt == 0
        if metric.kind == "rate":
            return (1.0, float(self._failed(metric, row))) if first else None
        if metric.kind in ("score", "pairs"):
            return None
        value: float | None = getattr(row, metric.of)
        if metric.kind == "quantile":
            if value is None:
                return None
            cell = compared.canary if arm else compared.control
            assert cell.histogram is not None
            cell.histogram[bucket(value)] += 1
            return None if compared.reference is None else (1.0, float(value >= compared.reference))
        if metric.kind == "geometric":
            return None if value is None else (1.0, math.log(max(value, _SMALLEST)))
        if value is None:  # a failed attempt spends nothing that we know of, but it is a request
            return (1.0, 0.0) if first and row.error in FAILURES else None
        return (float(first), float(value))

    def _failed(self, metric: Metric, row: Row) -> bool:
        if metric.of:
            return row.error == metric.of
        unanswered = row.served_arm not in ("", row.arm)
        return row.error in FAILURES or unanswered

    def _pair(self, compared: Compared, note: Note, unit: str) -> None:
        """Both halves of a pair, in whichever order. A unit has one pair: others would not be independent of it."""
        real = self._shadows.get(note.row_id, note.row_id)
        mirrored, key = real != note.row_id, (compared.metric.name, real)
        half = self._halves.pop(key, None)
        if half is None or half[0] == mirrored:
            self._halves[key] = (mirrored, note.value)
            return
        units = self._judged.setdefault(compared.metric.name, set())
        if unit not in units:
            units.add(unit)
            canary, control = (note.value, half[1]) if mirrored else (half[1], note.value)
            compared.pairs[round(canary - control, 3)] += 1

    @staticmethod
    def _move(compared: Compared, arm: int, unit: list[float], at: int, trials: float, total: float) -> None:
        cell = compared.canary if arm else compared.control
        cell.move(unit[at], unit[at + 1], trials, total)
        unit[at] += trials
        unit[at + 1] += total
