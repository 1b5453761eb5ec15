"""`freehold ledger` and `freehold gateway key|audit`, on the database of a small gateway."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from freehold.cli.gateway_store import moment
from freehold.cli.main import main
from freehold.errors import InvalidRequest
from freehold.gateway.access.keys import Keys, digest_of
from freehold.gateway.keeping.records import KeyRecord, Reservation, day_of
from freehold.gateway.keeping.sqlite import SqliteStore
from tests.unit.gateway.ledger_rows import row
from tests.unit.gateway.settings_text import SETTINGS, settings

Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line in a folder with gateway.toml, and returns what it printed; `fails`: on stderr."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gateway.toml").write_text('[gateway]\ndata_dir = "data"\n' + SETTINGS)

    def command(line: str, fails: int = 0) -> str:
        capsys.readouterr()
        assert main(line.split()) == fails
        printed = capsys.readouterr()
        return printed.err if fails else printed.out

    return command


def fill(tmp_path: Path) -> None:
    async def work() -> None:
        store = SqliteStore(tmp_path / "data")
        await store.start()
        now = time.time()
        for n in range(20):
            store.append(
                row(
                    at=now - n / 1000,
                    request_id=f"r{n}",
                    prompt_name="summarise",
                    prompt_version=str(n // 10),
                    task="summary",
                    output_tokens=100 + n,
                    cost=1_000_000,
                    team="search",
                    status=200,
                )
            )
        store.append(row(at=now - 10 * 86_400, prompt_name="old"))
        store.reserve(Reservation("x", ("key:k",), day_of(now), 500_000, now))
        await store.stop()

    asyncio.run(work())


def test_a_key_is_made_works_and_is_revoked(run: Run, tmp_path: Path) -> None:
    token = run("gateway key new app --team search --scope chat --budget-per-day 2.5 --expires-in-days 7").strip()
    assert token.startswith("fh-")
    assert token not in (tmp_path / "data" / "ledger.sqlite3").read_bytes().decode("latin-1")
    (record,) = asyncio.run(_keys(tmp_path))
    assert record.digest == digest_of(token)
    caller = Keys(settings(), [record]).authenticate(token)
    assert caller is not None
    assert (caller.key_id, caller.budget_per_day, caller.team_budget_per_day) == ("app", 2_500_000, 500_000)
    listed = run("gateway key list")
    assert "app: expires" in listed
    assert "$2.50 a day" in listed
    assert token not in listed
    assert record.digest not in run("gateway key list --json")
    assert run("gateway key revoke app") == "revoked app\n"
    assert "app: revoked" in run("gateway key list")
    assert "no key 'app'" in run("gateway key revoke app", fails=2)
    assert "not used twice" in run("gateway key new app", fails=2)
    assert "no team 'none'" in run("gateway key new other --team none", fails=2)
    assert "no model 'none'" in run("gateway key new other --model none", fails=2)
    assert "a name has" in run("gateway key new a'b", fails=2)


async def _keys(tmp_path: Path) -> list[KeyRecord]:
    store = SqliteStore(tmp_path / "data")
    await store.start()
    found = await store.keys()
    await store.stop()
    return found


def test_the_audit_log_is_shown_and_checked(run: Run, tmp_path: Path) -> None:
    assert run("gateway audit verify").startswith("whole: 0 entries")
    run("gateway key new a")
    head = run("gateway audit verify").split()[-1]
    run("gateway key revoke a")
    assert run(f"gateway audit verify --head {head}").startswith("whole: 2 entries")
    assert "key.new a" in run("gateway audit show --last 2")
    assert json.loads(run("gateway audit show --json"))[1]["kind"] == "key.revoke"
    assert "tampered" in run(f"gateway audit verify --head {'0' * 64}", fails=1)


def test_costs_tokens_and_budgets_are_told(run: Run, tmp_path: Path) -> None:
    assert run("ledger cost") == "The ledger has no such rows.\n"
    fill(tmp_path)
    lines = run("ledger cost --since 7d").splitlines()
    assert lines[0].split()[:3] == ["prompt_name", "prompt_version", "requests"]
    assert [line.split()[0:3] for line in lines[1:]] == [["summarise", "0", "10"], ["summarise", "1", "10"]]
    assert lines[1].split()[-2:] == ["$10.00", "$1.00"]
    assert len(json.loads(run("ledger cost --by prompt_name --json"))) == 2
    told = json.loads(run("ledger tokens --json --only prompt_name=summarise"))
    assert told == [
        {"task": "summary", "model_id": "", "requests": 20, "mean": 109.5, "p50": 109, "p95": 118, "largest": 119}
    ]
    assert "mean" in run("ledger tokens --count output_tokens")
    spent = json.loads(run("ledger budgets --json"))
    assert spent["team:search"] == {"spent": 20_000_000, "reserved": 0, "budget": 500_000}
    assert spent["key:k"]["reserved"] == 500_000
    assert "$0.50" in run("ledger budgets")
    assert run("ledger release --silent-for 0m").startswith("1 reservation")
    assert "failures" in run("ledger regressions --from 0 --to 1")
    assert json.loads(run("ledger regressions --json --from 0 --to 1"))[0]["metric"] == "failures"


@pytest.mark.parametrize(
    "line",
    [
        "ledger cost --by nothing",
        "ledger cost --since yesterday",
        "ledger cost --only nothing=1",
        "ledger tokens --count cost",
        "ledger regressions --from 1",
        "ledger export rows.csv",
        "ledger forget",
        "ledger forget --user ann --everyone",
    ],
)
def test_what_makes_no_sense_is_refused(run: Run, line: str) -> None:
    assert run(line, fails=2).startswith("error: ")


def test_rows_are_exported_and_people_forgotten(run: Run, tmp_path: Path) -> None:
    fill(tmp_path)
    assert run("ledger export rows.jsonl --since 1d") == "rows.jsonl: 20 rows\n"
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 20
    assert run("ledger forget --user ann").startswith("0 rows")
    before = (tmp_path / "data" / "identity.key").read_bytes()
    assert "destroyed" in run("ledger forget --everyone")
    assert not (tmp_path / "data" / "identity.key").exists()
    run("ledger forget --user ann")
    assert (tmp_path / "data" / "identity.key").read_bytes() != before


def test_moments() -> None:
    assert moment(None, "since") is None
    assert moment("2h", "since", now=lambda: 10_000.0) == 2800
    assert moment("1w", "since", now=lambda: 604_800.0) == 0
    assert moment("1970-01-02", "since") == 86_400
    assert moment("1970-01-01T01:00+01:00", "since") == 0
    with pytest.raises(InvalidRequest, match="like 12h"):
        moment("soon", "since")
