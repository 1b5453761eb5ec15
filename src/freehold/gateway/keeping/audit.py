"""The audit log's chain: each entry's hash covers its content and the hash of the entry before.

Whoever changes, removes or adds an entry in the middle must rewrite all that follow, and then the last hash is another.
Cutting entries off the end leaves a whole chain: keep the last hash elsewhere now and then (`freehold gateway audit
verify` prints it, the gateway logs it) and give it back with `--head`, and a cut shows as well.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from freehold.errors import FreeholdError
from freehold.gateway.config import Settings
from freehold.gateway.keeping.records import Entry

_log = logging.getLogger(__name__)

START = "0" * 64
"""What the first entry names as the one before."""


def entry_after(
    last: tuple[int, str] | None, *, at: float, actor: str, kind: str, subject: str, detail: dict[str, Any]
) -> Entry:
    """The next entry. last: number and hash of the last one, None if there is none. detail: plain JSON data."""
    seq, previous = (1, START) if last is None else (last[0] + 1, last[1])
    kept = json.loads(json.dumps(detail))  # as it will be read back: tuples are lists, keys are strings
    digest = _digest(seq, at, actor, kind, subject, kept, previous)
    return Entry(seq=seq, at=at, actor=actor, kind=kind, subject=subject, detail=kept, previous=previous, hash=digest)


def fault_of(entries: Iterable[Entry], head: str = "") -> str:
    """What is wrong with the log, or '' if it is whole. entries: all, by number. head: a hash that must be in it."""
    seq, previous, seen_head = 0, START, not head
    for entry in entries:
        seq += 1
        if entry.seq != seq:
            return f"entry {seq} is missing: the next one there is {entry.seq}"
        if entry.previous != previous:
            return f"entry {seq} does not follow the one before it"
        found = _digest(entry.seq, entry.at, entry.actor, entry.kind, entry.subject, entry.detail, entry.previous)
        if found != entry.hash:
            return f"entry {seq} is not what was written: its hash is another"
        previous = entry.hash
        seen_head = seen_head or entry.hash == head
    return "" if seen_head else f"the log ends at entry {seq}, before the one with the hash {head}"


def _digest(seq: int, at: float, actor: str, kind: str, subject: str, detail: dict[str, Any], previous: str) -> str:
    # JSON with sorted keys and no spaces: one text for one content. Floats are written so that they read back the same.
    content = json.dumps([seq, at, actor, kind, subject, detail, previous], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(content.encode()).hexdigest()


class Recorder(Protocol):
    """The store."""

    async def record(self, kind: str, subject: str, detail: Mapping[str, Any], actor: str) -> Entry: ...


class SettingsLog:
    """Writes each change of the settings to the audit log: their hash, and what in them is another than before.

    Values are not written down: an address may hold what only its owner should read.
    """

    def __init__(self, store: Recorder) -> None:
        self._store = store
        self._before: Settings | None = None
        self._running: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Lock()  # one after the other, as they came into force

    def configure(self, settings: Settings) -> None:
        """Note the settings that are in force from now on; the first ones are those of the start."""
        before, self._before = self._before, settings
        if before == settings:
            return
        detail = {"sha256": hashlib.sha256(settings.model_dump_json().encode()).hexdigest()}
        changed = [] if before is None else changes(before, settings)
        task = asyncio.get_running_loop().create_task(self._write(detail | {"changed": changed}, first=before is None))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def finish(self) -> None:
        """Return when all of it is written."""
        await asyncio.gather(*self._running)

    async def _write(self, detail: dict[str, Any], *, first: bool) -> None:
        try:
            async with self._turn:
                await self._store.record("config.start" if first else "config.change", "", detail, "gateway")
        except FreeholdError as error:
            _log.error("the audit log has no entry for new settings: %s", error)


def changes(before: Settings, after: Settings) -> list[str]:
    """What differs, as `upstreams.local` and `gateway.air_gapped`: sections, and their entries by name."""
    found = []
    old, new = before.model_dump(), after.model_dump()
    for section in old:
        one, other = old[section], new[section]
        if isinstance(one, dict) and isinstance(other, dict):
            missing = object()
            names = sorted({*one, *other})
            found += [f"{section}.{name}" for name in names if one.get(name, missing) != other.get(name, missing)]
        elif one != other:
            found.append(section)
    return found
