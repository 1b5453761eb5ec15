"""The audit log's chain: each entry's hash covers its content and the hash of the entry before.

Whoever changes, removes or adds an entry in the middle must rewrite all that follow, and then the last hash is another.
Cutting entries off the end leaves a whole chain: keep the last hash elsewhere now and then (`freehold gateway audit
verify` prints it, the gateway logs it) and give it back with `--head`, and a cut shows as well.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from freehold.gateway.records import Entry

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
