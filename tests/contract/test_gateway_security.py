"""What an attacker may try at a gateway, with real sockets at the real process: keys, smuggling, SSRF, admin routes."""

from __future__ import annotations

import http.server
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from _gateway import (
    ADMIN_KEY,
    KEY,
    UPSTREAM_KEY,
    Gateway,
    Upstream,
    alias_table,
    chat,
    environment,
    key_table,
    upstream,
    upstream_table,
)
from _http import Answer, call

CHAT_ONLY = "fh-chat-only-" + "c0nly" * 6
NO_CALLS = "fh-nothing-" + "n0thing" * 5
OTHER_MODEL = "fh-other-" + "0ther" * 7
LIMIT = 200_000


@pytest.fixture(scope="module")
def up() -> Iterator[Upstream]:
    with upstream(keep_headers=True) as running:
        yield running


@pytest.fixture(scope="module")
def gateway(up: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    speaks = 'speaks = ["chat", "completions", "responses", "embeddings"]'
    text = upstream_table("one", up.base("one"), more=f"breaker.failures = 100000\n{speaks}")
    text += upstream_table("two", up.base("two")) + alias_table("m", "one") + alias_table("n", "two")
    text += (
        key_table()
        + key_table("chat-only", CHAT_ONLY, scopes=["chat"])
        + key_table("none", NO_CALLS, scopes=["feedback"])
    )
    text += key_table("other", OTHER_MODEL, models=["n"])
    options = f"max_body_bytes = {LIMIT}"
    with Gateway(tmp_path_factory.mktemp("gateway"), text, options=options) as running:
        yield running


@pytest.fixture(autouse=True)
def fresh(up: Upstream) -> None:
    up.reset()


def raw(gateway: Gateway, data: bytes, seconds: float = 3.0) -> bytes:
    """What comes back for these bytes until the connection is closed or silent."""
    parts = urlsplit(gateway.url)
    with socket.create_connection((parts.hostname, parts.port), timeout=seconds) as sock:
        sock.sendall(data)
        found = b""
        sock.settimeout(0.7)
        try:
            while block := sock.recv(65536):
                found += block
        except TimeoutError:
            pass
        except ConnectionResetError:
            pass
        return found


def head(*lines: str, auth: bool = True) -> bytes:
    usual = ["POST /v1/chat/completions HTTP/1.1", "host: localhost", "content-type: application/json"]
    return "\r\n".join([*usual, *([f"authorization: Bearer {KEY}"] if auth else []), *lines, "", ""]).encode()


BODY = json.dumps(chat()).encode()


# ---- the upstream's key -----------------------------------------------------------------------------------------


def test_an_upstream_that_repeats_its_key_gives_nothing_away(gateway: Gateway, up: Upstream) -> None:
    leak = json.dumps({"error": {"message": "Incorrect API key provided: {authorization}", "code": "invalid_api_key"}})
    seen = b""
    for status in (400, 401, 403, 422, 429, 500):
        up.script("one", fault="status", status=status, body=leak, headers={"x-debug": UPSTREAM_KEY})
        for stream in (False, True):
            answer = gateway.ask(body=chat(stream=stream))
            assert answer.status >= 400
            seen += bytes(answer.body) + json.dumps(answer.headers).encode()
    seen += bytes(gateway.ask("/metrics").body) + gateway.log_text().encode()
    assert up.calls()[0]["headers"]["authorization"] == f"Bearer {UPSTREAM_KEY}"
    assert UPSTREAM_KEY.encode() not in seen


def test_no_key_is_in_any_file_of_the_gateway(gateway: Gateway, up: Upstream) -> None:
    gateway.ask(body=chat())
    for path in (gateway.directory / "data").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            for key in (UPSTREAM_KEY, KEY, ADMIN_KEY):
                assert key.encode() not in content, path
            assert path.stat().st_mode & 0o077 == 0, f"{path} can be read by others"
    assert (gateway.directory / "data").stat().st_mode & 0o077 == 0


def test_an_answer_of_the_upstream_is_not_changed_where_it_holds_no_key(gateway: Gateway, up: Upstream) -> None:
    up.script("one", tokens=3)
    assert gateway.ask(body=chat()).json()["choices"][0]["message"]["content"] == "w0 w1 w2 "


# ---- headers ----------------------------------------------------------------------------------------------------


def test_credentials_and_hop_by_hop_headers_stay_here(gateway: Gateway, up: Upstream) -> None:
    given = {
        "x-api-key": "client-secret",
        "cookie": "session=secret",
        "proxy-authorization": "Basic c2VjcmV0",
        "connection": "keep-alive, x-private",
        "x-private": "secret",
        "te": "trailers",
        "upgrade": "h2c",
        "x-forwarded-for": "10.0.0.1",
        "x-forwarded-host": "evil.example",
        "openai-organization": "org-secret",
        "host": "evil.example",
    }
    answer = call(gateway.url, "/v1/chat/completions", chat(), {"authorization": f"Bearer {KEY}"} | given)
    if answer.ok:
        got = up.calls()[0]["headers"]
        assert KEY not in json.dumps(got)
        assert "secret" not in json.dumps(got).replace(UPSTREAM_KEY, "")
        assert "evil.example" not in json.dumps(got)
        assert not {"cookie", "te", "upgrade", "x-private", "proxy-authorization"} & got.keys()
    else:
        assert 400 <= answer.status < 500


SMUGGLED = b"GET /admin/experiments HTTP/1.1\r\nhost: localhost\r\n\r\n"


@pytest.mark.parametrize(
    "lines",
    [
        [f"content-length: {len(BODY)}", "transfer-encoding: chunked"],
        ["transfer-encoding: chunked", f"content-length: {len(BODY)}"],
        [f"content-length: {len(BODY)}", f"content-length: {len(BODY) + 5}"],
        ["content-length: +12"],
        ["content-length: -1"],
        ["content-length: 0x10"],
        ["transfer-encoding: xchunked"],
        ["transfer-encoding: chunked, identity"],
        ["transfer-encoding : chunked"],
        ["content-length: 99999999999999999999999999"],
    ],
    ids=lambda lines: "+".join(lines)[:40],
)
def test_ambiguous_lengths_are_refused(gateway: Gateway, up: Upstream, lines: list[str]) -> None:
    """Two readings of where a request ends are how a second one is smuggled past whoever stands in front."""
    answer = raw(gateway, head(*lines) + BODY + SMUGGLED)
    status = answer.split(b" ", 2)[1:2]
    assert not answer or status[0].startswith(b"4"), answer[:300]
    assert answer.count(b"HTTP/1.1 ") <= 1, "the rest was taken for another request"
    assert not up.calls()


def test_a_chunked_body_is_read_once(gateway: Gateway, up: Upstream) -> None:
    chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
    answer = raw(gateway, head("transfer-encoding: chunked", "connection: close") + chunks)
    assert answer.startswith(b"HTTP/1.1 200")
    assert len(up.calls()) == 1


@pytest.mark.parametrize("name", ["x-prompt-name", "x-prompt-version", "x-task", "x-conversation-id", "x-data-class"])
def test_labels_cannot_break_lines(gateway: Gateway, up: Upstream, name: str) -> None:
    for evil in (b"a\rb", b"a\x00b", b"a\x0bb", b"\xff\xfe", b"a" * 20_000):
        lines = head(f"content-length: {len(BODY)}")[:-2] + name.encode() + b": " + evil + b"\r\n\r\n"
        answer = raw(gateway, lines + BODY)
        assert not answer or answer.split(b" ")[1][:1] in b"24", answer[:200]
        assert b"\nb" not in answer.split(b"\r\n\r\n")[0]


def test_a_request_id_of_the_client_is_not_taken_for_ours(gateway: Gateway, up: Upstream) -> None:
    for evil in ("x" * 10_000, "../../etc/passwd"):
        answer = call(
            gateway.url, "/v1/chat/completions", chat(), {"authorization": f"Bearer {KEY}", "x-request-id": evil}
        )
        assert evil not in answer.headers.get("x-request-id", "")


# ---- requests to elsewhere --------------------------------------------------------------------------------------


class Trap(http.server.BaseHTTPRequestHandler):
    """Remembers whoever comes."""

    seen: list[str] = []  # noqa: RUF012 - shared by all of its instances on purpose

    def do_POST(self) -> None:
        self.seen.append(f"{self.path} {self.headers.get('authorization')}")
        self.send_response(200)
        self.end_headers()

    do_GET = do_POST

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def trap() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Trap)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    Trap.seen.clear()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(gateway: Gateway, up: Upstream, trap: str, status: int) -> None:
    up.script("one", fault="status", status=status, headers={"location": f"{trap}/v1/chat/completions"})
    answer = gateway.ask(body=chat())
    assert answer.status == 502
    assert trap not in json.dumps(answer.headers)
    assert not Trap.seen


@pytest.mark.parametrize(
    "model",
    [
        "{trap}/v1",
        "m@{trap}",
        "../m",
        "m/../../admin",
        "m?x=1",
        "m#x",
        "one/model",
        "//127.0.0.1/x",
        "m\r\nx: y",
        "m\x00",
    ],
)
def test_a_model_is_a_name_and_nothing_else(gateway: Gateway, up: Upstream, trap: str, model: str) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/embeddings"):
        body = chat(model=model.format(trap=trap), max_tokens=5) | {"input": "x", "prompt": "x"}
        answer = gateway.ask(path, body)
        assert answer.status in (400, 403, 404), (path, bytes(answer.body))
    assert not Trap.seen
    assert not up.calls()


def test_an_absolute_target_is_not_proxied(gateway: Gateway, trap: str) -> None:
    start = f"GET {trap}/v1/models HTTP/1.1\r\nhost: {trap.removeprefix('http://')}\r\nconnection: close\r\n\r\n"
    assert not raw(gateway, start.encode()).startswith(b"HTTP/1.1 2")
    connect = f"CONNECT {trap.removeprefix('http://')} HTTP/1.1\r\nhost: x\r\n\r\n"
    assert not raw(gateway, connect.encode()).startswith(b"HTTP/1.1 2")
    assert not Trap.seen


# ---- bodies -----------------------------------------------------------------------------------------------------


def test_too_large_bodies_are_refused_before_they_are_read(gateway: Gateway, up: Upstream) -> None:
    assert gateway.ask(body=chat("x" * LIMIT)).status == 413
    assert b" 413 " in raw(gateway, head(f"content-length: {10**12}") + b"{")[:60]
    memory = gateway.rss()
    chunks = b"".join(b"10000\r\n" + b"x" * 65536 + b"\r\n" for _ in range(64))
    answer = raw(gateway, head("transfer-encoding: chunked") + chunks)
    assert not answer or b" 413 " in answer[:60]
    assert gateway.rss() < memory + 30
    assert not up.calls()


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_deeply_nested_json_is_refused_and_nothing_falls_over(gateway: Gateway, up: Upstream, opening: str) -> None:
    depth = 30_000
    closing = "]" if opening == "[" else "}"
    value = opening * depth + ("1" if opening != "[" else "") + closing * depth
    for field in ("messages", "metadata", "tools", "x"):
        answer = gateway.ask(body=f'{{"model": "m", "{field}": {value}}}'.encode())
        assert answer.status < 500, bytes(answer.body[:300])
    after = gateway.ask(body=chat())
    assert after.ok, (bytes(after.body), gateway.log_text()[-1500:])


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"1",
        b'"m"',
        b"{}",
        b"{",
        b'{"model": 1}',
        b'{"model": null}',
        b'{"model": "m"',
        b"\xff\xfe",
    ],
)
def test_what_is_no_request(gateway: Gateway, up: Upstream, body: bytes) -> None:
    for path in ("/v1/chat/completions", "/v1/messages", "/v1/responses", "/v1/embeddings"):
        answer = gateway.ask(path, body)
        assert answer.status in (400, 422), (body, bytes(answer.body))
        assert "error" in answer.json()
    assert not up.calls()


# ---- keys -------------------------------------------------------------------------------------------------------


def check_refused(answer: Answer, *statuses: int) -> None:
    assert answer.status in statuses, bytes(answer.body)
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize("key", ["", "x", KEY[:-1], KEY + "x", KEY.upper(), UPSTREAM_KEY, ADMIN_KEY, "sk-1234"])
def test_only_its_own_keys_open_it(gateway: Gateway, up: Upstream, key: str) -> None:
    check_refused(gateway.ask(body=chat(), key=key), 401)
    check_refused(gateway.ask("/v1/models", key=key), 401)
    assert not up.calls()


def test_scopes_and_models_of_a_key(gateway: Gateway, up: Upstream) -> None:
    assert gateway.ask(body=chat(), key=CHAT_ONLY).ok
    check_refused(gateway.ask("/v1/embeddings", {"model": "m", "input": "x"}, key=CHAT_ONLY), 403)
    check_refused(gateway.ask("/v1/messages", chat(max_tokens=1), key=CHAT_ONLY), 403)
    check_refused(gateway.ask(body=chat(), key=NO_CALLS), 403)
    check_refused(gateway.ask(body=chat(), key=OTHER_MODEL), 403, 404)
    assert gateway.ask(body=chat(model="n"), key=OTHER_MODEL).ok
    names = {one["id"] for one in gateway.ask("/v1/models", key=OTHER_MODEL).json()["data"]}
    assert names == {"n"}, "a key sees the models it may use"


# ---- the admin API ----------------------------------------------------------------------------------------------

ADMIN = [
    "/admin/experiments",
    "/admin/experiments/x",
    "/admin/experiments/x/replay",
    "/admin/keys",
    "/admin/",
    "/admin",
]


@pytest.mark.parametrize("path", ADMIN)
def test_the_admin_api_wants_the_admin_key(gateway: Gateway, path: str) -> None:
    for key in ("", KEY, "x", ADMIN_KEY[:-1], UPSTREAM_KEY):
        for method in ("GET", "POST", "PUT", "DELETE"):
            assert gateway.ask(path, key=key, method=method).status in (401, 403, 404, 405)
    assert gateway.admin("/admin/experiments").status == 200, "the key itself is right"


TRAVERSALS = [
    "/v1/../admin/experiments",
    "/v1/%2e%2e/admin/experiments",
    "/v1/..%2fadmin/experiments",
    "//admin/experiments",
    "/admin%2fexperiments",
    "/ADMIN/experiments",
    "/./admin/experiments",
    "/admin/../v1/../admin/experiments",
    "/admin/experiments/..%2f..%2f..%2fetc%2fpasswd",
    "/admin/experiments/%00",
    "/metrics/../admin/experiments",
    "/admin;x=1/experiments",
    "/admin\\experiments",
]


@pytest.mark.parametrize("path", TRAVERSALS)
def test_no_way_round_to_the_admin_api(gateway: Gateway, path: str) -> None:
    start = f"GET {path} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {KEY}\r\nconnection: close\r\n\r\n"
    answer = raw(gateway, start.encode())
    assert answer.split(b" ")[1][:1] == b"4", answer[:200]
    assert b"trial" not in answer
    assert b"root:" not in answer
    with_key = raw(gateway, start.replace(KEY, ADMIN_KEY).encode())
    assert b"root:" not in with_key
    assert with_key.split(b" ")[1][:1] in (b"4", b"2")


def test_without_an_admin_key_there_is_no_admin_api(up: Upstream, tmp_path: Path) -> None:
    text = upstream_table("one", up.base("one")) + alias_table("m", "one") + key_table()
    gateway = Gateway(tmp_path, text)
    gateway.config.write_text(gateway.config.read_text().replace('admin_key_env = "GATEWAY_ADMIN_KEY"\n', ""))
    with gateway:
        for path in ADMIN:
            for key in (KEY, ADMIN_KEY, ""):
                assert gateway.ask(path, key=key).status in (401, 404)


@pytest.mark.parametrize("key", ["sk-1234", "changeme", "admin", "", "short", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"])
def test_an_admin_key_that_everybody_knows_is_refused(up: Upstream, tmp_path: Path, key: str) -> None:
    text = upstream_table("one", up.base("one")) + alias_table("m", "one") + key_table()
    with (
        pytest.raises(RuntimeError, match="admin key"),
        Gateway(tmp_path, text, env=environment(GATEWAY_ADMIN_KEY=key)),
    ):
        pass


@pytest.mark.parametrize("key", ["sk-1234", "changeme", "test", "sk-test"])
def test_a_key_that_everybody_knows_is_refused(up: Upstream, tmp_path: Path, key: str) -> None:
    text = upstream_table("one", up.base("one")) + alias_table("m", "one") + key_table(key=key)
    with pytest.raises(RuntimeError, match="key"), Gateway(tmp_path, text):
        pass


def test_another_address_needs_keys(up: Upstream, tmp_path: Path) -> None:
    text = upstream_table("one", up.base("one")) + alias_table("m", "one")
    with pytest.raises(RuntimeError, match="key"), Gateway(tmp_path, text, options='host = "0.0.0.0"'):
        pass


def test_a_page_in_a_browser_cannot_use_a_gateway_without_keys(up: Upstream, tmp_path: Path) -> None:
    """DNS rebinding: the browser sends the attacker's host name to 127.0.0.1."""
    text = upstream_table("one", up.base("one")) + alias_table("m", "one")
    with Gateway(tmp_path, text) as gateway:
        assert gateway.ask(body=chat(), key="").ok
        assert call(gateway.url, "/v1/models").ok
        port = urlsplit(gateway.url).port
        answer = raw(gateway, f"GET /v1/models HTTP/1.1\r\nhost: evil.example:{port}\r\n\r\n".encode())
        assert answer.split(b" ")[1] == b"403"
