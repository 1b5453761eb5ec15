"""Who may read `/metrics`, how often feedback may be given, and when a gateway without keys is open no more."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from freehold.cli.main import main
from freehold.errors import ConfigError
from freehold.gateway.config import parse
from freehold.gateway.keeping import store as store_module
from freehold.gateway.keeping.records import KeyRecord
from freehold.gateway.keeping.sqlite import SqliteStore
from tests.live_gateway import LiveGateway
from tests.scripted_upstream import Scripted

Start = Callable[..., LiveGateway]
StartUpstream = Callable[..., Scripted]

ADMIN = "admin-1d0f2c7b9a54e8"
KEY = "key-of-app"


def config(url: str, head: str = "", more: str = "") -> str:
    return f"""{head}
[upstreams.u]
url = "{url}"
models.m = {{}}
[models.glm]
arms = [{{name = "a", upstream = "u", model = "m"}}]
{more}"""


def key(more: str = "") -> str:
    return f'[keys.app]\nsha256 = "{hashlib.sha256(KEY.encode()).hexdigest()}"\n{more}\n'


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"} if token else {}


def ask(live: LiveGateway, token: str = "") -> httpx.Response:
    body = {"model": "glm", "messages": [], "max_tokens": 1}
    return httpx.post(f"{live.url}/v1/chat/completions", json=body, headers=bearer(token), timeout=20)


# ---- /metrics ---------------------------------------------------------------------------------------------------


def test_metrics_may_be_kept_for_the_admin(
    gateway: Start, upstream: StartUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOOR_ADMIN", ADMIN)
    head = '[gateway]\nadmin_key_env = "DOOR_ADMIN"\n'
    text = config(upstream().url, head, key())
    live = gateway(text)
    assert httpx.get(f"{live.url}/metrics").status_code == 200, "as a rule, programs of this machine may"
    live.write(text.replace(head, head + 'metrics = "admin"\n'))
    live.reload()
    for token in ("", KEY, "none", ADMIN[:-1]):
        answer = httpx.get(f"{live.url}/metrics", headers=bearer(token))
        assert (answer.status_code, "freehold_gateway" in answer.text) == (401, False), token
    assert "freehold_gateway" in httpx.get(f"{live.url}/metrics", headers=bearer(ADMIN)).text
    assert httpx.get(f"{live.url}/health").status_code == httpx.get(f"{live.url}/ready").status_code == 200


@pytest.mark.parametrize(
    ("head", "says"),
    [
        ('[gateway]\nmetrics = "admin"', "needs admin_key_env or admin_key_file"),
        ('[gateway]\nmetrics = "everybody"', "gateway.metrics"),
        ("[gateway]\nmetrics = true", "gateway.metrics"),
    ],
)
def test_who_may_read_metrics_is_one_of_two(head: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse(config("http://127.0.0.1:1/v1", head))


# ---- /v1/feedback -----------------------------------------------------------------------------------------------


def give(live: LiveGateway, token: str = KEY, **body: object) -> httpx.Response:
    sent = {"row_id": "01J", "value": 1.0, **body}
    return httpx.post(f"{live.url}/v1/feedback", json=sent, headers=bearer(token))


def test_feedback_counts_as_a_request_of_its_key(gateway: Start, upstream: StartUpstream) -> None:
    live = gateway(config(upstream().url, more=key("requests_per_minute = 4")))
    first = give(live)
    assert (first.status_code, first.headers["x-ratelimit-limit-requests"]) == (200, "4")
    assert first.headers["x-ratelimit-remaining-requests"] == "3"
    assert ask(live, KEY).headers["x-ratelimit-remaining-requests"] == "2"
    bad = give(live, value=2.0)  # counts too, or a client in error could ask without end
    assert (bad.status_code, bad.headers["x-ratelimit-remaining-requests"]) == (400, "1")
    assert give(live).status_code == 200
    for refused in (give(live), ask(live, KEY)):
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        assert refused.headers["x-should-retry"] == "true"
        assert 1 <= int(refused.headers["retry-after"]) <= 15
        assert 1 <= int(refused.headers["retry-after-ms"]) <= 15_000


def test_feedback_without_a_rate_is_as_it_was(gateway: Start, upstream: StartUpstream) -> None:
    live = gateway(config(upstream().url, more=key("max_concurrent = 1")))
    for _ in range(5):
        answer = give(live)
        assert answer.status_code == 200
        assert not [name for name in answer.headers if name.startswith("x-ratelimit")]
    assert give(live, token="none").status_code == 401


# ---- the first key ----------------------------------------------------------------------------------------------


def test_the_first_key_closes_the_gateway_at_once(
    gateway: Start, upstream: StartUpstream, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(store_module, "WATCH_SECONDS", 3600.0)  # the watch sees nothing in this test
    live = gateway(config(upstream().url))
    assert ask(live).status_code == 200
    assert main(["gateway", "key", "new", "app", "--config", str(live.path)]) == 0
    token = capsys.readouterr().out.strip()
    assert ask(live).status_code == 401
    assert httpx.get(f"{live.url}/v1/models").status_code == 401
    assert ask(live, token).status_code == 200
    assert ask(live, token + "x").status_code == 401


def test_the_command_says_where_it_cannot_be_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Shared(SqliteStore):  # the command is told by the settings, and opens whatever store they lead to
        pass

    path = tmp_path / "g.toml"
    path.write_text(config("http://127.0.0.1:1/v1", '[store]\nkind = "postgres"\n'))
    monkeypatch.setattr(store_module, "open_store", lambda settings: Shared(tmp_path / "data"))
    assert main(["gateway", "key", "new", "app", "--config", str(path)]) == 0
    assert "within a second" in capsys.readouterr().err


async def test_looking_for_keys_waits_for_no_writer_and_survives_a_damaged_file(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path, serving=True)
    assert store.keys_now() == []  # not started: there is nothing to look at
    await store.start()
    assert store.keys_now() == []
    await store.add_key(KeyRecord(key_id="k", digest="00"), "me")
    writer = sqlite3.connect(store.path, isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    writer.execute("UPDATE keys SET revoked_at = 5.0")
    assert [(each.key_id, each.revoked_at) for each in store.keys_now()] == [("k", None)]
    writer.execute("COMMIT")
    assert [each.revoked_at for each in store.keys_now()] == [5.0]
    writer.execute("ALTER TABLE keys RENAME TO gone")
    assert store.keys_now() == []
    writer.execute("ALTER TABLE gone RENAME TO keys")
    assert len(store.keys_now()) == 1
    writer.close()
    await store.stop()
    assert store.keys_now() == []
