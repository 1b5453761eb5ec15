"""A call through a real gateway to upstreams that misbehave: who answers, what the client sees, what the rows say."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import socket
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from freehold.gateway.call import Decision, Request, Target
from freehold.gateway.config import Settings
from freehold.gateway.parts import Parts
from tests.live_gateway import LiveGateway
from tests.scripted_upstream import Asked, Scripted, completion, fine

Start = Callable[..., LiveGateway]
StartUpstream = Callable[..., Scripted]
QUICK = "timeouts = {connect = 0.5, first_byte = 0.6, between_chunks = 0.4, total = 3.0}"


def config(*urls: str, extra: str = "") -> str:
    """One alias whose arms are the upstreams, in this order of preference."""
    upstreams = "".join(
        f'[upstreams.u{at}]\nurl = "{url}"\n{QUICK}\n{extra}\nmodels.m = {{prices = {{input = 1.0, output = 1.0}}}}\n'
        for at, url in enumerate(urls)
    )
    weights = ["1000000000000", *["0.000001"] * (len(urls) - 1)]
    arms = ", ".join(
        f'{{name = "a{at}", upstream = "u{at}", model = "m", weight = {weights[at]}}}' for at in range(len(urls))
    )
    return f"{upstreams}[models.glm]\narms = [{arms}]\n"


def body(stream: bool = False, **more: Any) -> dict[str, Any]:
    return {"model": "glm", "messages": [{"role": "user", "content": "hi"}], "stream": stream, **more}


def post(live: LiveGateway, stream: bool = False, **more: Any) -> httpx.Response:
    return httpx.post(f"{live.url}/v1/chat/completions", json=body(stream, **more), timeout=10)


def nobody() -> str:
    """An address where nobody listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{sock.getsockname()[1]}/v1"


async def reset(asked: Asked) -> None:
    asked.writer.transport.abort()


async def silent(asked: Asked) -> None:
    await asyncio.sleep(30)


async def garbage(asked: Asked) -> None:
    await asked.answer(200, b"<html>busy</html>")


async def not_http(asked: Asked) -> None:
    await asked.send(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")


async def error_500(asked: Asked) -> None:
    await asked.answer(500, b'{"error":{"message":"out of memory"}}')


async def error_429(asked: Asked) -> None:
    headers = "content-type: application/json\r\nretry-after: 7\r\nx-ratelimit-limit-requests: 9\r\n"
    await asked.answer(429, b'{"error":{"message":"slow down"}}', headers=headers)


async def redirect(asked: Asked) -> None:
    await asked.answer(302, b"", headers="location: http://127.0.0.1:1/stolen\r\n")


async def gzipped(asked: Asked) -> None:
    await asked.answer(200, b"\x1f\x8b", headers="content-type: application/json\r\ncontent-encoding: gzip\r\n")


async def half_closed(asked: Asked) -> None:
    await asked.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 500\r\n\r\n{")
    asked.writer.close()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fault", "kind", "status"),
    [
        (reset, "connect", 0),
        (silent, "timeout", 0),
        (garbage, "invalid", 200),
        (not_http, "invalid", 0),
        (error_500, "http", 500),
        (error_429, "http", 429),
        (redirect, "http", 302),
        (gzipped, "invalid", 0),
        (half_closed, "cut", 200),
    ],
)
def test_a_fault_before_the_first_byte_is_a_failover(
    fault: Any, kind: str, status: int, stream: bool, gateway: Start, upstream: StartUpstream
) -> None:
    if stream and fault is half_closed:
        kind = "invalid"  # it is no stream of events in the first place
    bad, good = upstream(fault), upstream()
    live = gateway(config(bad.url, good.url))
    answer = post(live, stream)
    assert answer.status_code == 200
    assert "all" in answer.text
    assert "[DONE]" in answer.text or not stream
    *failed, last = live.rows
    assert {(row.error, row.status, row.upstream, row.served_arm) for row in failed} == {(kind, status, "u0", "a0")}
    assert (last.error, last.upstream, last.arm, last.served_arm) == ("", "u1", "a0", "a1")
    assert [row.attempt for row in live.rows] == list(range(len(live.rows)))
    assert len({row.request_id for row in live.rows}) == 1
    assert answer.headers["x-request-id"] == last.request_id
    assert answer.headers["x-freehold-row"] == last.row_id


def test_a_refused_connection_is_a_failover(gateway: Start, upstream: StartUpstream) -> None:
    live = gateway(config(nobody(), upstream().url))
    assert post(live).json()["choices"][0]["message"]["content"] == "all well"
    assert [row.error for row in live.rows] == ["connect", "connect", ""], "once more, then the next"


def test_a_connection_that_was_closed_while_idle_costs_nothing(gateway: Start, upstream: StartUpstream) -> None:
    served = upstream()
    live = gateway(config(served.url))
    assert post(live).status_code == 200

    async def hang_up_once(asked: Asked) -> None:
        served.reply = fine
        asked.writer.transport.abort()

    served.reply = hang_up_once
    assert post(live).status_code == 200
    assert [row.error for row in live.rows] == ["", "connect", ""]


def test_when_all_fail_the_client_gets_a_clear_error(gateway: Start, upstream: StartUpstream) -> None:
    live = gateway(config(upstream(silent).url))
    answer = post(live)
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "upstream_timeout"
    live.rows.clear()


def test_the_upstreams_own_words_are_passed_on(gateway: Start, upstream: StartUpstream) -> None:
    live = gateway(config(upstream(error_429).url))
    answer = post(live)
    assert answer.status_code == 429
    assert answer.json()["error"]["message"] == "slow down"
    assert answer.headers["retry-after"] == "7"
    assert "x-ratelimit-limit-requests" not in answer.headers, "that limit is the gateway's, not the client's"


def test_a_request_that_is_wrong_is_not_tried_elsewhere(gateway: Start, upstream: StartUpstream) -> None:
    async def wrong(asked: Asked) -> None:
        await asked.answer(400, b'{"error":{"message":"no such parameter"}}')

    second = upstream()
    live = gateway(config(upstream(wrong).url, second.url))
    answer = post(live)
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "no such parameter")
    assert not second.asked


def test_keys_go_to_their_upstream_and_nowhere_else(
    gateway: Start, upstream: StartUpstream, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    secret = "sk-upstream-4f1d2c"
    monkeypatch.setenv("DOOR_TEST_KEY", secret)

    async def tells_it(asked: Asked) -> None:
        await asked.answer(418, b'{"error":{"message":"bad key sk-upstream-4f1d2c"}}')

    async def rejects_it(asked: Asked) -> None:
        await asked.answer(401, b'{"error":{"message":"Incorrect API key provided: sk-upstream-4f1d2c"}}')

    served = upstream(tells_it)
    live = gateway(config(served.url, extra='key_env = "DOOR_TEST_KEY"'))
    headers = {
        "authorization": "Bearer client-key",
        "cookie": "a=b",
        "x-forwarded-for": "1.2.3.4",
        "traceparent": "00-x",
    }
    answers = [httpx.post(f"{live.url}/v1/chat/completions", json=body(), headers=headers)]
    head = served.asked[0].head.lower()
    assert f"authorization: bearer {secret}" in head
    assert "client-key" not in head
    assert "cookie" not in head
    assert "x-forwarded-for" not in head
    assert "traceparent: 00-x" in head
    served.reply = rejects_it
    answers.append(post(live))
    assert answers[1].status_code == 502, "it is the gateway's key that is wrong, not the client's"
    assert [secret in answer.text + str(answer.headers) for answer in answers] == [False, False]
    assert secret not in str(live.rows)
    assert secret not in "".join(capfd.readouterr())


def test_only_what_must_change_is_changed(gateway: Start, upstream: StartUpstream) -> None:
    served = upstream()
    live = gateway(config(served.url))
    raw = (
        b'{ "model":"glm", "stream" : true, "x_new": {"a":[1e400,0.10,"\\u00e9\\ud83d\\ude00"]}, "messages":[],'
        b'"seed":12345678901234567890 }'
    )
    httpx.post(f"{live.url}/v1/chat/completions", content=raw)
    sent = served.asked[0].body
    assert b'{"a":[1e400,0.10,"\\u00e9\\ud83d\\ude00"]}' in sent
    assert b"12345678901234567890" in sent
    assert b'"model":"m"' in sent
    assert b'"stream_options":{"include_usage":true}' in sent


def test_unknown_fields_of_an_answer_pass(gateway: Start, upstream: StartUpstream) -> None:
    said = completion("fine", reasoning="so", reasoning_content="so", new_field={"x": 1.50})

    async def reply(asked: Asked) -> None:
        await asked.answer(200, said)

    live = gateway(config(upstream(reply).url))
    assert post(live).content == said


def test_a_stream_that_is_cut_ends_with_an_error_and_counts_what_came(gateway: Start, upstream: StartUpstream) -> None:
    async def cut(asked: Asked) -> None:
        await asked.begin_stream()
        for word in ("one", " two", " three"):
            await asked.word(word)
        await asyncio.sleep(0.1)
        asked.writer.transport.abort()

    second = upstream()
    live = gateway(config(upstream(cut).url, second.url))
    text = post(live, stream=True).text
    events = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    assert [json.loads(event)["choices"][0]["delta"]["content"] for event in events[:3]] == ["one", " two", " three"]
    assert json.loads(events[3])["error"]["code"] == "upstream_failed"
    assert len(events) == 4
    assert not second.asked, "no failover after the first byte"
    (row,) = live.rows
    assert (row.error, row.output_tokens, row.counted) == ("cut", 3, "counted")
    assert row.cost is not None


def test_a_stream_that_stalls_is_given_up(gateway: Start, upstream: StartUpstream) -> None:
    async def stall(asked: Asked) -> None:
        await asked.begin_stream()
        await asked.word("one")
        await asyncio.sleep(30)

    live = gateway(config(upstream(stall).url))
    assert '"code":"upstream_timeout"' in post(live, stream=True).text
    assert live.rows[0].error == "timeout"
    assert 0.3 < live.rows[0].duration < 2


def test_a_slow_stream_is_not_a_stalled_one_but_has_an_end(gateway: Start, upstream: StartUpstream) -> None:
    async def slow(asked: Asked) -> None:
        await asked.begin_stream()
        for _ in range(100):
            await asked.word("x")
            await asyncio.sleep(0.2)

    live = gateway(config(upstream(slow).url))
    assert '"code":"upstream_timeout"' in post(live, stream=True).text
    assert 2.5 < live.rows[0].duration < 4.5, "total"
    assert live.rows[0].output_tokens > 9


def test_a_stream_that_begins_with_an_error_is_a_failover(gateway: Start, upstream: StartUpstream) -> None:
    async def error_first(asked: Asked) -> None:
        await asked.begin_stream()
        await asked.event({"error": {"message": "no blocks", "code": 500}})

    live = gateway(config(upstream(error_first).url, upstream().url))
    assert "[DONE]" in post(live, stream=True).text
    assert [row.error for row in live.rows] == ["http", ""]


def test_an_answer_that_never_ends_is_cut_off(gateway: Start, upstream: StartUpstream) -> None:
    async def gigantic(asked: Asked) -> None:
        await asked.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 99999999999\r\n\r\n")
        while True:
            await asked.send(b" " * 65536)

    served = upstream(gigantic)
    live = gateway("[gateway]\nmax_answer_bytes = 1000000\n" + config(served.url))
    answer = post(live)
    assert answer.status_code == 502
    assert live.rows[0].error == "invalid"
    live.wait(lambda: served.left == 1)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_the_attempt(stream: bool, gateway: Start, upstream: StartUpstream) -> None:
    async def slow(asked: Asked) -> None:
        if stream:
            await asked.begin_stream()
        for _ in range(60):
            if stream:
                await asked.word("x")
            await asyncio.sleep(0.05)

    served = upstream(slow)
    live = gateway(config(served.url))
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as sock:
        data = json.dumps(body(stream)).encode()
        sock.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n%b" % (len(data), data)
        )
        live.wait(lambda: bool(served.asked))
        if stream:
            assert b"data" in sock.recv(65536) + sock.recv(65536)
    live.wait(lambda: len(live.rows) == 1)
    assert live.rows[0].error == "client_gone"
    assert bool(live.rows[0].output_tokens) == stream
    live.wait(lambda: served.left == 1)


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ({"content": ""}, "empty"),
        ({"content": None, "refusal": "I cannot"}, "refusal"),
        ({"content": None, "tool_calls": [{"function": {"name": "f", "arguments": '{"a":'}}]}, "tool_json"),
        ({"content": None, "tool_calls": [{"function": {"name": "f", "arguments": '{"a":1}'}}]}, ""),
    ],
)
def test_answers_that_are_no_good_are_told_apart(
    message: dict[str, Any], kind: str, gateway: Start, upstream: StartUpstream
) -> None:
    async def reply(asked: Asked) -> None:
        await asked.answer(200, completion(**{"text": "", **message}))

    live = gateway(config(upstream(reply).url))
    assert post(live).status_code == 200
    assert live.rows[0].error == kind


def test_a_shadow_is_asked_the_same_and_its_answer_thrown_away(gateway: Start, upstream: StartUpstream) -> None:
    shadow = upstream()

    class WithShadow:
        def __init__(self, inner: Any) -> None:
            self._inner = inner
            self.choose, self.done, self.crossing = inner.choose, inner.done, False

        def decide(self, request: Request) -> Decision:
            found: Decision = self._inner.decide(request)
            return Decision(found.targets[:1], experiment="e", arm="a0", shadow=Target("u1", "m", "a1"))

    def build(settings: Settings, parts: Parts) -> Parts:
        return dataclasses.replace(parts, router=WithShadow(parts.router))

    live = gateway(config(upstream().url, shadow.url), build=build)
    assert post(live, stream=True).status_code == 200
    live.wait(lambda: len(live.rows) == 2)
    real, copy = live.rows
    assert copy.shadow_of == real.row_id
    assert (copy.arm, copy.error, copy.output_tokens, copy.undelivered_tokens) == ("a1", "", 2, 0)
    assert shadow.asked[0].json["messages"] == body()["messages"]


def test_requests_that_are_no_requests(gateway: Start, upstream: StartUpstream) -> None:
    served = upstream()
    live = gateway("[gateway]\nmax_body_bytes = 100000\n" + config(served.url))
    for content, status in (
        (b"", 400),
        (b"[]", 400),
        (b'{"model":', 400),
        (b'{"model":""}', 400),
        (b'{"model":7}', 400),
        (b'{"model":"glm","messages":' + b"[" * 50_000, 400),
        (b'{"model":"glm","max_tokens":-1}', 400),
        (b'{"model":"\xff"}', 400),
        (b'{"model":"glm","x":"' + b"a" * 100_000 + b'"}', 413),
        (b'{"model":"http://169.254.169.254/"}', 404),
        (b'{"model":"../../m"}', 404),
    ):
        answer = httpx.post(f"{live.url}/v1/chat/completions", content=content)
        assert answer.status_code == status, content[:50]
        assert answer.json()["error"]["message"]
        assert answer.headers["x-request-id"]
    assert not served.asked
    assert not live.rows


def test_tokens_that_only_the_last_usage_names_are_delivered(gateway: Start, upstream: StartUpstream) -> None:
    async def without_done(asked: Asked) -> None:
        """Five tokens in two pieces, and an end without `[DONE]`."""
        await asked.begin_stream()
        await asked.word("all")
        await asked.word(" well")
        await asked.event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        await asked.event({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10}})
        await asked.send(b"0\r\n\r\n")

    live = gateway(config(upstream(without_done).url))
    assert post(live, stream=True).status_code == 200
    (row,) = live.wait_for_rows(1)
    assert (row.output_tokens, row.undelivered_tokens, row.error) == (5, 0, "")
