"""Rows of an experiment for the tests of the canary, and a ledger in memory that behaves as the stored one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from freehold.errors import FreeholdError
from freehold.gateway.canary.machine import SETTLE_SECONDS
from freehold.gateway.canary.record import Record
from freehold.gateway.config import Experiment, Settings
from freehold.ledger import Note, Row

NAME = "new-model"


def experiment(*metrics: str, **more: Any) -> Experiment:
    """An experiment with these guardrails, error if none, and no warm-up."""
    given = {"alias": "chat", "control": "old", "canary": "new", "warm_up_requests": 0}
    rails = [{"metric": metric} for metric in metrics or ("error",)]
    return Experiment.model_validate(given | {"guardrails": rails} | more)


def settings(each: Experiment | None) -> Settings:
    """A gateway with this experiment, or without any."""
    arm = {"upstream": "here", "model": "m"}
    experiments = {} if each is None else {NAME: each.model_dump()}
    return Settings.model_validate(
        {
            "upstreams": {"here": {"url": "http://127.0.0.1:1", "models": {"m": {}}}},
            "models": {"chat": {"arms": [{"name": "old", **arm}, {"name": "new", **arm}]}},
            "experiments": experiments,
        }
    )


def row(number: int, arm: str, at: float, **more: Any) -> Row:
    """A good call."""
    given: dict[str, Any] = {
        "row_id": f"r{number}",
        "request_id": f"q{number}",
        "at": at,
        "endpoint": "chat",
        "alias": "chat",
        "experiment": NAME,
        "arm": arm,
        "served_arm": arm,
        "unit": f"u{number}",
        "status": 200,
        "ttft": 0.2,
        "tpot": 0.02,
        "duration": 0.5,
        "output_tokens": 100,
        "cost": 1000,
    }
    return Row(**given | more)


def traffic(
    count: int, share: float, at: float, *, seed: int = 0, first: int = 0, fails: tuple[float, float] = (0.01, 0.01)
) -> Iterator[Row]:
    """So many calls, one a millisecond, after the window that opened at `at` has settled. fails: control, canary."""
    generator = np.random.default_rng((seed, first))
    for number in range(first, first + count):
        canary = bool(generator.random() < share)
        failed = bool(generator.random() < fails[canary])
        more: dict[str, Any] = {"error": "http", "status": 500, "ttft": None} if failed else {}
        if not failed:
            more["ttft"] = float(0.3 * np.exp(0.5 * generator.standard_normal()))
        moment = at + SETTLE_SECONDS + (number - first) / 1000
        yield row(number, "new" if canary else "old", moment, **more)


async def stored(items: Iterable[Any]) -> AsyncIterator[tuple[int, Any]]:
    """Items with the positions 1, 2, ..."""
    for position, item in enumerate(items, 1):
        yield position, item


class MemoryLedger:
    """A ledger in memory that several gateways may share. leader: the one that decides; None: whoever asks."""

    def __init__(self, page: int = 500) -> None:
        self.all_rows: list[Row] = []
        self.all_notes: list[Note] = []
        self.all_records: list[Record] = []
        self.leader: str | None = None
        self.page = page

    def of(self, gateway: str) -> LedgerOf:
        """The ledger as one of the gateways sees it."""
        return LedgerOf(self, gateway)


class LedgerOf:
    """`canaries.Ledger` of one gateway."""

    def __init__(self, ledger: MemoryLedger, gateway: str) -> None:
        self._ledger, self._gateway = ledger, gateway

    async def rows(self, experiment: str, after: int) -> Sequence[tuple[int, Row]]:
        found = enumerate(self._ledger.all_rows[after : after + self._ledger.page], after + 1)
        return [(position, row) for position, row in found if row.experiment == experiment]

    async def notes(self, experiment: str, after: int) -> Sequence[tuple[int, Note]]:
        return list(enumerate(self._ledger.all_notes[after : after + self._ledger.page], after + 1))

    async def records(self, experiment: str) -> Sequence[Record]:
        return [record for record in self._ledger.all_records if record.experiment == experiment]

    async def add(self, record: Record) -> None:
        if any(
            (each.experiment, each.number) == (record.experiment, record.number) for each in self._ledger.all_records
        ):
            raise FreeholdError(f"record {record.number} of {record.experiment!r} is there already")
        self._ledger.all_records.append(record)

    async def leads(self, experiment: str) -> bool:
        return self._ledger.leader in (None, self._gateway)
