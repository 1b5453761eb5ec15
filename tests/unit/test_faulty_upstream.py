"""The faulty upstream does what its scripts say, seen by a plain client; what measures a gateway is measured first."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from _gateway import Upstream, upstream
from _http import Answer, call

from tests.faults.upstream import refused, unreachable

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def up() -> Iterator[Upstream]:
    with upstream() as running:
        yield running


@pytest.fixture(autouse=True)
def fresh(up: Upstream) -> None:
    up.reset()


def ask(up: Upstream, name: str = "a", *, limit: float = 5, abort_after: int | None = None, **body: Any) -> Answer:
    asked = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **body}
    return call(up.base(name).removesuffix("/v1"), CHAT, asked, limit=limit, abort_after=abort_after)


def test_it_answers_and_counts(up: Upstream) -> None:
    up.script("a", tokens=5, reasoning=2, cached=1)
    answer = ask(up, metadata={"call": "one"})
    message = answer.json()["choices"][0]["message"]
    assert answer.ok
    assert (message["reasoning_content"], message["content"]) == ("w0 w1 ", "w2 w3 w4 ")
    assert answer.json()["usage"]["completion_tokens"] == 5
    assert up.totals()["a"]["completion_tokens"] == 5
    assert up.calls()[0] | {"prompt_tokens": 0, "headers": {}} == {
        "name": "a",
        "endpoint": "chat",
        "call": "one",
        "model": "m",
        "prompt_tokens": 0,
        "completion_tokens": 5,
        "fault": "",
        "ended": "whole",
        "headers": {},
    }


def test_a_stream_has_its_tokens_usage_and_end(up: Upstream) -> None:
    up.script("a", tokens=5, stamp=True)
    answer = ask(up, stream=True, stream_options={"include_usage": True}, max_tokens=4)
    assert answer.ok
    assert answer.tokens == len(answer.delays) == 4
    assert 0 <= min(answer.delays) <= max(answer.delays) < 1
    assert b'"completion_tokens":4' in answer.body
    assert answer.body.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("endpoint", ["completions", "responses", "messages", "embeddings"])
@pytest.mark.parametrize("stream", [False, True])
def test_every_endpoint(up: Upstream, endpoint: str, stream: bool) -> None:
    if endpoint == "embeddings" and stream:
        return
    answer = call(up.base("a"), f"/{endpoint}", {"model": "m", "input": "x", "stream": stream})
    assert answer.ok
    assert (b"data: " in answer.body) == stream


def test_an_aborted_stream_is_counted_apart(up: Upstream) -> None:
    up.script("a", tokens=100, chunk_seconds=0.02)
    answer = ask(up, stream=True, abort_after=3)
    assert answer.tokens == 3
    end = time.monotonic() + 5
    while not up.totals() and time.monotonic() < end:
        time.sleep(0.02)
    totals = up.totals()["a"]
    assert totals["aborted"] == 1
    assert totals["completion_tokens"] == 0
    assert 3 <= totals["aborted_tokens"] < 100


@pytest.mark.parametrize(
    ("script", "stream", "seen"),
    [
        ({"fault": "status", "status": 529}, False, "529 "),
        ({"fault": "close"}, False, "0 connection lost: closed"),
        ({"fault": "reset"}, False, "0 connection lost: [Errno 104] Connection reset by peer"),
        ({"fault": "reset", "after": 2}, True, "200 connection lost: [Errno 104] Connection reset by peer"),
        ({"fault": "cut", "after": 2}, True, "200 connection lost: closed"),
        ({"fault": "half_closed", "after": 2}, True, "200 connection lost: closed"),
        ({"fault": "half_closed"}, False, "200 connection lost: closed"),
        ({"fault": "stall", "after": 2, "seconds": 3}, True, "0 no whole answer in time"),
        ({"fault": "slow_headers", "seconds": 3}, False, "0 no whole answer in time"),
        ({"fault": "drip", "seconds": 0.1}, False, "0 no whole answer in time"),
        ({"fault": "slow_chunks", "seconds": 0.5}, True, "0 no whole answer in time"),
        ({"fault": "redirect", "body": "http://127.0.0.1:1/"}, False, "307 "),
    ],
)
def test_faults_of_the_connection(up: Upstream, script: dict[str, Any], stream: bool, seen: str) -> None:
    up.script("a", **script)
    answer = ask(up, stream=stream, limit=1)
    assert f"{answer.status} {answer.error}" == seen
    if answer.status == 200 and stream:
        assert answer.tokens == script["after"]


def test_faults_of_the_answer(up: Upstream) -> None:
    def body(fault: str, stream: bool = False, **more: Any) -> bytes:
        up.script("a", fault=fault, **more)
        return bytes(ask(up, stream=stream).body)

    with pytest.raises(json.JSONDecodeError):
        json.loads(body("garbage"))
    assert b"data:" not in body("garbage", stream=True)
    assert b"[DONE]" not in body("eof", stream=True, after=2)
    assert b'{"error":{"message":"the engine died"' in body("error_event", stream=True, after=2)
    assert len(body("gigantic", size=3_000_000)) == len(body("gigantic", stream=True, size=3_000_000)) == 3_000_000
    assert json.loads(body("empty"))["choices"][0]["message"]["content"] == ""
    assert json.loads(body("thinking_cut"))["choices"][0]["finish_reason"] == "length"
    assert json.loads(body("looping"))["choices"][0]["message"]["content"].count("again") > 10
    with pytest.raises(json.JSONDecodeError):
        json.loads(json.loads(body("tool_json"))["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"])


def test_shares_and_first_ones(up: Upstream) -> None:
    up.script("a", fault="status", share=0.3)
    found = [ask(up).status for _ in range(100)]
    assert 15 < found.count(500) < 45
    up.script("a", fault="status", status=503, first=2)
    assert [ask(up).status for _ in range(4)] == [503, 503, 200, 200]


def test_addresses_that_do_not_answer() -> None:
    with refused() as url:
        assert call(url, "/").error.startswith("no connection: [Errno 111]")
    with unreachable() as url:
        assert "time" in call(url, "/", limit=0.5).error


def test_the_load_generator_sees_latency_chunks_and_errors(up: Upstream) -> None:
    up.script("a", tokens=3, first_seconds=0.05, stamp=True)
    up.script("b", fault="status", status=500)
    body = json.dumps({"model": "m", "stream": True, "messages": []})
    job = {"url": up.base("a"), "path": "/chat/completions", "bodies": [body]}
    jobs = [
        job | {"mode": "closed", "count": 10, "connections": 5},
        job | {"mode": "open", "count": 10, "rate": 100},
        job | {"mode": "open", "count": 10, "rate": 100, "url": up.base("b")},
    ]
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "_load.py"
    lines = "".join(json.dumps(one) + "\n" for one in jobs)
    run = subprocess.run([sys.executable, str(script)], input=lines, capture_output=True, text=True, check=True)
    in_turn, by_time, failed = map(json.loads, run.stdout.splitlines())
    for found in (in_turn, by_time):
        assert found["ok"] == 10
        assert len(found["delays"]) == found["tokens"] == 30
        assert min(found["latencies"]) > 0.05
    assert in_turn["seconds"] < 0.5
    assert failed["ok"] == 0
    assert sum(failed["errors"].values()) == 10
