"""An experiment's view of the store: what `canaries` reads and writes."""

from __future__ import annotations

import msgspec

from freehold.gateway.canary.record import Record
from freehold.gateway.keeping.store import Store
from freehold.ledger import Note, Row


class ExperimentLedger:
    """A `canaries.Ledger`."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def rows(self, experiment: str, after: int) -> list[tuple[int, Row]]:
        return await self._store.experiment_rows(experiment, after)

    async def notes(self, experiment: str, after: int) -> list[tuple[int, Note]]:
        return await self._store.experiment_notes(experiment, after)

    async def records(self, experiment: str) -> list[Record]:
        return [msgspec.convert(each.record, Record) for each in await self._store.decisions(experiment)]

    async def add(self, record: Record) -> None:
        """Looks that decided nothing stay out of the audit log, where everything else is to be found."""
        await self._store.add_decision(
            record.experiment,
            record.number,
            msgspec.to_builtins(record),
            at=record.at,
            actor=record.by or "gateway",
            audited=record.changed or record.kind != "look",
        )

    async def leads(self, experiment: str) -> bool:
        return await self._store.leads(experiment)
