"""Streams that break off between chunks of several tokens: what is recorded is what was delivered, to the token."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from _gateway import Gateway, Upstream, alias_table, chat, key_table, upstream, upstream_table
from _http import Answer
from _processes import wait_until

from tests.source_checks import ROOT

PER_CHUNK = 4


@pytest.fixture(scope="module")
def up() -> Iterator[Upstream]:
    with upstream() as running:
        yield running


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The simulator with drafts: up to four tokens in a chunk."""
    log = tmp_path_factory.mktemp("sim") / "log"
    command = [sys.executable, "-m", "freehold.cli.main", "serve", "--sim", "--served-model-name", "model"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--port", "0", "--sim-itl-ms", "20", "--sim-drafts", "3"],
            env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_until(lambda: "ready: " in log.read_text(), 60, "the simulator is not ready")
        yield log.read_text().partition("ready: ")[2].partition(" on ")[2].partition("/v1")[0] + "/v1"
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def gateway(up: Upstream, engine: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    exact = "continuous_usage = true\n"
    text = upstream_table("exact", up.base("exact"), more=exact) + alias_table("exact", "exact")
    text += upstream_table("rough", up.base("rough")) + alias_table("rough", "rough")
    text += upstream_table("sim", engine, more=exact + "breaker.failures = 1000\n") + alias_table("sim", "sim")
    with Gateway(tmp_path_factory.mktemp("gateway"), text + key_table()) as running:
        yield running


@pytest.fixture(autouse=True)
def fresh(up: Upstream) -> None:
    up.reset()


def events(answer: Answer) -> list[Any]:
    return [json.loads(one) for one in re.findall(rb"^data: (\{.*\})\r?$", bytes(answer.body), re.MULTILINE)]


def words(answer: Answer) -> int:
    """Of the faulty upstream, whose tokens are words."""
    deltas = [each["choices"][0]["delta"] for each in events(answer) if each.get("choices")]
    return len(" ".join(str(delta.get("content") or "") for delta in deltas).split())


def last_row(gateway: Gateway, model: str, count: int) -> dict[str, Any]:
    def found() -> list[dict[str, Any]]:
        return [row for row in gateway.rows() if row["alias"] == model]

    wait_until(lambda: len(found()) >= count, 10, "no row")
    return max(found(), key=lambda row: row["at"])


def so_far(gateway: Gateway, model: str) -> int:
    return sum(row["alias"] == model for row in gateway.rows())


@pytest.mark.parametrize("after", [4, 20, 36])
def test_a_cut_stream_is_counted_by_its_tokens(gateway: Gateway, up: Upstream, after: int) -> None:
    for model in ("exact", "rough"):
        up.script(model, fault="cut", after=after, tokens=40, per_chunk=PER_CHUNK)
        before = so_far(gateway, model)
        answer = gateway.ask(body=chat(model=model, stream=True), limit=30)
        row = last_row(gateway, model, before + 1)
        assert row["error"] == "cut"
        delivered = row["output_tokens"] - row["undelivered_tokens"]
        assert words(answer) == after
        if model == "exact":
            assert delivered == row["output_tokens"] == after
            assert row["counted"] == "upstream"
        else:  # without the setting it is one a chunk: what the setting is for
            assert delivered == after // PER_CHUNK
            assert row["counted"] == "counted"


def test_a_client_that_leaves_pays_for_what_it_had(gateway: Gateway, up: Upstream) -> None:
    before = so_far(gateway, "exact")
    up.script("exact", tokens=4000, per_chunk=PER_CHUNK, chunk_seconds=0.01)
    answer = gateway.ask(body=chat(model="exact", stream=True), limit=30, abort_after=12)
    row = last_row(gateway, "exact", before + 1)
    assert row["error"] == "client_gone"
    delivered = row["output_tokens"] - row["undelivered_tokens"]
    assert delivered % PER_CHUNK == 0
    # The client has read at least so many; what was on its way when it left was sent to it, too.
    assert words(answer) <= delivered <= words(answer) + 3 * PER_CHUNK
    wait_until(lambda: up.totals()["exact"].get("aborted") == 1, 5, "the upstream goes on")


def test_only_those_who_ask_see_the_usage_of_each_chunk(gateway: Gateway, up: Upstream) -> None:
    up.script("exact", tokens=20, per_chunk=PER_CHUNK)

    def chunks(**options: Any) -> list[Any]:
        more = {"stream_options": options} if options else {}
        return events(gateway.ask(body=chat(model="exact", stream=True, **more), limit=30))

    plain = chunks()
    assert all("usage" not in each for each in plain)
    assert all(each["choices"] for each in plain)
    *running, last = chunks(include_usage=True)
    assert [each["usage"] for each in running] == [None] * len(running)
    assert last["usage"]["completion_tokens"] == 20
    *all_of_it, last = chunks(include_usage=True, continuous_usage_stats=True)
    assert [each["usage"]["completion_tokens"] for each in all_of_it] == [0, 4, 8, 12, 16, 20, 20]
    assert last["usage"]["completion_tokens"] == 20


@pytest.mark.parametrize("after", [6, 12, 25])
def test_what_the_simulator_said_until_it_failed_is_recorded(gateway: Gateway, after: int) -> None:
    """Its chunks have one to four tokens. A client that asks for the usage of each has seen what the row must say."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    for more in ({"stream_options": options}, {}):
        before = so_far(gateway, "sim")
        text = f"Tell me [[sim words=80]] [[sim error after={after}]]"
        said = events(gateway.ask(body=chat(text, model="sim", stream=True, **more), limit=30))
        row = last_row(gateway, "sim", before + 1)
        assert "error" in said[-1]
        assert (row["error"], row["counted"], row["undelivered_tokens"]) == ("cut", "upstream", 0)
        seen = [each["usage"]["completion_tokens"] for each in said if each.get("usage")]
        if more:
            assert row["output_tokens"] == seen[-1] > len(seen) - 1
        else:
            assert not seen
        assert after - 4 <= row["output_tokens"] <= after + 4


def test_a_whole_stream_of_the_simulator_counts_up_to_its_end(engine: str) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    for path, asked in (
        ("chat/completions", chat("Say [[sim words=20]]", model="model")),
        ("completions", {"model": "model", "prompt": "Say [[sim words=20]]", "max_tokens": 40}),
    ):
        text = httpx.post(f"{engine}/{path}", json=asked | {"stream": True, "stream_options": options}).text
        *chunks, last = [json.loads(line[6:]) for line in text.split("\n") if line.startswith("data: {")]
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks if chunk["usage"]]
        assert counts == sorted(counts)
        assert len(counts) >= len(chunks) - 1  # a chunk with only the role has none
        assert counts[-1] == last["usage"]["completion_tokens"] > 10
        assert chunks[-1]["usage"] == last["usage"]
        without = httpx.post(
            f"{engine}/{path}", json=asked | {"stream": True, "stream_options": {"include_usage": True}}
        ).text
        *others, _ = [json.loads(line[6:]) for line in without.split("\n") if line.startswith("data: {")]
        assert [chunk["usage"] for chunk in others] == [None] * len(others)
