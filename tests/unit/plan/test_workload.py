"""Workloads: what is drawn, what is read, what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from freehold.errors import InvalidRequest
from freehold.plan.lengths import Lengths, lengths, read_calls
from freehold.plan.workload import GOLDEN_ACCEPTANCE, Workload, from_calls

PLAIN = Workload(lengths("8192"), lengths("1000-2000"), concurrency=32)


def test_lengths_by_what_people_write() -> None:
    assert lengths("8192") == Lengths(8192, 8192)
    assert lengths("1_000 - 9,000") == Lengths(1000, 9000)
    assert lengths(8192.0) == Lengths(8192, 8192)
    assert lengths("1000-9000").mean == 5000
    for wrong in ("", "many", "0", "9-1", "-5", "1e9", "1-2-3"):
        with pytest.raises(InvalidRequest):
            lengths(wrong)


def test_draws_are_within_and_the_same_again() -> None:
    calls = PLAIN.draw(500, seed=3)
    assert calls == PLAIN.draw(500, seed=3)
    assert calls != PLAIN.draw(500, seed=4)
    assert {call.prompt for call in calls} == {8192}
    outputs = [call.output for call in calls]
    assert (min(outputs) >= 1000, max(outputs) <= 2000) == (True, True)
    assert sum(outputs) / 500 == pytest.approx(1500, rel=0.03)


def test_means_and_longest() -> None:
    assert (PLAIN.prompt, PLAIN.output, PLAIN.longest) == (8192, 1500, 10192)
    assert PLAIN.tokens.cached == 0
    assert PLAIN.with_hit_rate(0.5).tokens.cached == 4096
    assert PLAIN.with_hit_rate(0.5).draw(1)[0].cached == 4096


def test_replicas_share_the_load() -> None:
    assert PLAIN.shared_by(5).concurrency == 7
    opened = Workload(lengths("10"), lengths("10"), rate=6.0)
    assert opened.shared_by(4).rate == 1.5
    assert opened.at(9).concurrency == 9


def test_acceptance_is_the_published_one_unless_given() -> None:
    drafting = Workload(lengths("10"), lengths("10"), concurrency=1, drafts=5)
    assert drafting.acceptance == GOLDEN_ACCEPTANCE[5] == 3.61
    assert drafting.with_acceptance(9.0).acceptance == 6.0
    assert "5 drafts giving 3.61" in str(drafting)


def test_effort_leaves_thinking_away() -> None:
    quiet = Workload(lengths("10"), lengths("4300"), concurrency=1, effort="off")
    assert quiet.output == pytest.approx(600)
    assert quiet.draw(1)[0].output == 600


@pytest.mark.parametrize(
    "wrong",
    [
        {"concurrency": None},
        {"rate": 1.0},
        {"concurrency": 0},
        {"concurrency": None, "rate": -1.0},
        {"concurrency": None, "rate": float("nan")},
        {"hit_rate": 1.0},
        {"hit_rate": -0.1},
        {"drafts": 9},
        {"drafts": 2, "acceptance_length": 3.5},
        {"acceptance_length": 1.5},
    ],
)
def test_loads_that_cannot_be(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidRequest):
        Workload(**({"prompt_lengths": lengths("10"), "output_lengths": lengths("10"), "concurrency": 4} | wrong))  # type: ignore[arg-type]


# ── own calls ─────────────────────────────────────────────────────────────────────────────────────────────────────────

ROWS = [
    {"usage": {"prompt_tokens": 100, "completion_tokens": 20, "prompt_tokens_details": {"cached_tokens": 60}}},
    {"prompt_tokens": 300, "completion_tokens": 40, "cached_tokens": 100, "timestamp": 12.0, "model": "x"},
    {"input_length": 50, "output_length": 5},
    {"usage": {"input_tokens": 10, "output_tokens": 7, "cache_read_input_tokens": 90}},
    {"prompt_tokens": 10, "completion_tokens": 0},
]


def written(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return path


def test_calls_by_the_names_that_logs_use(tmp_path: Path) -> None:
    calls = read_calls(written(tmp_path / "calls.jsonl", ROWS))
    assert [(call.prompt, call.output, call.cached) for call in calls] == [
        (100, 20, 60),
        (300, 40, 100),
        (50, 5, 0),
        (100, 7, 90),  # Anthropic's input_tokens leave cached ones out
    ]
    load = from_calls(calls, concurrency=4)
    assert load.prompt == pytest.approx(137.5)
    assert load.hits == pytest.approx(250 / 550)
    assert {(call.prompt, call.output) for call in load.draw(200)} == {(c.prompt, c.output) for c in calls}
    assert load.as_dict()["calls"] == 4
    json.dumps(load.as_dict())


def test_the_rate_of_calls_with_times(tmp_path: Path) -> None:
    rows = [{"prompt_tokens": 9, "completion_tokens": 9, "started": 100 + 2 * n} for n in range(11)]
    assert from_calls(read_calls(written(tmp_path / "c.jsonl", rows))).rate == pytest.approx(0.5)
    with pytest.raises(InvalidRequest, match="rate"):
        from_calls(read_calls(written(tmp_path / "c.jsonl", rows[:1])))


@pytest.mark.parametrize(
    ("row", "told_of"),
    [
        ("{", "line 2: not JSON"),
        ("3", "line 2: expected an object"),
        ('{"prompt_tokens": 5}', "line 2: no number of output tokens"),
        ('{"prompt_tokens": -5, "completion_tokens": 1}', "line 2: prompt_tokens = -5"),
        ('{"prompt_tokens": true, "completion_tokens": 1}', "line 2: prompt_tokens = True"),
        ('{"prompt_tokens": 5, "completion_tokens": 1, "cached_tokens": 6}', "line 2: 5 prompt tokens of which 6"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, row: str, told_of: str) -> None:
    path = tmp_path / "calls.jsonl"
    path.write_text('{"prompt_tokens": 5, "completion_tokens": 1}\n' + row + "\n")
    with pytest.raises(InvalidRequest, match=told_of):
        read_calls(path)


def test_files_without_calls(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="not readable"):
        read_calls(tmp_path / "none.jsonl")
    with pytest.raises(InvalidRequest, match="no call"):
        read_calls(written(tmp_path / "empty.jsonl", []))


def ledger_row(number: int, **others: object) -> dict[str, object]:
    """A row as the gateway's ledger stores it: fields with their defaults are left out."""
    row = {"row_id": f"r{number}", "request_id": f"q{number}", "at": 1000.0 + number, "endpoint": "chat", "alias": "m"}
    return row | {"status": 200, "input_tokens": 500, "output_tokens": 40, "counted": "upstream", "cost": 3} | others


def test_a_gateways_ledger_is_a_workload(tmp_path: Path) -> None:
    file = tmp_path / "ledger.jsonl"
    uncounted = {key: value for key, value in ledger_row(3, error="connect").items() if not key.endswith("_tokens")}
    rows: list[dict[str, object]] = [
        ledger_row(0, cached_tokens=400),
        ledger_row(1, error="cut", output_tokens=7),
        ledger_row(9, request_id="q1", attempt=1, output_tokens=90),
        ledger_row(2, shadow_of="r0", output_tokens=5000),
        uncounted,
        ledger_row(4, endpoint="embeddings", output_tokens=0),
        {"row_id": "r0", "at": 1500.0, "name": "feedback", "value": 1.0},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    calls = read_calls(file)
    assert [(call.prompt, call.output, call.cached) for call in calls] == [(500, 40, 400), (500, 90, 0)]
    load = from_calls(calls)
    assert load.rate == pytest.approx(1 / 9)
    assert load.hits == 0.4
    file.write_text(json.dumps(ledger_row(0, input_tokens=-5)))
    with pytest.raises(InvalidRequest, match="line 1"):
        read_calls(file)
