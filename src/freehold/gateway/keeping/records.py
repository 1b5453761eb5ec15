"""What the gateway's database holds beside the rows of calls: keys, reservations, the audit log, experiments."""

from __future__ import annotations

from typing import Any

import msgspec

DAY_SECONDS = 86_400


def day_of(at: float) -> int:
    """The UTC day of a time in epoch seconds, counted from 1970-01-01: what budgets are for."""
    return int(at // DAY_SECONDS)


class KeyRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A key made by command. Only its SHA-256 is kept. Amounts in micro-dollars, times in epoch seconds."""

    key_id: str
    digest: str  # SHA-256 of the key, hex
    team: str = ""
    scopes: tuple[str, ...] = ()
    models: tuple[str, ...] = ()  # aliases; empty: all
    data_class: str = ""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent: int | None = None
    budget_per_day: int | None = None
    created_at: float = 0.0
    expires_at: float | None = None
    revoked_at: float | None = None


class Reservation(msgspec.Struct, frozen=True):
    """What one running call may cost at most, taken from each budget it counts against."""

    id: str
    scopes: tuple[str, ...]  # "key:ID", "team:NAME"
    day: int
    amount: int  # micro-dollars
    at: float


class Released(msgspec.Struct, frozen=True):
    """The end of a reservation: its call's rows say what it did cost."""

    id: str


class Usage(msgspec.Struct, frozen=True):
    """Where a budget stands on a day. Micro-dollars."""

    scope: str
    spent: int
    reserved: int  # by running calls, and by those that a killed gateway left


class Text(msgspec.Struct, frozen=True):
    """The text of a call, where it is kept at all: after redaction."""

    row_id: str
    at: float
    request: str
    answer: str


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A line of the audit log. `hash` covers all other fields, and through `previous` every line before."""

    seq: int
    at: float
    actor: str
    kind: str
    subject: str
    detail: dict[str, Any]
    previous: str
    hash: str


class Decided(msgspec.Struct, frozen=True):
    """What happened to an experiment. number: 0, 1, ... within the experiment."""

    experiment: str
    number: int
    at: float
    record: dict[str, Any]
