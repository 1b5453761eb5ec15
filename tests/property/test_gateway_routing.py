"""For any settings, units and shares: ramps only add units, no target breaks policy, replicas are shared soundly."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from freehold.errors import PolicyRefused, Unavailable
from freehold.gateway.call import Caller, Price, Request
from freehold.gateway.config import Settings, Upstream
from freehold.gateway.policy import in_region
from freehold.gateway.prices import at_most, cost
from freehold.gateway.routing.assign import Points, ranking
from freehold.gateway.routing.replicas import Pool, Replica
from freehold.gateway.routing.route import Fixed, Table

secrets = st.binary(min_size=16, max_size=64)
units = st.lists(st.text(max_size=20), min_size=1, max_size=60, unique=True)
CLASSES = ("personal", "secret", "public", "new")
REGIONS = ("", "eu", "eu-west-1", "us")
PROVIDERS = ("", "example")


@given(secrets, st.text(max_size=10), units, st.lists(st.floats(0, 1), min_size=2, max_size=6))
def test_a_rising_share_only_adds_units(secret: bytes, salt: str, members: list[str], shares: list[float]) -> None:
    points = Points(secret, salt)
    having = [{unit for unit in members if points(unit) < share} for share in sorted(shares)]
    assert all(before <= after for before, after in pairwise(having))
    assert {unit for unit in members if points(unit) < 1.0} == set(members)
    assert not {unit for unit in members if points(unit) < 0.0}


weights = st.lists(st.one_of(st.just(0.0), st.floats(1e-3, 1e3)), min_size=2, max_size=6)


@given(secrets, units, weights, st.data())
def test_a_greater_weight_only_takes_units(
    secret: bytes, members: list[str], given_weights: list[float], data: st.DataObject
) -> None:
    grown = data.draw(st.integers(0, len(given_weights) - 1))
    more = data.draw(st.floats(given_weights[grown], 1e4))
    names = [f"arm{number}" for number in range(len(given_weights))]
    points = [Points(secret, name) for name in names]

    def firsts(of: list[float]) -> dict[str, str | None]:
        arms = list(zip(points, of, names, strict=True))
        return {unit: next(iter(ranking(arms, unit)), None) for unit in members}

    before = firsts(given_weights)
    after = firsts([more if number == grown else weight for number, weight in enumerate(given_weights)])
    assert all(after[unit] in (before[unit], names[grown]) for unit in members)


upstreams = st.fixed_dictionaries(
    {
        "url": st.sampled_from(["http://10.0.0.1/v1", "http://203.0.113.9/v1", "http://engine/v1"]),
        "region": st.sampled_from(REGIONS),
        "provider": st.sampled_from(PROVIDERS),
        "data_classes": st.lists(st.sampled_from(CLASSES), unique=True, max_size=3),
        "models": st.just({"m": {}}),
    }
)
rules = st.fixed_dictionaries(
    {
        "regions": st.lists(st.sampled_from(REGIONS[1:]), unique=True, max_size=2),
        "providers": st.lists(st.sampled_from(PROVIDERS), unique=True, max_size=2),
        "local": st.booleans(),
    }
)


@st.composite
def gateways(draw: st.DrawFn) -> Settings:
    """Up to four upstreams, two of which an experiment compares, with routes and fallbacks between three aliases."""
    places = {f"up{number}": draw(upstreams) for number in range(4)}
    names = st.sampled_from(sorted(places))
    arms = [
        {"name": f"arm{n}", "upstream": draw(names), "model": "m", "weight": draw(st.floats(0.1, 9))} for n in (0, 1, 2)
    ]
    single = [{"name": "only", "upstream": draw(names), "model": "m"}]
    return Settings.model_validate(
        {
            "gateway": {"air_gapped": draw(st.booleans())},
            "upstreams": places,
            "models": {
                "a": {"arms": arms, "fallback": draw(st.lists(st.sampled_from(["b", "c"]), unique=True))},
                "b": {"arms": single, "fallback": ["a"]},
                "c": {"arms": [{"name": "only", "upstream": draw(names), "model": "m"}]},
            },
            "routes": [{"name": "r", "when": {"task": ["t"]}, "to": draw(st.sampled_from("abc"))}],
            "data_classes": draw(st.dictionaries(st.sampled_from(CLASSES), rules, max_size=3)),
            "experiments": {
                "e": {
                    "alias": "a",
                    "control": "arm0",
                    "canary": "arm1",
                    "shadow": draw(st.sampled_from([0.0, 1.0])),
                    "guardrails": [{"metric": "error", "margin": 0.01}],
                }
            },
        }
    )  # fmt: skip


def may(found: Settings, name: str, data_class: str) -> bool:
    """The policy in its own words, for one upstream and one class."""
    upstream = found.upstreams[name]
    local = "10.0.0.1" in upstream.url
    if found.gateway.air_gapped and "203.0.113.9" in upstream.url:
        return False
    if not data_class:
        return True
    rule = found.data_classes.get(data_class)
    if data_class not in upstream.data_classes:
        return False
    if rule is None:
        return True
    if rule.local and not local:
        return False
    if rule.regions and not any(in_region(upstream.region, region) for region in rule.regions):
        return False
    return not rule.providers or upstream.provider in rule.providers


class Always:
    def __init__(self, standing: Fixed | None) -> None:
        self._standing = standing

    def standing(self, experiment: str) -> Fixed | None:
        return self._standing


standings = st.one_of(st.none(), st.builds(Fixed, st.sampled_from([0.0, 0.05, 0.5, 1.0]), st.booleans()))
asked = st.builds(
    Request,
    request_id=st.text(max_size=5),
    at=st.floats(0, 1e4),
    endpoint=st.just("chat"),
    caller=st.builds(Caller, st.just("k"), data_class=st.sampled_from(("", *CLASSES))),
    alias=st.sampled_from("abc"),
    body=st.just(b"{}"),
    task=st.sampled_from(["", "t"]),
    data_class=st.sampled_from(("", "unheard-of", *CLASSES)),
    unit=st.text(max_size=5),
    conversation=st.text(max_size=2),
)


@settings(max_examples=150)
@given(gateways(), standings, st.lists(asked, min_size=1, max_size=12))
def test_no_target_breaks_the_policy(found: Settings, standing: Fixed | None, requests: list[Request]) -> None:
    table = Table(found, bytes(16), Always(standing))
    for request in requests:
        named = {request.data_class, request.caller.data_class}
        try:
            decision = table.decide(request)
        except PolicyRefused:
            continue
        shadow = [decision.shadow] if decision.shadow is not None else []
        for target in (*decision.targets, *shadow):
            assert all(may(found, target.upstream, data_class) for data_class in named)
        tried = [(target.upstream, target.model_id, target.arm) for target in decision.targets]
        assert len(set(tried)) == len(tried)
        if decision.experiment:
            assert decision.arm == decision.targets[0].arm
            assert all(may(found, arm.upstream, each) for arm in found.models["a"].arms[:2] for each in named)


@settings(max_examples=100)
@given(
    st.lists(st.tuples(st.text(max_size=3), st.text(max_size=3), st.floats(0, 1)), min_size=1, max_size=40),
    st.booleans(),
)
def test_a_conversation_never_goes_from_one_model_to_the_other(
    turns: list[tuple[str, str, float]], starts_aa: bool
) -> None:
    """turns: unit, conversation, and the share by then; shares rise."""
    found = Settings.model_validate(
        {
            "upstreams": {"u": {"url": "http://127.0.0.1/v1", "models": {"old": {}, "new": {}}}},
            "models": {
                "a": {"arms": [{"name": name, "upstream": "u", "model": name} for name in ("old", "new")]},
            },
            "experiments": {
                "e": {"alias": "a", "control": "old", "canary": "new", "guardrails": [{"metric": "error", "margin": 1}]}
            },
        }
    )  # fmt: skip
    now = Always(None)
    table = Table(found, bytes(16), now)
    seen: dict[tuple[str, str], str] = {}
    shares = sorted(share for _, _, share in turns)
    for number, ((unit, conversation, _), share) in enumerate(zip(turns, shares, strict=True)):
        now._standing = Fixed(share, aa=starts_aa and number < len(turns) // 2)
        name = f"{unit}/{conversation}"
        request = Request(str(number), number, "chat", Caller("k"), "a", b"{}", unit=name, conversation=name)
        model = table.decide(request).targets[0].model_id
        assert seen.setdefault((unit, conversation), model) == model


prices = st.builds(Price, st.integers(0, 10**9), st.one_of(st.none(), st.integers(0, 10**9)), st.integers(0, 10**9))
counts = st.integers(0, 10**7)


@given(prices, counts, counts, counts)
def test_a_reservation_covers_the_cost(price: Price, tokens: int, cached: int, output: int) -> None:
    exact = cost(price, tokens, cached, output)
    assert exact is not None
    assert 0 <= exact <= at_most(price, tokens, output)


steps = st.lists(
    st.tuples(st.sampled_from(["choose", "ok", "fail", "wait", "eject", "heal", "drain"]), st.integers(0, 9)),
    max_size=80,
)


@given(st.integers(1, 4), steps, st.integers(1, 6))
def test_calls_go_only_to_replicas_that_take_them(count: int, moves: list[tuple[str, int]], most: int) -> None:
    upstream = Upstream(urls=tuple(f"http://127.0.0.1:{n + 1}/v1" for n in range(count)), max_concurrent=most)
    replicas = [Replica("u", url, upstream) for url in upstream.replicas]
    now = 0.0
    pool = Pool("u", upstream, replicas, lambda: now)
    running: list[Replica] = []
    for move, number in moves:
        replica = replicas[number % count]
        if move == "choose":
            able = [each for each in replicas if each.state in ("ready", "fresh") and each.wait(now) == 0]
            if able and len(running) < most:
                chosen = pool.choose(str(number))
                assert chosen in able
                running.append(chosen)
            else:
                with pytest.raises(Unavailable) as caught:
                    pool.choose(str(number))
                assert caught.value.retry_after is not None
                assert caught.value.retry_after > 0
        elif move in ("ok", "fail") and running:
            running.pop(number % len(running)).end(move == "ok", now)
        elif move == "wait":
            now += number * 2
        elif move in ("eject", "heal"):
            replica.healthy = replica.ready = move == "heal"
        elif move == "drain":
            replica.draining = not replica.draining
        assert [each.in_flight for each in replicas] == [running.count(each) for each in replicas]
        assert len(running) <= most
    # Whatever happened: once calls succeed again, all that are healthy take calls.
    for replica in running:
        replica.end(True, now)
    for replica in replicas:
        replica.draining, replica.healthy, replica.ready = False, True, True
    now += 1000
    assert {pool.choose("").url for _ in range(min(most, count))}
