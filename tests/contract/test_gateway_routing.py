"""Routing through a real gateway, in front of simulated engines: failover, policy, rules, reloads, draining."""

from __future__ import annotations

import dataclasses
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from freehold.gateway.config import Settings
from freehold.gateway.parts import Parts
from freehold.gateway.routing.admin import admin_routes
from freehold.gateway.routing.route import FirstSteps
from freehold.gateway.routing.router import Router
from freehold.gateway.routing.savings import Savings
from tests.contract.conftest import LiveServer
from tests.live_gateway import LiveGateway
from tests.routing import SECRET

Engines: TypeAlias = tuple[LiveServer, LiveServer, LiveServer]
ADMIN = "4f0c1a77d2b94e6f8a35"


def config(one: str, two: str, three: str) -> str:
    return f"""
[gateway]
admin_key_file = "ADMIN"
[upstreams.pair]
urls = ["{one}/v1", "{two}/v1"]
engine = "freehold"
metrics = true
region = "eu-west"
data_classes = ["personal"]
models.sim = {{prices = {{input = 1.0, output = 2.0}}}}
health = {{every = 0.1, failures = 2}}
[upstreams.away]
url = "{three}/v1"
engine = "freehold"
provider = "example"
region = "us"
models.alias = {{prices = {{input = 10.0, output = 20.0}}}}
[models.glm]
arms = [{{name = "main", upstream = "pair", model = "sim"}}]
fallback = ["far"]
[models.far]
arms = [{{name = "main", upstream = "away", model = "alias"}}]
[[routes]]
name = "short"
when = {{model = ["far"], path = "efficiency"}}
to = "glm"
mode = "shadow"
"""


def routed(settings: Settings, parts: Parts) -> Parts:
    """The parts with the router of this package's own."""
    experiments = FirstSteps(settings)
    router = Router(settings, SECRET, experiments, lambda name, upstream: {})
    savings = Savings(settings)
    return dataclasses.replace(
        parts,
        router=router,
        routes={**parts.routes, **admin_routes(router.fleet, savings)},
        configured=(experiments, router),
        background=(router.run,),
    ).watched_by(savings)


@pytest.fixture
def engines(start: Callable[..., LiveServer]) -> Engines:
    return start(), start(), start()


@pytest.fixture
def gateway(engines: Engines, tmp_path: Path) -> Iterator[LiveGateway]:
    (tmp_path / "admin").write_text(ADMIN)
    text = config(*(engine.url for engine in engines)).replace("ADMIN", str(tmp_path / "admin"))
    live = LiveGateway(text, tmp_path, routed)
    yield live
    live.stop()


def call(gateway: LiveGateway, path: str, body: Any = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
    """Status, JSON and headers of an answer."""
    if path.startswith("/admin"):
        headers["authorization"] = f"Bearer {ADMIN}"
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(gateway.url + path, data, {"content-type": "application/json"} | headers)
    try:
        with urllib.request.urlopen(asked, timeout=20) as answer:
            return answer.status, json.load(answer), dict(answer.headers)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error), dict(error.headers)


def ask(gateway: LiveGateway, model: str = "glm", **headers: str) -> tuple[int, Any, dict[str, str]]:
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5}
    return call(gateway, "/v1/chat/completions", body, **headers)


def states(gateway: LiveGateway) -> list[str]:
    found = call(gateway, "/admin/replicas")[1]["replicas"]
    return [each["state"] for each in found if each["upstream"] == "pair"]


def test_a_conversation_stays_on_a_replica_and_survives_its_end(gateway: LiveGateway, engines: Engines) -> None:
    gateway.wait(lambda: states(gateway) == ["ready", "ready"])
    for number in range(12):
        status, body, _ = ask(gateway, **{"x-conversation-id": f"c{number % 4}"})
        assert (status, body["usage"]["completion_tokens"]) == (200, 5)
    replicas: dict[str, set[str]] = {}
    for row in gateway.wait_for_rows(12):
        replicas.setdefault(row.conversation, set()).add(row.replica)
    assert [len(urls) for urls in replicas.values()] == [1, 1, 1, 1]
    engines[0].stop()
    assert [ask(gateway, **{"x-conversation-id": f"c{number}"})[0] for number in range(8)] == [200] * 8
    gateway.wait(lambda: states(gateway) == ["out", "ready"])


def test_policy_is_asked_before_failover(gateway: LiveGateway) -> None:
    status, body, _ = ask(gateway, "far", **{"x-data-class": "personal"})
    assert (status, body["error"]["code"]) == (403, "policy_refused")
    assert ask(gateway, "glm", **{"x-data-class": "personal"})[0] == 200
    # With its own upstream drained, only the one away is left, which may not have it.
    for each in call(gateway, "/admin/replicas")[1]["replicas"]:
        if each["upstream"] == "pair":
            call(gateway, "/admin/replicas/drain", {"url": each["url"]})
    assert ask(gateway, "glm", **{"x-data-class": "personal"})[0] == 503
    gateway.rows.clear()
    assert ask(gateway, "glm")[0] == 200
    gateway.wait(lambda: {row.upstream for row in gateway.rows if row.status == 200} == {"away"})


def test_a_drained_replica_gets_nothing_until_it_is_restored(gateway: LiveGateway, engines: Engines) -> None:
    gateway.wait(lambda: states(gateway) == ["ready", "ready"])
    url = f"{engines[0].url}/v1"
    assert call(gateway, "/admin/replicas/drain", {"url": url})[0] == 200
    for number in range(6):
        ask(gateway, **{"x-conversation-id": f"c{number}"})
    assert {row.replica for row in gateway.wait_for_rows(6)} == {f"{engines[1].url}/v1"}
    assert call(gateway, "/admin/replicas/restore", {"url": url})[0] == 200
    assert states(gateway) == ["ready", "ready"]
    assert call(gateway, "/admin/replicas/drain", {"url": "http://127.0.0.1:1"})[0] == 404
    for wrong in ({"address": url}, {}, [], {"url": 5}):
        assert call(gateway, "/admin/replicas/drain", wrong)[0] == 400


def test_a_shadow_rule_is_in_the_rows_and_in_the_report(gateway: LiveGateway) -> None:
    assert ask(gateway, "far")[0] == 200
    (row,) = gateway.wait_for_rows(1)
    assert (row.would, row.route, row.upstream) == ("short", "", "away")
    assert row.cost is not None
    (saving,) = call(gateway, "/admin/savings")[1]["savings"]
    assert (saving["route"], saving["calls"], saving["spent"]) == ("short", 1, row.cost)
    assert saving["price"] > 0.85 * row.cost


def test_a_reload_waits_for_the_first_generation(
    gateway: LiveGateway, start: Callable[..., LiveServer], engines: Engines
) -> None:
    other = start()
    text = gateway.path.read_text()
    dead = text.replace(f'url = "{engines[2].url}/v1"', 'url = "http://127.0.0.1:1/v1"')
    dead = dead.replace("upstreams.away", "upstreams.new").replace('"away"', '"new"')
    dead = dead.replace('provider = "example"', "health = {warm_up_seconds = 0.5}")
    gateway.path.write_text(dead)
    gateway.reload()
    gateway.wait(lambda: any("'new': no replica completed a generation" in each for each in gateway.notices))
    assert ask(gateway, "far")[0] == 200  # as before
    gateway.path.write_text(dead.replace("http://127.0.0.1:1/v1", f"{other.url}/v1"))
    gateway.reload()
    gateway.wait(lambda: gateway.notices[-1].startswith("new settings"))
    gateway.rows.clear()
    assert ask(gateway, "far")[0] == 200
    assert [row.replica for row in gateway.wait_for_rows(1)] == [f"{other.url}/v1"]
