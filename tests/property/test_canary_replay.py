"""Whatever an experiment lives through, the ledger gives the same records again; and not if a row was changed."""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from freehold.errors import InvalidRequest
from freehold.gateway.canary.machine import SETTLE_SECONDS, Canary, replay
from freehold.gateway.canary.record import COMMANDS, Record
from freehold.ledger import Note, Row
from tests.canarying import NAME, experiment, row, stored

ERRORS = ("", "", "", "", "", "", "http", "cut", "client_gone", "refused_here")


def live(seed: int, commands: float = 0.003, **more: Any) -> tuple[list[Record], list[Row], list[Note], Canary]:
    """An experiment with calls, notes, commands, retries, shadows and returning conversations in random order."""
    drawn = random.Random(seed)
    records: list[Record] = []
    rows: list[Row] = []
    notes: list[Note] = []
    each = experiment("error", "ttft", "ttft_p50", "cost", "quality", "feedback", **more)
    canary = Canary(NAME, each, 0.0, emit=records.append)
    at = 0.0
    for number in range(1000):
        at += drawn.choice((0.0, 0.01, 0.1))
        arm = "new" if drawn.random() < 0.4 else "old"
        given: dict[str, Any] = {"unit": f"u{drawn.randrange(400)}", "error": drawn.choice(ERRORS)}
        given["ttft"] = drawn.choice((None, drawn.lognormvariate(-1, 0.5)))
        given["cost"] = drawn.choice((None, drawn.randrange(5000)))
        given["conversation"] = drawn.choice(("", f"c{drawn.randrange(200)}"))
        if drawn.random() < 0.1:
            given["attempt"] = 1
        if rows and drawn.random() < 0.3:
            given |= {"shadow_of": drawn.choice(rows).row_id, "error": ""}
            arm = "new"
        rows.append(row(number, arm, at - drawn.choice((0.0, 3.0)), **given))
        canary.add(rows[-1], len(rows), at)
        if drawn.random() < 0.4:
            about, name = drawn.choice(rows[-50:]).row_id, drawn.choice(("judge.quality", "feedback"))
            notes.append(Note(row_id=about, at=at, name=name, value=drawn.choice((0.0, 0.25, 0.7, 1.0))))
            canary.add_note(notes[-1], len(notes))
        if drawn.random() < commands:
            with contextlib.suppress(InvalidRequest):
                canary.command(drawn.choice(COMMANDS), at, "somebody")
    return records, rows, notes, canary


def again(records: list[Record], rows: list[Row], notes: list[Note]) -> tuple[Canary, list[Record]]:
    return asyncio.run(replay(records, stored(rows), stored(notes)))


@settings(max_examples=6, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    aa_units=st.sampled_from((0, 150)),
    warm_up=st.sampled_from((0, 20)),
    margin=st.sampled_from((None, 0.5)),
)
def test_the_ledger_gives_the_same_records(seed: int, aa_units: int, warm_up: int, margin: float | None) -> None:
    more: dict[str, Any] = {"aa_units": aa_units, "warm_up_requests": warm_up, "steps": [0.4, 0.5], "max_requests": 300}
    if margin is not None:
        more["guardrails"] = [{"metric": name, "margin": margin} for name in ("error", "ttft", "quality")]
    records, rows, notes, canary = live(seed, **more)
    read = [Record.decode(record.encode()) for record in records]  # as they come out of the database
    assert read == records
    found, differing = again(read, rows, notes)
    assert not differing
    assert (found.state, found.step, found.shown) == (canary.state, canary.step, canary.shown)
    assert found.last == canary.last


def test_a_changed_row_a_missing_one_and_a_changed_record_are_found() -> None:
    records, rows, notes, _ = live(5, 0.0, steps=[0.4, 0.5])
    looks = [record for record in records if record.kind == "look"]
    assert len(looks) > 2
    assert not again(records, rows, notes)[1]
    index = next(
        index
        for index, each in enumerate(rows)
        if each.arm == "new"
        and not (each.shadow_of or each.error or each.attempt or each.conversation)
        and each.at > SETTLE_SECONDS + 1
    )
    changed = [*rows[:index], msgspec.structs.replace(rows[index], error="http"), *rows[index + 1 :]]
    assert again(records, changed, notes)[1]
    missing = [*rows[:index], row(0, "elsewhere", 0.0), *rows[index + 1 :]]
    assert again(records, missing, notes)[1]
    at = records.index(looks[1])
    forged = [*records[:at], msgspec.structs.replace(looks[1], reason="it was fine"), *records[at + 1 :]]
    assert again(forged, rows, notes)[1] == [forged[at]]
