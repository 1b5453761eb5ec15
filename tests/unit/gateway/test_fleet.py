"""Probes, warm-up, ejection, reloads and draining, against small engines on real sockets."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any, Self

import pytest
from aiohttp import web
from aiohttp.resolver import ThreadedResolver

from freehold.errors import ConfigError, NotFound, Unavailable
from freehold.gateway.config import Settings, Upstream
from freehold.gateway.routing.fleet import Fleet
from freehold.gateway.routing.replicas import Replica
from freehold.gateway.routing.route import Fixed
from freehold.gateway.routing.router import Router
from tests.routing import SECRET, request


class Engine:
    """An engine's health, metrics and generations, as a test sets them; it keeps what it was asked."""

    def __init__(self) -> None:
        self.health = 200
        self.generates = True
        self.answer: bytes | None = None
        self.seconds = 0.0  # to health and metrics
        self.running = 0
        self.asked: list[tuple[str, str, dict[str, Any]]] = []
        self.url = ""

    async def start(self) -> web.AppRunner:
        app = web.Application()
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_post("/v1/{path:.*}", self._generate)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        return runner

    async def _health(self, got: web.Request) -> web.Response:
        await asyncio.sleep(self.seconds)
        headers = {"location": "/metrics"} if 300 <= self.health < 400 else {}
        return web.Response(status=self.health, headers=headers)

    async def _metrics(self, got: web.Request) -> web.Response:
        text = f"vllm:num_requests_running{{}} {self.running}\nvllm:num_requests_waiting{{}} 0\n"
        return web.Response(text=text)

    async def _generate(self, got: web.Request) -> web.Response:
        self.asked.append((got.match_info["path"], got.headers.get("authorization", ""), await got.json()))
        if self.answer is not None:
            return web.Response(body=self.answer)
        path = got.match_info["path"]
        field = {"responses": "output", "messages": "content", "embeddings": "data"}.get(path, "choices")
        return web.json_response({field: [{}]} if self.generates else {"error": {}}, status=200)


Start = Callable[[], Any]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Starts engines, which end with the test."""
    runners: list[web.AppRunner] = []

    async def one() -> Engine:
        engine = Engine()
        runners.append(await engine.start())
        return engine

    yield one
    for runner in runners:
        await runner.cleanup()


def settings_for(*engines: Engine, name: str = "u", weights: str = "", **upstream: Any) -> Settings:
    given = {
        "urls": [engine.url for engine in engines],
        "engine": "vllm",
        "models": {"m": {"weights": weights}},
        "health": {"every": 0.03, "failures": 2, "warm_up_seconds": 1.0},
    } | upstream
    return Settings.model_validate(
        {
            "upstreams": {name: given},
            "models": {"a": {"arms": [{"name": "only", "upstream": name, "model": "m"}]}},
        }
    )


def key(name: str, upstream: Upstream) -> dict[str, str]:
    return {"authorization": f"Bearer key of {name}"}


class Running:
    """A router whose fleet watches, until the test ends."""

    def __init__(self, settings: Settings, auth: Any = key) -> None:
        self.router = Router(settings, SECRET, Nobody(), auth)
        self.fleet: Fleet = self.router.fleet
        self._task = asyncio.create_task(self.router.run())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def replicas(self) -> list[Replica]:
        return [replica for pool in self.fleet.pools.values() for replica in pool.replicas]

    def states(self) -> list[str]:
        return [replica.state for replica in self.replicas()]

    async def until(self, *states: str) -> None:
        async with asyncio.timeout(5):
            while self.states() != list(states):
                await asyncio.sleep(0.005)

    def call(self) -> Replica:
        decision = self.router.decide(request("a"))
        return self.router.choose(decision.targets[0], request("a"))


class Nobody:
    def standing(self, experiment: str) -> Fixed | None:
        return None


async def test_a_replica_is_ready_after_a_generation(start: Start) -> None:
    engine = await start()
    engine.generates = False
    async with Running(settings_for(engine)) as running:
        assert running.states() == ["fresh"]
        await running.until("out")
        with pytest.raises(Unavailable):
            running.call()
        engine.generates = True
        await running.until("ready")
        path, sent, body = engine.asked[-1]
        assert (path, sent) == ("chat/completions", "Bearer key of u")
        assert body == {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
        assert running.call().url == engine.url


@pytest.mark.parametrize("answer", [b"", b"{}", b"[]", b"not json", b'{"choices": []}', b"[" * 100_000])
async def test_what_is_no_generation_makes_nobody_ready(start: Start, answer: bytes) -> None:
    engine = await start()
    engine.answer = answer
    async with Running(settings_for(engine)) as running:
        await running.until("out")


@pytest.mark.parametrize("endpoint", ["completions", "responses", "messages", "embeddings"])
async def test_the_generation_is_asked_in_the_upstreams_words(start: Start, endpoint: str) -> None:
    engine = await start()
    async with Running(settings_for(engine, speaks=[endpoint])) as running:
        await running.until("ready")
    assert engine.asked[0][0] == endpoint


async def test_health_ejects_and_a_generation_brings_back(start: Start) -> None:
    first, second = await start(), await start()
    async with Running(settings_for(first, second)) as running:
        await running.until("ready", "ready")
        first.health = 503
        await running.until("out", "ready")
        assert {running.call().url for _ in range(5)} == {second.url}
        first.generates, first.health = False, 200
        asked = len(first.asked)
        async with asyncio.timeout(5):
            while len(first.asked) < asked + 2:
                await asyncio.sleep(0.005)
        assert running.states() == ["out", "ready"]  # healthy, but generates nothing
        first.generates = True
        await running.until("ready", "ready")


async def test_one_failed_probe_ejects_nobody(start: Start) -> None:
    engine = await start()
    fleet = Fleet(settings_for(engine), key)
    (replica,) = fleet.pools["u"].replicas
    prober = fleet._prober
    await prober.look(replica, ["m"])
    states = []
    for health in (500, 200, 500, 500):
        engine.health = health
        await prober.look(replica, ["m"])
        states.append(replica.state)
    await prober.close()
    assert states == ["ready", "ready", "ready", "out"]


async def test_a_redirect_is_not_health(start: Start) -> None:
    engine = await start()
    engine.health = 302
    async with Running(settings_for(engine)) as running:
        await running.until("out")


async def test_an_api_is_neither_probed_nor_asked_for_a_generation(start: Start) -> None:
    engine = await start()
    engine.health = 500
    async with Running(_api(engine)) as running:
        await running.until("ready")
        await asyncio.sleep(0.05)
        assert running.states() == ["ready"]
    assert engine.asked == []


def _api(engine: Engine) -> Settings:
    return Settings.model_validate(
        {
            "upstreams": {"u": {"url": engine.url, "models": {"m": {}}}},
            "models": {"a": {"arms": [{"name": "only", "upstream": "u", "model": "m"}]}},
        }
    )


async def test_an_api_with_a_health_path_is_probed(start: Start) -> None:
    engine = await start()
    async with Running(settings_for(engine, engine="api")) as running:
        await running.until("ready")
        assert engine.asked == []
        engine.health = 500
        await running.until("out")


async def test_a_missing_key_is_no_health(start: Start) -> None:
    def no_key(name: str, upstream: Upstream) -> dict[str, str]:
        raise ConfigError("there is no key in the variable K")

    engine = await start()
    async with Running(settings_for(engine), auth=no_key) as running:
        await running.until("out")


async def test_load_is_read_where_the_settings_say_so(start: Start) -> None:
    first, second = await start(), await start()
    first.running = 50
    async with Running(settings_for(first, second, metrics=True)) as running:
        await running.until("ready", "ready")
        async with asyncio.timeout(5):
            while any(replica.load is None for replica in running.replicas()):
                await asyncio.sleep(0.005)
        assert {running.call().url for _ in range(10)} == {second.url}


async def test_a_switch_without_a_failed_call(start: Start) -> None:
    """New weights behind an alias: the old serve until the new have generated, and end their calls."""
    old, new = await start(), await start()
    new.generates = False
    async with Running(settings_for(old, name="old")) as running:
        await running.until("ready")
        call = running.call()
        switched = settings_for(new, name="new", weights="sha256:2")
        preparing = asyncio.create_task(running.router.prepare(switched))
        await asyncio.sleep(0.1)
        assert running.call().url == old.url
        new.generates = True
        await preparing
        assert new.asked
        assert running.call().url == old.url  # prepared is not yet taken
        running.router.configure(switched)
        assert running.call().url == new.url
        assert running.states() == ["ready"]  # at once: it has generated already
        assert {(each["url"], each["state"]) for each in running.fleet.describe()} == {
            (old.url, "leaving"),
            (new.url, "ready"),
        }
        waiting = asyncio.create_task(running.fleet.drained(old.url))
        for _ in range(3):
            await asyncio.sleep(0)
            assert not waiting.done()
            running.router.done(call, True)
        async with asyncio.timeout(5):
            await waiting
        assert running.fleet.leaving == []


async def test_what_never_generates_is_not_switched_to(start: Start) -> None:
    old, new = await start(), await start()
    new.generates = False
    async with Running(settings_for(old)) as running:
        await running.until("ready")
        with pytest.raises(Unavailable, match=r"upstream 'new': no replica completed a generation within 1 s"):
            await running.router.prepare(settings_for(new, name="new"))
        assert running.call().url == old.url
        assert len(running.fleet.describe()) == 1


async def test_one_of_several_new_replicas_is_enough(start: Start) -> None:
    good, bad = await start(), await start()
    bad.health = 503
    old = await start()
    async with Running(settings_for(old)) as running:
        switched = settings_for(bad, good, name="new")
        await running.router.prepare(switched)
        running.router.configure(switched)
        assert {running.call().url for _ in range(5)} == {good.url}


async def test_a_replica_that_is_down_does_not_hold_up_other_changes(start: Start) -> None:
    engine = await start()
    engine.health = 503
    async with Running(settings_for(engine)) as running:
        await running.until("out")
        changed = settings_for(engine, note="another note")
        await running.router.prepare(changed)
        running.router.configure(changed)
        assert running.states() == ["out"]


async def test_an_upstream_that_a_reload_took_away_is_unavailable(start: Start) -> None:
    engine = await start()
    async with Running(settings_for(engine, name="old")) as running:
        decision = running.router.decide(request("a"))
        running.router.configure(settings_for(engine, name="new"))
        with pytest.raises(Unavailable, match="'old' is not in the settings any more"):
            running.router.choose(decision.targets[0], request("a"))


async def test_replicas_keep_what_is_known_over_a_reload(start: Start) -> None:
    first, second = await start(), await start()
    async with Running(settings_for(first)) as running:
        await running.until("ready")
        call = running.call()
        running.router.configure(settings_for(first, second, max_concurrent=7))
        assert call in running.replicas()
        assert call.in_flight == 1
        assert call.settings.max_concurrent == 7
        assert running.states()[0] == "ready"
        await running.until("ready", "ready")


async def test_other_weights_at_the_same_address_generate_first(start: Start) -> None:
    engine = await start()
    async with Running(settings_for(engine, weights="a")) as running:
        await running.until("ready")
        running.router.configure(settings_for(engine, weights="b"))
        assert running.states() == ["fresh"]
        await running.until("ready")
    assert len(engine.asked) == 2


async def test_a_replica_is_drained_restarted_and_restored(start: Start) -> None:
    first, second = await start(), await start()
    async with Running(settings_for(first, second)) as running:
        await running.until("ready", "ready")
        running.fleet.drain(first.url)
        assert {running.call().url for _ in range(5)} == {second.url}
        async with asyncio.timeout(5):
            await running.fleet.drained(first.url)
        first.generates = False
        with pytest.raises(Unavailable, match="completed no generation"):
            await running.fleet.restore(first.url)
        assert running.states() == ["draining", "ready"]
        first.generates = True
        asked = len(first.asked)
        await running.fleet.restore(first.url)
        assert len(first.asked) > asked
        assert running.states() == ["ready", "ready"]
        with pytest.raises(NotFound, match="no upstream has a replica"):
            running.fleet.drain("http://127.0.0.1:1/v1")


async def test_only_what_was_chosen_here_can_be_done(start: Start) -> None:
    engine = await start()
    async with Running(settings_for(engine)) as running:
        with pytest.raises(TypeError, match="was not chosen here"):
            running.router.done(Elsewhere(), True)


class Elsewhere:
    url = "http://127.0.0.1/v1"


@pytest.mark.parametrize(("addresses", "state"), [(["127.0.0.1"], "ready"), (["127.0.0.1", "203.0.113.9"], "out")])
async def test_air_gapped_a_name_that_leads_outside_is_not_even_probed(
    start: Start, monkeypatch: pytest.MonkeyPatch, addresses: list[str], state: str
) -> None:
    async def resolve(self: ThreadedResolver, host: str, port: int = 0, family: Any = socket.AF_INET) -> list[Any]:
        return [
            {"hostname": host, "host": each, "port": port, "family": socket.AF_INET, "proto": 0, "flags": 0}
            for each in addresses
        ]

    monkeypatch.setattr(ThreadedResolver, "resolve", resolve)
    engine = await start()
    settings = settings_for(engine, urls=[engine.url.replace("127.0.0.1", "engine.test")])
    gateway = settings.gateway.model_copy(update={"air_gapped": True})
    async with Running(settings) as running:
        await running.until("ready")
    async with Running(settings.model_copy(update={"gateway": gateway})) as running:
        await running.until(state)
    # A reload takes it over, too.
    async with Running(settings) as running:
        await running.until("ready")
        running.router.configure(settings.model_copy(update={"gateway": gateway}))
        running.replicas()[0].ready = False
        await running.until(state)
