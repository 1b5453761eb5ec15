"""Who gets in, what a request is read as, new settings while running, and the routes that are no calls."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from freehold.cli.main import main
from freehold.errors import ConfigError, InvalidRequest, NotFound
from freehold.gateway.call import Caller
from freehold.gateway.config import parse
from freehold.gateway.door import app
from freehold.gateway.door.app import RouteTable
from freehold.gateway.door.request import RequestReader
from freehold.gateway.identity import Hasher, new_id, read_or_make_key
from freehold.gateway.parts import Answer, Asked
from freehold.gateway.server import read_admin_key
from tests.live_gateway import LiveGateway
from tests.scripted_upstream import Scripted

Start = Callable[..., LiveGateway]
StartUpstream = Callable[..., Scripted]

ADMIN = "admin-1d0f2c7b9a54e8"


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def config(url: str, *, head: str = "", alias: str = "glm") -> str:
    return f"""{head}
[upstreams.u]
url = "{url}"
models.m = {{licence = "MIT"}}
[models.{alias}]
arms = [{{name = "a", upstream = "u", model = "m"}}]
"""


KEYS = f"""
[keys.all]
sha256 = "{digest("key-of-all")}"
[keys.chat-only]
sha256 = "{digest("key-of-chat")}"
scopes = ["chat"]
[keys.other]
sha256 = "{digest("key-of-other")}"
models = ["other"]
[models.other]
arms = [{{name = "a", upstream = "u", model = "m"}}]
"""


def chat(live: LiveGateway, key: str = "", path: str = "/v1/chat/completions", **headers: str) -> httpx.Response:
    sent = {"authorization": f"Bearer {key}"} if key else {}
    return httpx.post(f"{live.url}{path}", json={"model": "glm", "messages": []}, headers=sent | headers)


def test_keys_and_their_scopes(gateway: Start, upstream: StartUpstream) -> None:
    live = gateway(config(upstream().url) + KEYS)
    assert chat(live, "key-of-all").status_code == 200
    assert chat(live, "", **{"x-api-key": "key-of-all"}).status_code == 200
    assert chat(live).status_code == 401
    assert chat(live, digest("key-of-all")).status_code == 401, "the digest is no key"
    assert chat(live, "key-of-chat").status_code == 200
    assert chat(live, "key-of-chat", "/v1/completions").status_code == 403
    assert chat(live, "key-of-other").status_code == 403
    models = httpx.get(f"{live.url}/v1/models", headers={"authorization": "Bearer key-of-other"})
    assert [model["id"] for model in models.json()["data"]] == ["other"]
    assert httpx.get(f"{live.url}/v1/models").status_code == 401
    assert [row.key_id for row in live.rows] == ["all", "all", "chat-only"]


def test_without_keys_only_programs_on_this_machine_may_ask(gateway: Start, upstream: StartUpstream) -> None:
    live = gateway(config(upstream().url))
    assert chat(live).status_code == 200
    assert chat(live, host="evil.example").status_code == 403


def test_another_address_needs_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "g.toml"
    path.write_text(
        config("http://127.0.0.1:1/v1", head=f'[gateway]\ndata_dir = "{tmp_path}"\nhost = "0.0.0.0"\nport = 0')
    )
    assert main(["gateway", str(path)]) == 2
    assert "gateway.host 0.0.0.0 is reachable from other machines, and there is no API key" in capsys.readouterr().err


def test_probes_and_unknown_paths(gateway: Start, upstream: StartUpstream) -> None:
    live = gateway(config(upstream().url) + KEYS)
    assert httpx.get(f"{live.url}/health").status_code == 200
    assert httpx.get(f"{live.url}/ready").status_code == 200
    head = httpx.head(f"{live.url}/health")
    assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", "15")
    for path in ("/", "/v1/nope", "/admin/keys", "/v1/../admin/keys", "/v1/models/%2e%2e", "//v1/models"):
        answer = httpx.get(f"{live.url}{path}", headers={"authorization": "Bearer key-of-all"})
        assert answer.status_code in (401, 404), path
        assert "error" in answer.json()
    assert httpx.get(f"{live.url}/v1/chat/completions").status_code == 404


def test_the_admin_api_wants_its_own_key(
    gateway: Start, upstream: StartUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def pause(asked: Asked) -> Answer:
        return Answer(json.dumps([asked.names, dict(asked.query), asked.body.decode()]).encode())

    def build(_: Any, parts: Any) -> Any:
        return dataclasses.replace(parts, routes={"POST /admin/experiments/{name}/pause": pause})

    monkeypatch.setenv("DOOR_ADMIN", ADMIN)
    head = '[gateway]\nadmin_key_env = "DOOR_ADMIN"'
    live = gateway(config(upstream().url, head=head) + KEYS, build=build)
    url = f"{live.url}/admin/experiments/x%20y/pause?a=1"
    for key in ("none", "key-of-all", "admin", ADMIN[:-1]):
        assert httpx.post(url, headers={"authorization": f"Bearer {key}"}).status_code == 401
    answer = httpx.post(url, headers={"authorization": f"Bearer {ADMIN}"}, content=b"{}")
    assert answer.json() == [{"name": "x y"}, {"a": "1"}, "{}"]


@pytest.mark.parametrize("key", ["", "short", "aaaaaaaaaaaaaaaaaaaaaaaa", "sk-1234"])
def test_a_guessable_admin_key_is_refused(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOOR_ADMIN", key)
    settings = parse(config("http://127.0.0.1:1/v1", head='[gateway]\nadmin_key_env = "DOOR_ADMIN"'))
    with pytest.raises(ConfigError, match="guessable"):
        read_admin_key(settings)


async def nothing(asked: Asked) -> Answer:
    return Answer(b"")


@pytest.mark.parametrize("path", ["/a/../c", "/a//c", "/a/b/c/d", "/a/b", "/admin/x"])
def test_a_name_in_a_path_is_one_segment(path: str) -> None:
    table = RouteTable({"GET /a/{name}/c": nothing, "GET /m/{model}": nothing, "GET /admin/x": nothing})
    assert table.find("GET", "/a/b/c", admin=False)[1] == {"name": "b"}
    assert table.find("GET", "/m/org/model", admin=False)[1] == {"model": "org/model"}
    with pytest.raises(NotFound):
        table.find("GET", path, admin=False)


# ---- settings ------------------------------------------------------------------------------------------------


def test_new_settings_take_effect_and_bad_ones_change_nothing(gateway: Start, upstream: StartUpstream) -> None:
    first, second = upstream(), upstream()
    live = gateway(config(first.url) + KEYS)
    assert chat(live, "key-of-all").status_code == 200
    live.write(config(second.url) + KEYS)
    live.reload()
    assert chat(live, "key-of-all").status_code == 200
    assert (len(first.asked), len(second.asked)) == (1, 1)
    for bad, why in (
        ("nonsense = [", "gateway.toml"),
        (config(first.url) + KEYS + "\n[typo]\n", "typo"),
        (config(first.url, head="[gateway]\nport = 1") + KEYS, "gateway.port"),
        (config(first.url), "anybody could ask"),
        (config(first.url).replace("models.m", 'key_env = "DOOR_NO_SUCH"\nmodels.m') + KEYS, "DOOR_NO_SUCH"),
    ):
        live.write(bad)
        live.reload()
        live.wait(lambda: live.notices[-1].startswith("kept the old settings"))
        assert why in live.notices[-1]
        assert chat(live, "key-of-all").status_code == 200
    assert (len(first.asked), len(second.asked)) == (1, 6)


def test_a_changed_file_is_noticed(gateway: Start, upstream: StartUpstream) -> None:
    served = upstream()
    live = gateway(config(served.url))
    live.write(config(served.url, alias="newer"))
    live.wait(lambda: live.notices[-1].startswith("new settings"), 10)
    assert chat(live).status_code == 404


def test_check_says_what_settings_mean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "g.toml"
    path.write_text(config("http://10.0.0.1:1/v1") + KEYS + "\n[data_classes.secret]\nlocal = true\n")
    assert main(["gateway", "check", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "model glm: a 100% (u: m)" in shown
    assert "m: licence MIT" in shown
    assert digest("key-of-all") not in shown
    assert "data class secret: may go to nothing" in shown
    assert "warning: data class 'secret' may go nowhere" in shown
    path.write_text(config("http://10.0.0.1:1/v1", head="[gateway]\nprot = 1"))
    assert main(["gateway", "check", str(path)]) == 3
    assert "gateway.prot" in capsys.readouterr().err
    path.write_text(config("http://192.0.2.1:1/v1", head="[gateway]\nair_gapped = true"))
    assert main(["gateway", "check", str(path)]) == 3
    assert "air" in capsys.readouterr().err


# ---- what a request is read as -------------------------------------------------------------------------------


def read(body: dict[str, Any], endpoint: Any = "chat", key: str = "k", **headers: str) -> Any:
    reader = RequestReader(Hasher(b"1" * 32))
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return reader.read(endpoint, named, json.dumps({"model": "m"} | body).encode(), Caller(key), new_id())


@pytest.mark.parametrize(
    ("body", "effort"),
    [
        ({}, ""),
        ({"reasoning_effort": "minimal"}, "low"),
        ({"reasoning_effort": "xhigh"}, "max"),
        ({"reasoning": {"effort": "high"}}, "high"),
        ({"output_config": {"effort": "low"}}, "low"),
        ({"thinking": {"type": "disabled"}}, "none"),
        ({"reasoning_effort": "no such"}, ""),
    ],
)
def test_effort_in_every_spelling(body: dict[str, Any], effort: str) -> None:
    assert read(body).effort == effort


@pytest.mark.parametrize(
    ("endpoint", "body", "max_tokens", "choices"),
    [
        ("chat", {"max_tokens": 5, "max_completion_tokens": 7, "n": 2}, 7, 2),
        ("chat", {"max_output_tokens": 1}, None, 1),
        ("responses", {"max_output_tokens": 5, "max_tokens": 1}, 5, 1),
        ("responses", {"max_tokens": 1}, None, 1),
        ("messages", {"max_tokens": 5, "max_completion_tokens": 9}, 5, 1),
        ("completions", {"max_tokens": 5, "max_completion_tokens": 9, "prompt": "a"}, 5, 1),
        ("completions", {"prompt": ["a", "b", "c"], "n": 2, "best_of": 4}, None, 12),
        ("completions", {"prompt": [1, 2, 3]}, None, 1),
        ("completions", {"prompt": [[1, 2], [3]]}, None, 2),
        ("completions", {"prompt": []}, None, 1),
    ],
)
def test_how_much_may_be_generated(endpoint: str, body: dict[str, Any], max_tokens: int | None, choices: int) -> None:
    found = read(body, endpoint)
    assert (found.max_tokens, found.choices) == (max_tokens, choices)


def test_names_of_prompts_come_from_headers_or_metadata() -> None:
    metadata = {"metadata": {"prompt_name": "sum", "prompt_version": 3}}
    assert (read(metadata).prompt_name, read(metadata).prompt_version) == ("sum", "3")
    assert read(metadata, x_prompt_version="4").prompt_version == "4"
    for bad in ("a\x00b", "x" * 300):
        with pytest.raises(InvalidRequest, match="x-prompt-name"):
            read({}, x_prompt_name=bad)


def test_a_conversation_is_one_by_its_id_or_by_how_it_opens() -> None:
    def turns(*texts: str) -> dict[str, Any]:
        roles = ["system", "user", "assistant", "user"]
        return {"messages": [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]}

    first = read(turns("be brief", "hi"))
    assert first.unit == first.conversation == read(turns("be brief", "hi", "hello", "and now?")).conversation
    assert first.conversation != read(turns("be brief", "ho")).conversation
    assert first.conversation != read(turns("be brief", "hi"), key="other").conversation
    named = {read(body, **headers).conversation for body, headers in (
        ({"metadata": {"conversation_id": "c1"}} | turns("a"), {}),
        ({"prompt_cache_key": "c1"} | turns("b"), {}),
        ({"conversation": {"id": "c1"}}, {}),
        (turns("c"), {"x_conversation_id": "c1"}),
    )}  # fmt: skip
    assert len(named) == 1
    assert read({}).unit, "even without a word there is a unit: the key's"


def test_users_are_hashed_with_a_key_that_is_a_private_file(tmp_path: Path) -> None:
    request = read({"user": "ada@example.org"})
    assert "ada" not in str(request.user)
    assert request.user == read({"safety_identifier": "ada@example.org"}).user
    key = read_or_make_key(tmp_path / "data")
    assert key == read_or_make_key(tmp_path / "data")
    assert Hasher(key)("user", "ada") != Hasher(b"2" * 32)("user", "ada")
    path = tmp_path / "data" / "identity.key"
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    path.write_bytes(b"short")
    with pytest.raises(ConfigError, match="damaged"):
        read_or_make_key(tmp_path / "data")


def test_ids_sort_by_time() -> None:
    ids = [new_id() for _ in range(2000)]
    assert len(set(ids)) == 2000
    assert [one[:10] for one in ids] == sorted(one[:10] for one in ids)
    assert {len(one) for one in ids} == {26}


def test_a_body_that_never_begins_is_not_waited_for(
    gateway: Start, upstream: StartUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "BODY_SECONDS", 0.3)
    live = gateway(config(upstream().url))
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as client:
        client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\n")
        assert client.recv(65_536).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("name", ["x-data-class", "x-user-id", "x-api-key", "authorization"])
def test_what_says_who_asks_or_where_data_may_go_is_said_once(
    name: str, gateway: Start, upstream: StartUpstream
) -> None:
    live = gateway(config(upstream().url))
    answer = httpx.post(
        f"{live.url}/v1/chat/completions", json={"model": "glm", "messages": []}, headers=[(name, "a"), (name, "b")]
    )
    assert answer.status_code == 400
    assert name in answer.json()["error"]["message"]
