"""Which replica gets a call: circuit breakers, load, affinity, limits. A clock that tests set."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from freehold.errors import Unavailable
from freehold.gateway.config import Upstream
from freehold.gateway.routing.engine_load import Load
from freehold.gateway.routing.replicas import Pool, Replica


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def pool(count: int = 3, **options: Any) -> tuple[Pool, list[Replica], Clock]:
    settings = Upstream(urls=tuple(f"http://10.0.0.{number}/v1" for number in range(count)), **options)
    replicas = [Replica("u", url, settings) for url in settings.replicas]
    for replica in replicas:
        replica.ready = True
    clock = Clock()
    return Pool("u", settings, replicas, clock), replicas, clock


def test_the_least_loaded_gets_the_call_and_equal_ones_take_turns() -> None:
    found, replicas, _ = pool()
    assert Counter(found.choose("").url for _ in range(30)) == dict.fromkeys((each.url for each in replicas), 10)
    replicas[1].end(True, 0)
    assert found.choose("") is replicas[1]


def test_engines_own_figures_count_calls_of_other_gateways() -> None:
    found, replicas, clock = pool()
    for replica, load in zip(replicas, (Load(5, 0), Load(1, 3), Load(2, 0)), strict=True):
        replica.load, replica.load_at = load, clock.now
    # The loads are 5, 7 and 2; our own calls since then are added.
    assert [found.choose("").url[-4] for _ in range(3)] == ["2", "2", "2"]
    assert {found.choose(""), found.choose("")} == {replicas[0], replicas[2]}


def test_old_figures_are_not_believed() -> None:
    found, replicas, clock = pool(2)
    replicas[0].load, replicas[0].load_at = Load(100, 0), clock.now
    replicas[1].load, replicas[1].load_at = Load(0, 0), clock.now
    assert {found.choose("") for _ in range(10)} == {replicas[1]}
    clock.now += 3 * found.settings.health.every + 1
    assert found.choose("") is replicas[0]  # by our own calls: none against ten


def test_figures_of_one_are_not_compared_with_counts_of_another() -> None:
    found, replicas, clock = pool(2)
    replicas[0].load, replicas[0].load_at = Load(9, 9), clock.now
    assert {found.choose(""), found.choose("")} == set(replicas)


def test_a_conversation_stays_on_its_replica() -> None:
    found, replicas, _ = pool()
    of = {name: found.choose(name) for name in map(str, range(30))}
    for replica in replicas:
        while replica.in_flight:
            replica.end(True, 0)
    for name, replica in of.items():
        assert found.choose(name) is replica
        replica.end(True, 0)
    assert set(of.values()) == set(replicas)


def test_only_conversations_of_a_lost_replica_move() -> None:
    found, replicas, _ = pool(4)

    def where() -> dict[str, Replica]:
        chosen = {name: found.choose(name) for name in map(str, range(60))}
        for replica in chosen.values():
            replica.end(True, 0)
        return chosen

    for replica in replicas:
        replica.in_flight = 1000  # so that a few calls more do not matter
    before = where()
    replicas[0].healthy = False
    after = where()
    assert all(after[name] is replica for name, replica in before.items() if replica is not replicas[0])
    assert len({after[name] for name, replica in before.items() if replica is replicas[0]}) > 1
    replicas[0].healthy = True
    assert where() == before


def test_a_conversation_leaves_a_replica_that_is_much_busier() -> None:
    found, replicas, _ = pool(2)
    home = found.choose("c")
    other = next(replica for replica in replicas if replica is not home)
    home.in_flight = 4
    assert found.choose("c") is home
    assert home.in_flight == 5
    assert found.choose("c") is other
    home.in_flight, other.in_flight = 100, 90
    assert found.choose("c") is home


def test_without_affinity_a_conversation_is_any_call() -> None:
    found, replicas, _ = pool(2, affinity=False)
    assert {found.choose("c"), found.choose("c")} == set(replicas)


def test_a_circuit_opens_lets_one_call_try_and_closes() -> None:
    found, (only,), clock = pool(1, breaker={"failures": 2, "open_seconds": 10})
    for _ in range(2):
        found.choose("").end(False, clock.now)
    assert only.circuit_open
    with pytest.raises(Unavailable, match="'u' has no replica that takes calls now") as caught:
        found.choose("")
    assert caught.value.retry_after == 10
    clock.now += 10
    trial = found.choose("")
    with pytest.raises(Unavailable):
        found.choose("")  # one only
    trial.end(False, clock.now)
    with pytest.raises(Unavailable):
        found.choose("")  # open again, at once
    clock.now += 10
    found.choose("").end(True, clock.now)
    assert not only.circuit_open
    assert [found.choose(""), found.choose("")] == [only, only]


def test_a_good_call_ends_a_row_of_bad_ones() -> None:
    found, (only,), clock = pool(1, breaker={"failures": 2})
    for ok in (False, True, False, True, False):
        found.choose("").end(ok, clock.now)
    assert not only.circuit_open


def test_a_second_try_goes_to_another_replica() -> None:
    found, _, clock = pool(2)
    first = found.choose("c")
    first.end(False, clock.now)
    assert found.choose("c") is not first
    clock.now += 2
    assert found.choose("c") is first


def test_what_failed_this_request_is_tried_again_only_if_there_is_no_other() -> None:
    found, replicas, _ = pool(2)
    first = found.choose("c")
    (other,) = [replica for replica in replicas if replica is not first]
    assert found.choose("c", frozenset({first.url})) is other
    other.ready = False  # fresh, and still better than what failed
    assert found.choose("c", frozenset({first.url})) is other
    assert found.choose("c", frozenset({first.url, other.url})) is first


def test_the_only_replica_is_tried_again() -> None:
    found, (only,), clock = pool(1)
    found.choose("").end(False, clock.now)
    assert found.choose("") is only


def test_drained_and_ejected_replicas_take_no_calls() -> None:
    found, replicas, _ = pool()
    replicas[0].draining = True
    replicas[1].healthy = False
    assert {found.choose(str(number)) for number in range(20)} == {replicas[2]}
    assert [replica.state for replica in replicas] == ["draining", "out", "ready"]
    replicas[2].draining = True
    with pytest.raises(Unavailable):
        found.choose("")


def test_nobody_is_sent_to_a_fresh_replica_while_another_is_ready() -> None:
    found, replicas, _ = pool(2)
    replicas[0].ready = False
    assert [replica.state for replica in replicas] == ["fresh", "ready"]
    assert {found.choose(str(number)) for number in range(10)} == {replicas[1]}
    replicas[1].ready = False
    assert {found.choose("") for _ in range(20)} == set(replicas)  # better than refusing
    replicas[0].fresh = replicas[1].fresh = False
    with pytest.raises(Unavailable):
        found.choose("")


def test_an_upstream_has_at_most_its_calls() -> None:
    found, replicas, _ = pool(2, max_concurrent=3)
    for _ in range(3):
        found.choose("")
    with pytest.raises(Unavailable, match="has its 3 calls"):
        found.choose("")
    replicas[0].end(True, 0)
    found.choose("")
