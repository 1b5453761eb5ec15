"""`freehold canary` against the admin API over a real socket."""

from __future__ import annotations

import asyncio
import getpass
import json
import threading
from collections.abc import Iterator

import pytest
from aiohttp import web

from freehold.cli.main import main
from freehold.gateway.canary.canaries import Canaries
from freehold.gateway.parts import Asked
from tests.canarying import NAME, MemoryLedger, experiment, settings, traffic


class Admin:
    """The admin routes of a canary that has been looked at, on a port of its own thread."""

    def __init__(self) -> None:
        self.ledger = MemoryLedger()
        each = experiment("error", "ttft", "ttft_p95", "cost", "quality")
        self.canaries = Canaries(self.ledger.of("a"), settings(each), clock=lambda: 0.0)
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.url = asyncio.run_coroutine_threadsafe(self._start(), self.loop).result(30)

    async def _start(self) -> str:
        await self.canaries.advance(NAME)
        self.ledger.all_rows += traffic(3000, 0.05, 0.0)
        await self.canaries.advance(NAME)
        app = web.Application()
        for route, handler in self.canaries.routes().items():
            method, path = route.split(" ")

            async def answer(request: web.Request, handler: object = handler) -> web.Response:
                if request.headers.get("authorization") != "Bearer admin-key":
                    return web.json_response({"error": {"message": "this needs the admin key"}}, status=401)
                asked = Asked(request.method, request.path, request.query, {}, b"", names=dict(request.match_info))
                found = await handler(asked)  # type: ignore[operator]
                return web.Response(body=found.body, content_type="application/json")

            app.router.add_route(method, path, answer)
        self.runner = web.AppRunner(app)
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{self.runner.addresses[0][1]}"

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self.runner.cleanup(), self.loop).result(30)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@pytest.fixture
def admin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Admin]:
    monkeypatch.setenv("FREEHOLD_ADMIN_KEY", "admin-key")
    monkeypatch.setenv("COLUMNS", "160")
    made = Admin()
    yield made
    made.close()


def test_status_shows_each_guardrail_and_what_could_be_seen(admin: Admin, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["canary", "status", "--url", admin.url]) == 0
    shown = capsys.readouterr().out
    assert f"{NAME}  chat: old → new   ramping, the canary gets 5%" in shown
    lines = {line.split()[0]: line for line in shown.splitlines() if line.strip()}
    assert {"error", "ttft", "ttft_p95", "cost", "quality"} <= set(lines)
    assert "+1.00 pt" in lines["error"]
    assert " ms" in lines["ttft"]
    assert "%" in lines["ttft_p95"]
    assert "?" in lines["quality"]
    assert all(line.rstrip().endswith(("open", "fine")) for name, line in lines.items() if name in ("error", "quality"))
    assert main(["canary", "status", NAME, "--url", admin.url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["canary"] == "new"


def test_commands_are_obeyed_and_say_who_gave_them(admin: Admin, capsys: pytest.CaptureFixture[str]) -> None:
    for command, says in (("pause", "hold"), ("resume", "ramping"), ("force", "ramping"), ("abort", "rolled_back")):
        assert main(["canary", command, NAME, "--url", admin.url]) == 0
        assert f"{NAME}: {says}, the canary gets" in capsys.readouterr().out
    assert admin.ledger.all_records[-1].by == getpass.getuser()
    assert main(["canary", "resume", NAME, "--url", admin.url]) == 1
    assert main(["canary", "status", NAME, "--url", admin.url]) == 0
    assert "rolled back 0%: abort by" in capsys.readouterr().out


def test_replay_says_whether_it_comes_out_the_same(admin: Admin, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["canary", "replay", NAME, "--url", admin.url]) == 0
    assert "the same again" in capsys.readouterr().out
    del admin.ledger.all_rows[100]
    assert main(["canary", "replay", NAME, "--url", admin.url]) == 1
    assert "do not follow from the ledger" in capsys.readouterr().err


def test_errors_are_one_line(admin: Admin, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["canary", "status", "another", "--url", "http://127.0.0.1:9"]) == 5
    assert "cannot reach" in capsys.readouterr().err
    monkeypatch.setenv("FREEHOLD_ADMIN_KEY", "wrong")
    assert main(["canary", "status", "--url", admin.url]) == 2
    assert "this needs the admin key" in capsys.readouterr().err
