"""The canary: a machine that is fed the rows of an experiment and says what share of the traffic the new arm gets.

    aa ──► ramping ──► promoted          every guardrail shown to be within its margin, and every step survived
    │        │  ▲ └──► rolled_back       a guardrail worse, at any look, in any state; or aborted by hand
    ▼        ▼  │ └──► inconclusive      `max_requests` without either
    hold ◄───┘──┘                        paused by hand, or the arms' sizes are not what was drawn: the ramp stops,
                                         the guard does not

Every LOOK requests of the canary, and a few times before, it looks. With m guardrails and step k of the ramp, from 1:

*   a guardrail is **worse** if the bound of its effect that is wrong at any look with probability alpha / 2^k / m
    is above 0. So all looks, guardrails and steps together roll a canary that is as good as the control back with
    probability at most alpha. One that is worse but shown to be within its margin is not rolled back.
*   a guardrail is **fine** if its other bound, with 3 alpha / 4^k, is below its margin. Being fine in one step is
    enough. All must be, so a canary that is beyond any margin is promoted with probability at most alpha. The first
    step has most of it: nothing goes on before all are fine there, so what later ones have is rarely used.

Each step is a comparison of its own: time of day and load change from step to step, and old and new steps together
would mix them up with the arms. Conversations that began before a step keep their arm and are left out of it.

It is event-sourced: rows, notes and commands go in, `Record`s come out, and the same input gives the same records
(`replay`). Its clock is the caller's.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterable, AsyncIterator, Callable, Sequence
from typing import Any, Literal, TypeVar, cast

from freehold.errors import InvalidRequest
from freehold.gateway.canary.guardrails import Finding, detectable, judge
from freehold.gateway.canary.record import OVER, Command, Plan, Record, Seen, State
from freehold.gateway.canary.windows import METRICS, Window
from freehold.gateway.config import Experiment
from freehold.ledger import Note, Row
from freehold.stats.sequences import log_share_evidence

T = TypeVar("T")

LOOK = 50
"""Requests of the canary between looks."""
EARLY_LOOKS = (10, 25)
"""Looks before the first of those: where most calls fail, ten are enough."""
ALPHA_RATIO = 0.001
"""Probability that a step of a correct assignment is ever held for its sample ratio."""
SETTLE_SECONDS = 8.0
"""Calls that arrive so soon after a change of share are left out: gateways are just agreeing on it, and one that is
gone is waited for (`routing.crossing.LIVE_SECONDS`)."""


class Canary:
    """One experiment, from its start or, by `replay`, from its records."""

    def __init__(
        self,
        name: str,
        experiment: Experiment,
        at: float,
        *,
        emit: Callable[[Record], None] = lambda record: None,
        number: int = 0,
        rows: int = 0,
        notes: int = 0,
        explain: bool = True,
    ) -> None:
        """at: now, epoch seconds. emit: is given each record. number: of the first one. rows, notes: positions in the
        ledger after which it begins. explain: whether looks say what could be detected by now.
        """
        self.name, self.experiment = name, experiment
        self.rows, self.notes, self.number = rows, notes, number
        self.state: State = "aa" if experiment.aa_units else "ramping"
        self.step = 0
        self.shown: set[str] = set()  # guardrails that were fine in some step
        self.last: Record | None = None
        self.emit, self._explain = emit, explain
        self._aa = bool(experiment.aa_units)
        self._rails = [(METRICS[rail.metric], rail.accepted) for rail in experiment.guardrails]
        self._takes_notes = any(metric.kind in ("score", "pairs") for metric, _ in self._rails)
        self._requests = 0  # of the canary, compared, in the steps before this one
        self._warm_up = experiment.warm_up_requests
        self._epoch = self._windows = 0  # windows opened; those of them that are not A/A
        self._spoilt = False  # held by a look: what the window has is not to be trusted
        self._begun: dict[str, int] = {}  # conversation -> epoch it began in; -1: before the window opened
        self._known: dict[str, tuple[int, int | None, str]] = {}  # row -> epoch, arm if it was counted, unit
        self._open(at)
        self._record(at, "start", settings=experiment.model_dump_json())

    @property
    def plan(self) -> Plan:
        """What the router does now."""
        if self.state == "promoted":
            return Plan(self.state, 1.0)
        gives_up = self.state == "inconclusive" and self.experiment.when_inconclusive == "rollback"
        if self.state == "rolled_back" or gives_up:
            return Plan(self.state, 0.0)
        return Plan(self.state, self.experiment.steps[self.step], self._aa)

    def trust(self, record: Record) -> None:
        """Stand where a record says, whatever came out of the rows: what was decided is not taken back."""
        if (self.state, self.step, self._aa) != (record.state, record.step, record.aa):
            self.state, self.step, self._aa = record.state, record.step, record.aa
            self._open(record.at)
        self.number, self.last = record.number + 1, record
        self.rows, self.notes = max(self.rows, record.rows), max(self.notes, record.notes)

    @property
    def requests(self) -> int:
        """Of the canary, that were compared, in all steps."""
        return self._requests + (0 if self._aa else self.window.requests[1])

    def add(self, row: Row, position: int, at: float) -> None:
        """Count a row of the experiment. position: in the ledger; at: now. Every LOOK requests of the canary: look."""
        self.rows = position
        if self.state in OVER or not self._compared(row):
            return
        before = self.window.requests[1]
        counted = self.window.add(row)
        if self._takes_notes:
            arm = int(row.arm == self.experiment.canary) if counted else None
            self._known[row.row_id] = (self._epoch, arm, row.unit)
        count = self.window.requests[1]
        if count > before and (count % LOOK == 0 or count in EARLY_LOOKS):
            self.look(at)

    def add_note(self, note: Note, position: int) -> None:
        """Count a late fact about a row that was counted."""
        self.notes = position
        if (known := self._known.get(note.row_id)) is None:
            return
        epoch, arm, unit = known
        if epoch == self._epoch:
            self.window.note(note, arm, unit)

    def look(self, at: float) -> None:
        """Compare, decide and record."""
        self.window.look()
        alpha = self._alpha()
        found = self.findings()
        self.shown |= {each.metric for each in found if each.fine and not self._aa}
        state, step, reason = self._next(found)
        guardrails = tuple(
            _seen(each, detectable(compared, each.margin, alpha / len(found)) if self._explain else None)
            for each, compared in zip(found, self.window.metrics, strict=True)
        )
        self._go(at, state, step, "look", reason, guardrails=guardrails)

    def command(self, command: Command, at: float, by: str = "") -> None:
        """Obey an operator: pause or resume the ramp; force the next step, whatever is known; abort: roll back now.

        Raises InvalidRequest where there is nothing to pause, resume, force or abort.
        """
        state, step = self.state, self.step
        if command == "pause" and state in ("aa", "ramping"):
            state = "hold"
        elif command == "resume" and state == "hold":
            state = "aa" if self._aa else "ramping"
        elif command == "force" and state not in OVER:
            state, step = ("ramping", step) if self._aa else self._step_after(step)
        elif command == "abort" and state != "rolled_back":
            state = "rolled_back"
        else:
            raise InvalidRequest(f"experiment {self.name!r} is {state}: it cannot {command}", param="command")
        self._go(at, state, step, "command", f"{command} by {by or 'an operator'}", command=command, by=by)

    def findings(self) -> list[Finding]:
        """What the guardrails say now, in the order of the settings."""
        alpha = self._alpha()
        fine = 3.0 * self.experiment.alpha / 4.0 ** max(1, self._windows)
        return [
            judge(compared, margin, alpha / len(self._rails), fine)
            for compared, (_, margin) in zip(self.window.metrics, self._rails, strict=True)
        ]

    def _alpha(self) -> float:
        """This window's part: half of what the ones before it have left."""
        return self.experiment.alpha / 2.0 ** max(1, self._windows)

    def _next(self, found: Sequence[Finding]) -> tuple[State, int, str]:
        """What a look leads to: state, step, and why if that is news."""
        state, step, window = self.state, self.step, self.window
        drawn, arrived = self.experiment.steps[step], window.arrived()
        units = sum(arrived)
        uneven = drawn < 1.0 and log_share_evidence(arrived[1], units, drawn) >= -math.log(ALPHA_RATIO)
        ratio = f"{arrived[1]} of {units} units are the canary's, where {drawn:g} of them were drawn"
        if self._aa:
            worse = [each.metric for each in found if each.worse]
            if state != "aa":
                return state, step, ""
            if worse or uneven:
                return "hold", step, f"A/A: {worse[0]} differs between two equal arms" if worse else f"A/A: {ratio}"
            done = units >= self.experiment.aa_units
            return ("ramping", 0, f"A/A: {units} units without a difference") if done else (state, step, "")
        for each in found:
            if each.worse and not each.fine:
                return "rolled_back", step, _words(each)
        if state != "ramping":
            return state, step, ""
        if uneven:
            return "hold", step, ratio
        if len(self.shown) == len(found) and window.requests[1] >= self.experiment.min_step_requests:
            return *self._step_after(step), "every guardrail is within its margin"
        open_ = [each.metric for each in found if each.metric not in self.shown]
        if open_ and self.requests >= self.experiment.max_requests:
            return "inconclusive", step, f"{self.requests} requests, and not shown: {', '.join(open_)}"
        return state, step, ""

    def _step_after(self, step: int) -> tuple[State, int]:
        """The next step of the ramp; at its end, or where no control would be left, the canary is promoted."""
        steps = self.experiment.steps
        if step + 1 < len(steps) and steps[step + 1] < 1.0:
            return "ramping", step + 1
        return "promoted", step

    def _go(
        self,
        at: float,
        state: State,
        step: int,
        kind: Literal["look", "command"],
        reason: str,
        *,
        guardrails: tuple[Seen, ...] = (),
        command: str = "",
        by: str = "",
    ) -> None:
        """Enter a state, with a new window where what was compared before says nothing about what comes."""
        requests, units = self.window.requests, self.window.units
        changed = (state, step) != (self.state, self.step)
        fresh = step != self.step or (self._aa and state == "ramping") or (self._spoilt and state in ("aa", "ramping"))
        self._spoilt = state == "hold" and (self._spoilt or (kind == "look" and changed))
        if fresh:
            self._requests = self.requests
            self._aa = state == "aa"
            self._open(at)
        self.state, self.step = state, step
        self._record(
            at,
            kind,
            reason=reason,
            changed=changed,
            guardrails=guardrails,
            command=command,
            by=by,
            requests=(requests[0], requests[1]),
            units=units,
        )

    def _open(self, at: float) -> None:
        """Begin a window."""
        self._epoch += 1
        self._windows += not self._aa
        self._since = at + SETTLE_SECONDS
        metrics = [metric for metric, _ in self._rails]
        self.window = Window(metrics, self.experiment.control, self.experiment.canary)

    def _compared(self, row: Row) -> bool:
        """Whether a row is analysed; notes when its conversation began."""
        settled = row.at >= self._since and not row.warm_up
        if settled and self._warm_up and not self._aa and row.arm in (self.experiment.control, self.experiment.canary):
            self._warm_up -= row.arm == self.experiment.canary and row.attempt == 0 and not row.shadow_of
            settled = False
        epoch = self._epoch if settled else -1
        if row.conversation:
            epoch = self._begun.setdefault(row.conversation, epoch)
        return epoch == self._epoch

    def _record(self, at: float, kind: Literal["start", "look", "command"], **more: Any) -> None:
        self.last = Record(
            experiment=self.name,
            number=self.number,
            at=at,
            kind=kind,
            rows=self.rows,
            notes=self.notes,
            state=self.state,
            step=self.step,
            share=self.plan.share,
            aa=self._aa,
            **more,
        )
        self.number += 1
        self.emit(self.last)


async def replay(
    records: Sequence[Record], rows: AsyncIterable[tuple[int, Row]], notes: AsyncIterable[tuple[int, Note]]
) -> tuple[Canary, list[Record]]:
    """Do all of it again from the ledger: the canary as it stands at the last record, and each record that came out
    differently or not at all.

    records: of one run of the experiment, the first is its start. rows, notes: the experiment's, each with its
    position, in the order in which they were stored; those after the last record are not counted.
    """
    start, came = records[0], list[Record]()
    more_rows, more_notes = _after(rows, start.rows), _after(notes, start.notes)
    row, note = await anext(more_rows, None), await anext(more_notes, None)
    settings = Experiment.model_validate_json(start.settings)
    canary = Canary(
        start.experiment, settings, start.at, emit=came.append, number=start.number, rows=start.rows, notes=start.notes
    )
    for record in records[1:]:
        # A look comes with its last row, after the notes that came before it; a command after all of them.
        while row is not None and row[0] <= record.rows - (record.kind == "look"):
            canary.add(row[1], row[0], record.at)
            row = await anext(more_rows, None)
        while note is not None and note[0] <= record.notes:
            canary.add_note(note[1], note[0])
            note = await anext(more_notes, None)
        while row is not None and row[0] <= record.rows:
            canary.add(row[1], row[0], record.at)
            row = await anext(more_rows, None)
        if record.kind == "command":
            canary.command(cast("Command", record.command), record.at, record.by)
    again = {record.number: record for record in came}
    return canary, [record for record in records if again.pop(record.number, None) != record] + list(again.values())


async def _after(items: AsyncIterable[tuple[int, T]], position: int) -> AsyncIterator[tuple[int, T]]:
    async for item in items:
        if item[0] > position:
            yield item


def _seen(finding: Finding, least: float | None) -> Seen:
    def finite(value: float | None) -> float | None:
        return value if value is not None and math.isfinite(value) else None

    return Seen(
        metric=finding.metric,
        margin=finding.margin,
        control=finding.control,
        canary=finding.canary,
        effect=finding.effect.value,
        low=finite(finding.effect.low),
        high=finite(finding.effect.high),
        worse=finding.worse,
        fine=finding.fine,
        detectable=finite(least),
    )


def _words(finding: Finding) -> str:
    relative = METRICS[finding.metric].relative
    low = f"{finding.effect.low:.1%}" if relative else f"{100 * finding.effect.low:.2g} points"
    figures = f"{finding.canary:.4g} against {finding.control:.4g}"
    if METRICS[finding.metric].kind == "pairs":
        figures = f"{finding.canary:+.3g} in judged pairs"
    return f"{finding.metric}: {figures}, at least {low} worse"
