"""What the store does to its database, as transactions that know no driver.

A transaction is a generator: it yields statements, is given the rows of each, and returns its result. SQLite runs it on
the writer's thread, PostgreSQL on the event loop; both begin before its first statement and commit when it returns, or
roll back when it raises. Parameters are $1, $2, ..., which PostgreSQL reads as they are and SQLite after one `replace`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import msgspec

from freehold.errors import Conflict, InvalidRequest, NotFound
from freehold.gateway.keeping.audit import entry_after
from freehold.gateway.keeping.records import Entry, KeyRecord, Released, Reservation, Text, day_of
from freehold.ledger import Note, Row

T = TypeVar("T")
Values: TypeAlias = Sequence[Any]


class Do(NamedTuple):
    """One statement, once."""

    sql: str
    values: Values = ()


class Many(NamedTuple):
    """One statement, once for each tuple of values."""

    sql: str
    rows: Sequence[Values]


class Lock(NamedTuple):
    """Until the transaction ends, no other one with this lock runs, in any gateway. SQLite has one writer anyway."""

    number: int


Statement: TypeAlias = Do | Many | Lock
Transaction: TypeAlias = Generator[Statement, list[tuple[Any, ...]], T]
AppendedItem: TypeAlias = Row | Note | Text | Reservation | Released

MIGRATING, AUDITING = 1, 2  # numbers of locks

COLUMNS = tuple(Row.__struct_fields__)
QUOTED = ", ".join(f'"{name}"' for name in COLUMNS)


def _insert(table: str, columns: Sequence[str], more: str = "") -> str:
    names = ", ".join(f'"{column}"' for column in columns)
    places = ", ".join(f"${number}" for number in range(1, len(columns) + 1))
    return f"INSERT INTO {table} ({names}) VALUES ({places}){more}"


INSERT_CALL = _insert("calls", (*COLUMNS, "position"), " ON CONFLICT (row_id) DO NOTHING")
INSERT_NOTE = _insert("notes", (*Note.__struct_fields__, "position"))
INSERT_TEXT = _insert("texts", Text.__struct_fields__, " ON CONFLICT (row_id) DO NOTHING")
INSERT_RESERVATION = _insert("reservations", ("id", "scope", "day", "amount", "writer", "at"))
ADD_SPEND = (
    "INSERT INTO spend (scope, day, spent) VALUES ($1, $2, $3) "
    "ON CONFLICT (scope, day) DO UPDATE SET spent = spend.spent + excluded.spent"
)


def scopes_of(key_id: str, team: str) -> tuple[str, ...]:
    """The budgets that a call counts against, in the order in which they are locked."""
    return (f"key:{key_id}", f"team:{team}") if team else (f"key:{key_id}",)


class Batch:
    """What was appended since the last batch, sorted by table. A reservation that ended within it leaves no trace."""

    def __init__(self, items: Iterable[AppendedItem], writer: str, number: int) -> None:
        self.items = list(items)
        self.writer = writer
        self.number = number
        self.calls: list[Values] = []
        self.notes: list[Values] = []
        self.texts: list[Values] = []
        self.released: list[Values] = []
        self._reserved: dict[str, Reservation] = {}
        self._spent: defaultdict[tuple[str, int], int] = defaultdict(int)
        for item in self.items:
            kind = type(item)
            if isinstance(item, Row):
                self.calls.append(msgspec.structs.astuple(item))
                self._charge(item)
            elif isinstance(item, Reservation):
                self._reserved[item.id] = item
            elif isinstance(item, Released):
                if self._reserved.pop(item.id, None) is None:
                    self.released.append((item.id,))
            elif kind is Note:
                self.notes.append(msgspec.structs.astuple(item))
            else:
                self.texts.append(msgspec.structs.astuple(item))

    def _charge(self, row: Row) -> None:
        if row.cost and not row.shadow_of:  # a mirrored call is the operator's wish, not the key's
            for scope in scopes_of(row.key_id, row.team):
                self._spent[scope, day_of(row.at)] += row.cost

    @property
    def reserved(self) -> list[Values]:
        return [
            (r.id, scope, r.day, r.amount, self.writer, r.at) for r in self._reserved.values() for scope in r.scopes
        ]

    @property
    def spent(self) -> list[Values]:
        """(scope, day, micro-dollars), in the one order in which budgets are locked."""
        return [(scope, day, amount) for (scope, day), amount in sorted(self._spent.items())]


def scrubbed(item: AppendedItem) -> AppendedItem:
    """The item as every database takes it: without NUL and half characters, integers of 64 bits."""
    changes: dict[str, Any] = {}
    for name in item.__struct_fields__:
        value = getattr(item, name)
        if isinstance(value, str):
            changes[name] = value.replace("\0", "\ufffd").encode("utf-8", "replace").decode()
        elif isinstance(value, int) and not isinstance(value, bool):
            changes[name] = max(-(2**63), min(value, 2**63 - 1))
    return msgspec.structs.replace(item, **changes)


def write_batch(batch: Batch, at: float) -> Transaction[None]:
    """Write it, unless it is in the database already: a commit may have succeeded though its answer was lost."""
    fresh = yield Do(
        "INSERT INTO writers (writer, batch, at) VALUES ($1, $2, $3) ON CONFLICT (writer) "
        "DO UPDATE SET batch = excluded.batch, at = excluded.at WHERE writers.batch < excluded.batch RETURNING batch",
        (batch.writer, batch.number, at),
    )
    if not fresh:
        return
    calls, notes = batch.calls, batch.notes
    if calls or notes:
        # From here until it commits no other gateway gets a position: positions rise in the order of commits.
        moved = yield Do(
            "UPDATE counters SET number = number + $1 WHERE name = 'position' RETURNING number",
            (len(calls) + len(notes),),
        )
        first = moved[0][0] - len(calls) - len(notes) + 1
        calls = [(*values, position) for position, values in enumerate(calls, first)]
        notes = [(*values, position) for position, values in enumerate(notes, first + len(calls))]
    for sql, rows in (
        (INSERT_CALL, calls),
        (INSERT_NOTE, notes),
        (INSERT_TEXT, batch.texts),
        (ADD_SPEND, batch.spent),
        (INSERT_RESERVATION, batch.reserved),
        ("DELETE FROM reservations WHERE id = $1", batch.released),
    ):
        if rows:
            yield Many(sql, rows)


def add_entry(at: float, actor: str, kind: str, subject: str, detail: Mapping[str, Any]) -> Transaction[Entry]:
    """Add a line to the audit log."""
    yield Lock(AUDITING)
    last = yield Do("SELECT seq, hash FROM audit ORDER BY seq DESC LIMIT 1")
    entry = entry_after(
        (last[0][0], last[0][1]) if last else None, at=at, actor=actor, kind=kind, subject=subject, detail=dict(detail)
    )
    yield Do(
        _insert("audit", Entry.__struct_fields__),
        (entry.seq, at, actor, kind, subject, json.dumps(entry.detail), entry.previous, entry.hash),
    )
    return entry


def _revise(name: str) -> Do:
    return Do("UPDATE counters SET number = number + 1 WHERE name = $1", (name,))


def add_key(record: KeyRecord, at: float, actor: str) -> Transaction[None]:
    """Raises InvalidRequest if the name was ever used: rows of the ledger still name the old key by it."""
    taken = yield Do("SELECT 1 FROM keys WHERE key_id = $1", (record.key_id,))
    if taken:
        raise InvalidRequest(f"there is or was a key {record.key_id!r}; names are not used twice", param="name")
    text = msgspec.json.encode(record).decode()
    yield Do(_insert("keys", ("key_id", "digest", "record")), (record.key_id, record.digest, text))
    yield _revise("keys")
    shown = {name: value for name, value in msgspec.to_builtins(record).items() if name != "digest"}
    yield from add_entry(at, actor, "key.new", record.key_id, shown)


def revoke_key(key_id: str, at: float, actor: str) -> Transaction[None]:
    """Raises NotFound if there is no such key, or it was revoked before."""
    found = yield Do(
        "UPDATE keys SET revoked_at = $2 WHERE key_id = $1 AND revoked_at IS NULL RETURNING key_id", (key_id, at)
    )
    if not found:
        raise NotFound(f"there is no key {key_id!r} that could be revoked")
    yield _revise("keys")
    yield from add_entry(at, actor, "key.revoke", key_id, {})


def add_decision(
    experiment: str, number: int, record: Mapping[str, Any], at: float, actor: str, audited: bool
) -> Transaction[None]:
    """Write down what happened to an experiment. Raises Conflict if there is a record of that number: somebody else
    was first. audited: also in the audit log."""
    sql = _insert("decisions", ("experiment", "number", "at", "record"), " ON CONFLICT DO NOTHING RETURNING number")
    added = yield Do(sql, (experiment, number, at, json.dumps(record)))
    if not added:
        raise Conflict(f"experiment {experiment!r} has a record {number} already: another gateway was first")
    if audited:
        yield from add_entry(at, actor, "decision", experiment, record)


def lead(name: str, holder: str, seconds: float) -> Transaction[bool]:
    """Take or keep a lease for so long, by the database's clock. Whether it is the holder's now. PostgreSQL only."""
    now = "extract(epoch FROM clock_timestamp())"
    held = yield Do(
        f"INSERT INTO leases (name, holder, until) VALUES ($1, $2, {now} + $3) ON CONFLICT (name) DO UPDATE "
        f"SET holder = excluded.holder, until = excluded.until WHERE leases.holder = $2 OR leases.until < {now} "
        "RETURNING holder",
        (name, holder, seconds),
    )
    return bool(held)


def forget_user(user: str) -> Transaction[int]:
    """Blank a person's pseudonyms, and delete their texts. Returns how many rows there were."""
    yield Do("""DELETE FROM texts WHERE row_id IN (SELECT row_id FROM calls WHERE "user" = $1)""", (user,))
    yield Do("""DELETE FROM pins WHERE conversation IN (SELECT conversation FROM calls WHERE "user" = $1)""", (user,))
    rows = yield Do(
        """UPDATE calls SET "user" = '', unit = '', conversation = '' WHERE "user" = $1 RETURNING row_id""", (user,)
    )
    return len(rows)


def prune(before: float, limit: int) -> Transaction[int]:
    """Delete up to `limit` of the rows from before a time, with their notes and texts. Returns how many.

    Texts go in time. Rows of an experiment that was looked at since then stay, for its decisions to be made again.
    """
    chosen = (
        "SELECT row_id FROM calls WHERE at < $1 AND (experiment = '' OR experiment NOT IN "
        "(SELECT experiment FROM decisions WHERE at >= $1)) ORDER BY at, row_id LIMIT $2"
    )
    yield Do("DELETE FROM texts WHERE row_id IN (SELECT row_id FROM calls WHERE at < $1)", (before,))
    yield Do(f"DELETE FROM notes WHERE row_id IN ({chosen})", (before, limit))
    rows = yield Do(f"DELETE FROM calls WHERE row_id IN ({chosen}) RETURNING row_id", (before, limit))
    return len(rows)


def drop_old_reservations(today: int) -> Transaction[None]:
    """Reservations of days before yesterday hold nothing any more. (Yesterday's calls may still run.)"""
    yield Do("DELETE FROM reservations WHERE day < $1", (today - 1,))


def drop_old_pins(before: float) -> Transaction[None]:
    """Where conversations that ended long ago began, and gateways that are gone."""
    yield Do("DELETE FROM pins WHERE at < $1", (before,))
    yield Do("DELETE FROM followers WHERE until < $1", (before,))


def release_stranded(writers: Sequence[str]) -> Transaction[int]:
    """Give back what killed gateways left reserved. Returns how many reservations."""
    released = 0
    for writer in writers:
        rows = yield Do("DELETE FROM reservations WHERE writer = $1 RETURNING id", (writer,))
        released += len({row[0] for row in rows})
    return released
