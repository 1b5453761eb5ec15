"""All running experiments: fed from the ledger, obeying operators, telling the router where each canary stands.

Nothing happens while a call runs. Once a second each experiment is given the rows and notes that were stored since, in
the order in which they were stored, so that a decision rests on nothing that a crash could lose, and the ledger gives
the same decision again. A record is written before the router hears of it.

Of several gateways with one store, one leads an experiment at a time; the others follow its records.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol, TypeVar

import msgspec

from freehold.errors import FreeholdError, InvalidRequest, NotFound
from freehold.gateway.canary.machine import Canary, replay
from freehold.gateway.canary.record import COMMANDS, OVER, Plan, Record
from freehold.gateway.config import Experiment, Settings
from freehold.gateway.parts import Answer, Asked, Routes
from freehold.ledger import Note, Row

T = TypeVar("T")
Page = Sequence[tuple[int, T]]
_log = logging.getLogger(__name__)
EVERY_SECONDS = 1.0
AT_ONCE = 16  # rows, between which calls get their turn
REST_SECONDS = 10.0  # after a fault of our own: finding the place again reads all of the experiment's rows


class Ledger(Protocol):
    """What is stored of experiments. Positions rise in the order in which things were stored, with or without gaps; a
    row that was stored before a note has been seen by whoever reads rows after it read the note.
    """

    async def rows(self, experiment: str, after: int) -> Page[Row]:
        """The rows of an experiment whose position is above `after`; a few thousand at most, none: no more now."""

    async def notes(self, experiment: str, after: int) -> Page[Note]:
        """The notes on those rows, in the same way."""

    async def records(self, experiment: str) -> Sequence[Record]:
        """All of an experiment, by number."""

    async def add(self, record: Record) -> None:
        """Write a record, also to the audit log. Raises FreeholdError if there is one of its number."""

    async def leads(self, experiment: str) -> bool:
        """Whether this gateway is the one that decides now, and for some seconds to come."""


class _Running:
    """An experiment of the settings. canary: None where another gateway leads, or before the first turn."""

    def __init__(self, settings: Experiment) -> None:
        self.settings = settings
        self.canary: Canary | None = None
        self.unwritten: list[Record] = []
        self.last: Record | None = None
        self.lock = asyncio.Lock()
        self.rests_until = -math.inf  # time.monotonic()


class Canaries:
    """See the module. on_change: is given each written record that changed an experiment's state or step."""

    def __init__(
        self,
        ledger: Ledger,
        settings: Settings,
        *,
        clock: Callable[[], float] = time.time,
        on_change: Callable[[Record], None] = lambda record: None,
    ) -> None:
        self._ledger, self._clock, self._on_change = ledger, clock, on_change
        self._running: dict[str, _Running] = {}
        self.configure(settings)

    def configure(self, settings: Settings) -> None:
        """Take new settings. An experiment that is changed in them starts again, at once; others go on."""
        self._running = {
            name: known
            if (known := self._running.get(name)) is not None and known.settings == experiment
            else _Running(experiment)
            for name, experiment in settings.experiments.items()
        }

    def standing(self, experiment: str) -> Plan | None:
        """Where an experiment stands, as far as it is written. None: it has not begun, and gets no canary traffic."""
        running = self._running.get(experiment)
        if running is None or running.last is None:
            return None
        last = running.last
        return Plan(last.state, last.share, last.aa)

    async def run(self) -> None:
        """Keep all experiments going, until cancelled."""
        while True:
            for name, running in list(self._running.items()):
                if running.rests_until > time.monotonic():
                    continue
                try:
                    await self.advance(name)
                except FreeholdError as error:
                    _log.warning("experiment %s: %s", name, error)
                except Exception:
                    _log.exception("experiment %s stands still; again in %g s", name, REST_SECONDS)
                    running.rests_until = time.monotonic() + REST_SECONDS
            await asyncio.sleep(EVERY_SECONDS)

    async def advance(self, name: str) -> None:
        """Give an experiment what was stored since the last time."""
        running = self._of(name)
        async with running.lock:
            canary = await self._led(name, running)
            if canary is None or canary.state in OVER:
                return
            notes = await _all(lambda after: self._ledger.notes(name, after), canary.notes)
            while rows := await self._ledger.rows(name, canary.rows):
                async with self._counting(name, running):
                    for count, (position, row) in enumerate(rows):
                        canary.add(row, position, self._clock())
                        if count % AT_ONCE == 0:
                            await asyncio.sleep(0)  # calls go on meanwhile
                await self._write(running)
            async with self._counting(name, running):
                for position, note in notes:
                    canary.add_note(note, position)

    async def command(self, name: str, command: str, by: str) -> Record:
        """Have an operator's command obeyed. Raises NotFound, InvalidRequest."""
        running = self._of(name)
        if command not in COMMANDS:
            raise InvalidRequest(f"{command!r} is none of {', '.join(COMMANDS)}", param="command")
        async with running.lock:
            canary = await self._led(name, running)
            if canary is None:
                raise InvalidRequest(f"another gateway decides about {name!r} now: ask it, or again in a minute")
            canary.command(command, self._clock(), by)
            await self._write(running)
            assert running.last is not None
            return running.last

    async def status(self, name: str) -> dict[str, Any]:
        """How an experiment stands: its last record, and the last look with its guardrails."""
        running = self._of(name)
        if running.last is None:
            raise InvalidRequest(f"experiment {name!r} has not begun yet: ask again in a second")
        records = await self._ledger.records(name)
        looks = [record for record in _last_run(records) if record.kind == "look"]
        canary = running.canary
        shown = sorted(canary.shown) if canary is not None else []
        return {
            "experiment": name,
            "alias": running.settings.alias,
            "control": running.settings.control,
            "canary": running.settings.canary,
            "steps": running.settings.steps,
            "max_requests": running.settings.max_requests,
            "compared": canary.requests if canary is not None else None,
            "shown": shown,
            "now": msgspec.to_builtins(running.last),
            "look": msgspec.to_builtins(looks[-1]) if looks else None,
            "decisions": [msgspec.to_builtins(record) for record in records if record.changed or record.command],
        }

    async def replayed(self, name: str) -> dict[str, Any]:
        """Decide all of the experiment's present run again from the ledger."""
        self._of(name)
        records = _last_run(await self._ledger.records(name))
        if not records:
            raise NotFound(f"experiment {name!r} has no records")
        canary, differing = await self._replay(records)
        return {
            "experiment": name,
            "records": len(records),
            "decisions": sum(record.changed for record in records),
            "differing": [record.number for record in differing],
            "state": canary.state,
            "same": not differing,
        }

    def routes(self) -> Routes:
        """The admin API."""

        async def listed(asked: Asked) -> Answer:
            return _json({"experiments": [await self.status(name) for name in self._running]})

        async def shown(asked: Asked) -> Answer:
            return _json(await self.status(asked.names["name"]))

        async def again(asked: Asked) -> Answer:
            return _json(await self.replayed(asked.names["name"]))

        async def commanded(asked: Asked) -> Answer:
            by = asked.query.get("by", "")[:80] or "admin"
            return _json(msgspec.to_builtins(await self.command(asked.names["name"], asked.names["command"], by)))

        return {
            "GET /admin/experiments": listed,
            "GET /admin/experiments/{name}": shown,
            "GET /admin/experiments/{name}/replay": again,
            "POST /admin/experiments/{name}/{command}": commanded,
        }

    def _of(self, name: str) -> _Running:
        if name not in self._running:
            raise NotFound(f"there is no experiment {name[:128]!r}: {', '.join(self._running) or 'none'}")
        return self._running[name]

    async def _led(self, name: str, running: _Running) -> Canary | None:
        """The machine, if this gateway leads; otherwise follow the records."""
        if not await self._ledger.leads(name):
            running.canary = None
            running.unwritten.clear()
            records = await self._ledger.records(name)
            running.last = records[-1] if records else None
            return None
        if running.canary is None:
            running.canary = await self._begin(name, running)
        await self._write(running)
        return running.canary

    async def _begin(self, name: str, running: _Running) -> Canary:
        """Go on where the records end, or start."""
        records = await self._ledger.records(name)
        run = _last_run(records)
        last = records[-1] if records else None
        if run and Experiment.model_validate_json(run[0].settings) == running.settings:
            canary, differing = await self._replay(run)
            if differing:
                numbers = ", ".join(str(record.number) for record in differing)
                _log.error("experiment %s: records %s do not follow from the ledger", name, numbers)
            canary.trust(run[-1])
            canary.emit = running.unwritten.append
            running.last = run[-1]
            return canary
        return Canary(
            name,
            running.settings,
            self._clock(),
            emit=running.unwritten.append,
            number=last.number + 1 if last else 0,
            rows=last.rows if last else 0,
            notes=last.notes if last else 0,
        )

    async def _replay(self, records: Sequence[Record]) -> tuple[Canary, list[Record]]:
        start = records[0]
        rows = _paged(lambda after: self._ledger.rows(start.experiment, after), start.rows)
        notes = _paged(lambda after: self._ledger.notes(start.experiment, after), start.notes)
        return await replay(records, rows, notes)

    @asynccontextmanager
    async def _counting(self, name: str, running: _Running) -> AsyncIterator[None]:
        """After a fault in the middle of counting: what came out before it stands, and what was counted since the last
        written record is counted again, by a machine that stands where the records end. The fault is raised: that what
        came before it cannot be written either is only logged."""
        try:
            yield
        except Exception:
            try:
                await self._write(running)
            except FreeholdError as error:
                _log.warning("experiment %s: %s", name, error)
            finally:
                running.canary = None
                running.unwritten.clear()
            raise

    async def _write(self, running: _Running) -> None:
        while running.unwritten:
            record = running.unwritten[0]
            try:
                await self._ledger.add(record)
            except FreeholdError:
                running.canary = None  # another gateway was first: what we thought is void, and is read again
                running.unwritten.clear()
                raise
            running.unwritten.pop(0)
            running.last = record
            if record.changed:
                _log.warning("experiment %s: %s, %s", record.experiment, record.state, record.reason)
                self._on_change(record)


def _last_run(records: Sequence[Record]) -> Sequence[Record]:
    starts = [index for index, record in enumerate(records) if record.kind == "start"]
    return records[starts[-1] :] if starts else []


async def _paged(page: Callable[[int], Awaitable[Page[T]]], after: int) -> AsyncIterator[tuple[int, T]]:
    while items := await page(after):
        for item in items:
            yield item
        after = items[-1][0]


async def _all(page: Callable[[int], Awaitable[Page[T]]], after: int) -> list[tuple[int, T]]:
    return [item async for item in _paged(page, after)]


def _json(value: Any) -> Answer:
    return Answer(msgspec.json.encode(value))
