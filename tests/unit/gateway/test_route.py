"""From an alias to the places that may answer: rules, policy, arms, experiments, failover, shadows."""

from __future__ import annotations

from typing import Any

import pytest

from freehold.errors import NotFound, PolicyRefused, UnsupportedField
from freehold.gateway.call import Caller, Decision, Target
from freehold.gateway.routing.assign import Pins
from freehold.gateway.routing.route import Experiments, FirstSteps, Fixed, Table
from freehold.ledger import Row
from tests.routing import EXPERIMENT, SECRET, TOML, chat, request, settings


class Standings:
    """Experiments whose share a test sets."""

    def __init__(self, now: Fixed | None = None) -> None:
        self.now = now

    def standing(self, experiment: str) -> Fixed | None:
        return self.now


def table(more: str = "", experiments: Experiments | None = None, base: str = TOML, **options: Any) -> Table:
    return Table(settings(more, base), SECRET, experiments or Standings(), **options)


def places(decision: Decision) -> list[tuple[str, str]]:
    return [(target.upstream, target.model_id) for target in decision.targets]


GLM, TINY, BIG = ("house", "glm-5.2"), ("small", "tiny"), ("cloud", "big")


def test_an_alias_and_then_its_fallbacks() -> None:
    decision = table().decide(request())
    assert places(decision) == [GLM, BIG, TINY]
    assert [target.effort for target in decision.targets] == [None, None, "none"]
    assert decision.targets[0].price.output == 2_000_000
    assert (decision.experiment, decision.arm, decision.shadow, decision.why) == ("", "only", None, "assistant")


@pytest.mark.parametrize("alias", ["unknown", "", "house", "glm-5.2", "http://10.0.0.1/v1", "../cheap", "x" * 10_000])
def test_only_aliases_are_models(alias: str) -> None:
    with pytest.raises(NotFound, match="there is no model") as caught:
        table().decide(request(alias))
    assert len(caught.value.message) < 250


def test_a_key_may_have_only_some_models() -> None:
    caller = Caller("k", models=frozenset({"cheap"}))
    assert places(table().decide(request("cheap", caller=caller))) == [TINY]
    with pytest.raises(NotFound, match="'assistant' for this key"):
        table().decide(request("assistant", caller=caller))
    assert table().aliases(caller) == ["cheap"]
    assert table().aliases(Caller("k")) == ["assistant", "api", "cheap"]


def test_policy_leaves_out_targets_and_failovers() -> None:
    assert places(table().decide(request(data_class="personal"))) == [GLM, TINY]
    assert places(table().decide(request(caller=Caller("k", data_class="secret")))) == [GLM]


def test_policy_may_leave_only_a_fallback() -> None:
    assert places(table('[models.far]\narms=[{name="a",upstream="cloud",model="big"}]\nfallback=["cheap"]\n')
                  .decide(request("far", data_class="personal"))) == [TINY]  # fmt: skip


@pytest.mark.parametrize("data_class", ["unheard-of", "secret"])
def test_nowhere_to_go_is_refused_and_says_why(data_class: str) -> None:
    with pytest.raises(PolicyRefused, match=f"'cheap' may be sent data of class '{data_class}'") as caught:
        table().decide(request("cheap", data_class=data_class))
    assert "tiny" not in caught.value.message  # which upstreams there are is nobody's business
    assert caught.value.status == 403


def test_air_gapped_without_a_class_is_refused_too() -> None:
    base = "[gateway]\nair_gapped = true\n" + TOML.replace("api.example.com", "203.0.113.9")
    with pytest.raises(PolicyRefused, match="while the gateway is air-gapped"):
        table(base=base).decide(request("api"))
    assert places(table(base=base).decide(request())) == [GLM, TINY]


def test_only_who_speaks_the_format_is_asked() -> None:
    assert places(table().decide(request(endpoint="messages"))) == [GLM, BIG, TINY]  # translated from chat
    assert places(table().decide(request(endpoint="completions"))) == [GLM, TINY]
    assert places(table().decide(request(endpoint="embeddings"))) == [GLM]
    with pytest.raises(UnsupportedField, match="'assistant' does not answer responses"):
        table().decide(request(endpoint="responses"))


RULES = """
[[routes]]
name = "watch"
when = { path = "efficiency" }
to = "cheap"
effort = "low"
mode = "shadow"
[[routes]]
name = "watch-too"
when = { model = ["assistant"] }
effort = "low"
mode = "shadow"
[[routes]]
name = "batch"
when = { header = { X-Batch = "yes" }, key = ["k1", "k2"], team = ["t"] }
to = "cheap"
[[routes]]
name = "long"
when = { body_bytes_over = 500 }
effort = "medium"
[[routes]]
name = "old-prompt"
when = { prompt_name = ["greet"], prompt_version = ["1", "2"] }
to = "api"
[[routes]]
name = "local"
when = { data_class = ["secret"], body_bytes_under = 10000 }
to = "assistant"
effort = "none"
[[routes]]
name = "tasks"
when = { task = ["tag"], effort = ["", "low"], model = ["api"] }
to = "cheap"
"""
KEY = Caller("k1", team="t")


@pytest.mark.parametrize(
    ("facts", "route", "would", "first"),
    [
        ({}, "", "watch", GLM),
        ({"effort": "high"}, "", "watch-too", GLM),
        ({"alias": "api", "effort": "high"}, "", "", BIG),
        ({"caller": KEY, "headers": {"x-batch": "yes"}}, "batch", "watch", TINY),
        ({"caller": KEY, "headers": {"x-batch": "no"}}, "", "watch", GLM),
        ({"caller": Caller("k3", team="t"), "headers": {"x-batch": "yes"}}, "", "watch", GLM),
        ({"caller": Caller("k1"), "headers": {"x-batch": "yes"}}, "", "watch", GLM),
        ({"body": chat("x" * 600), "effort": "high"}, "long", "watch-too", GLM),
        ({"prompt_name": "greet", "prompt_version": "2"}, "old-prompt", "watch", BIG),
        ({"prompt_name": "greet", "prompt_version": "3"}, "", "watch", GLM),
        ({"alias": "api", "effort": "high", "caller": Caller("k", data_class="secret")}, "local", "", GLM),
        ({"alias": "api", "task": "tag"}, "tasks", "watch", TINY),
        ({"alias": "api", "task": "tag", "effort": "high"}, "", "", BIG),
        ({"alias": "assistant", "task": "tag"}, "", "watch", GLM),
    ],
)
def test_the_first_rule_that_holds(facts: dict[str, Any], route: str, would: str, first: tuple[str, str]) -> None:
    decision = table(RULES).decide(request(**facts))
    assert (decision.route, decision.would, places(decision)[0]) == (route, would, first)
    assert decision.why.split()[1:] == ([f"route={route}"] if route else [])


def test_a_rule_sets_the_effort_unless_the_arm_does() -> None:
    rules = '[[routes]]\nname = "r"\neffort = "medium"\n'
    assert [target.effort for target in table(rules).decide(request()).targets] == ["medium", "medium", "none"]


def test_a_rule_does_not_lead_to_another_rule() -> None:
    rules = """
    [[routes]]
    name = "first"
    when = { model = ["assistant"] }
    to = "api"
    [[routes]]
    name = "second"
    when = { model = ["api"] }
    to = "cheap"
    """
    assert places(table(rules).decide(request()))[0] == BIG


def split(experiments: Experiments, **options: Any) -> Table:
    return table(EXPERIMENT, experiments, **options)


def test_the_canary_has_its_share_of_the_units() -> None:
    found = split(Standings(Fixed(0.05)))
    arms = [found.decide(request("split", f"u{number}")).arm for number in range(4000)]
    assert 130 < arms.count("next") < 270
    assert set(arms) == {"now", "next"}


def find(found: Table, arm: str, **facts: Any) -> tuple[str, Decision]:
    """A unit of this arm, and its decision."""
    decisions = ((f"u{n}", found.decide(request("split", f"u{n}", **facts))) for n in range(1000))
    return next((unit, decision) for unit, decision in decisions if decision.arm == arm)


def test_the_canary_fails_over_to_the_control_and_not_the_other_way_round() -> None:
    found = split(Standings(Fixed(0.2)))
    _, canary = find(found, "next")
    assert [target.arm for target in canary.targets] == ["next", "now", "only"]
    _, control = find(found, "now")
    assert [target.arm for target in control.targets] == ["now", "only"]
    assert canary.why == "split experiment=int4 arm=next"


def test_the_decision_names_the_unit_that_was_sticky() -> None:
    by_user = EXPERIMENT.replace('canary = "next"', 'canary = "next"\nsticky = "user"')
    by_key = EXPERIMENT.replace('canary = "next"', 'canary = "next"\nsticky = "key"')
    facts: dict[str, Any] = {"user": "alice", "caller": Caller("k7")}
    for more, unit in ((EXPERIMENT, "unit"), (by_user, "alice"), (by_key, "k7")):
        assert table(more, Standings(Fixed(0.5))).decide(request("split", **facts)).unit == unit
    nobody = table(by_user, Standings(Fixed(0.5))).decide(request("split", caller=Caller("k7")))
    assert nobody.unit == "k7"


def test_rolled_back_and_promoted() -> None:
    standings = Standings(Fixed(0.0))
    found = split(standings)
    rolled_back = [found.decide(request("split", f"u{number}")) for number in range(200)]
    assert {decision.arm for decision in rolled_back} == {"now"}
    assert all(target.arm != "next" for decision in rolled_back for target in decision.targets)
    standings.now = Fixed(1.0)
    promoted = [found.decide(request("split", f"u{number}")) for number in range(200)]
    assert {decision.arm for decision in promoted} == {"next"}
    assert all(decision.targets[1].arm == "now" and decision.shadow is None for decision in promoted)


def test_an_experiment_of_which_nothing_is_known_yet_gives_its_canary_nothing() -> None:
    """As after a start or a change of settings: the canary may have been rolled back before."""
    decisions = [split(Standings(None)).decide(request("split", f"u{number}")) for number in range(300)]
    firsts = [decision.targets[0].arm for decision in decisions]
    assert firsts.count("next") == 0
    assert {(decision.experiment, decision.unit) for decision in decisions} == {("", "")}


def test_in_an_aa_run_both_arms_are_the_control() -> None:
    found = split(Standings(Fixed(0.5, aa=True)))
    _, canary = find(found, "next")
    assert [(target.arm, target.model_id) for target in canary.targets] == [("next", "glm-5.2"), ("only", "tiny")]
    assert canary.shadow is None
    _, control = find(found, "now")
    assert control.shadow is None


def test_a_conversation_stays_where_it_began() -> None:
    standings = Standings(Fixed(0.05))
    found = split(standings)
    units = [f"c{number}" for number in range(300)]

    def arms(at: float) -> dict[str, str]:
        return {unit: found.decide(request("split", unit, conversation=unit, at=at)).arm for unit in units}

    before = arms(at=0)
    standings.now = Fixed(0.5)
    assert arms(at=1800) == before
    assert arms(at=3000) == before  # each turn keeps it alive
    # Others begin on the share of now, and so do these once they are over.
    fresh = [found.decide(request("split", f"n{n}", conversation=f"n{n}")).arm for n in range(300)]
    assert 100 < fresh.count("next") < 200
    later = arms(at=3000 + 3601)
    assert later != before
    assert all(later[unit] == "next" for unit in units if before[unit] == "next")
    standings.now = Fixed(0.0)
    assert set(arms(at=6700).values()) == {"now"}  # a rollback takes everybody off


def test_an_aa_conversation_stays_on_the_controls_model() -> None:
    standings = Standings(Fixed(0.5, aa=True))
    found = split(standings)
    unit, _ = find(found, "next", conversation="c")
    standings.now = Fixed(0.5)
    assert found.decide(request("split", unit, conversation="c")).targets[0].model_id == "glm-5.2"
    assert found.decide(request("split", unit, conversation="other")).targets[0].model_id == "glm-5.2-int4"


def test_pins_outlive_a_reload_and_come_from_rows() -> None:
    standings = Standings(Fixed(0.05))
    first = split(standings)
    unit, _ = find(first, "now", conversation="")
    first.decide(request("split", unit, conversation="c"))
    standings.now = Fixed(1.0)
    assert split(standings, pins=first.pins).decide(request("split", unit, conversation="c")).arm == "now"
    restarted = split(standings)
    assert restarted.decide(request("split", unit, conversation="c")).arm == "next"
    row = Row(row_id="1", request_id="1", at=900.0, endpoint="chat", alias="split", conversation="c")
    for experiment, arm, kept in (("other", "now", "next"), ("int4", "next", "next"), ("int4", "now", "now")):
        fields = {name: getattr(row, name) for name in row.__struct_fields__} | {"experiment": experiment, "arm": arm}
        restarted.learn(Row(**fields))
        assert restarted.decide(request("split", unit, conversation="c")).arm == kept


def test_what_one_arm_may_not_see_is_in_no_experiment() -> None:
    more = EXPERIMENT.replace('upstream = "house", model = "glm-5.2-int4"', 'upstream = "small", model = "tiny"')
    found = table(more, Standings(Fixed(0.5)))
    decisions = [found.decide(request("split", f"u{number}", data_class="secret")) for number in range(100)]
    assert {(decision.experiment, decision.arm) for decision in decisions} == {("", "now")}
    assert {tuple(places(decision)) for decision in decisions} == {(GLM,)}
    assert all(decision.shadow is None for decision in decisions)


def test_a_promoted_canary_answers_what_the_control_may_not() -> None:
    more = EXPERIMENT.replace('upstream = "house", model = "glm-5.2" }', 'upstream = "small", model = "tiny" }')
    standings = Standings(Fixed(0.99))
    found = table(more, standings)
    with pytest.raises(PolicyRefused):
        found.decide(request("split", data_class="secret"))
    standings.now = Fixed(1.0)
    assert places(found.decide(request("split", data_class="secret"))) == [("house", "glm-5.2-int4")]


def test_a_share_of_the_controls_requests_is_mirrored() -> None:
    found = split(Standings(Fixed(0.05)))
    unit, _ = find(found, "now")
    shadows = [found.decide(request("split", unit, request_id=f"r{number}")).shadow for number in range(1000)]
    mirrored = [shadow for shadow in shadows if shadow is not None]
    assert 420 < len(mirrored) < 580
    assert {(shadow.arm, shadow.model_id) for shadow in mirrored} == {("next", "glm-5.2-int4")}
    unit, _ = find(found, "next")
    assert all(found.decide(request("split", unit, request_id=f"r{n}")).shadow is None for n in range(100))


def test_policy_keeps_shadows_at_home() -> None:
    more = EXPERIMENT.replace('upstream = "house", model = "glm-5.2-int4"', 'upstream = "cloud", model = "big"')
    more = more.replace("shadow = 0.5", "shadow = 1.0")
    found = table(more, Standings(Fixed(0.001)))
    assert found.decide(request("split")).shadow == Target("cloud", "big", "next", None, found.decide(
        request("api")).targets[0].price)  # fmt: skip
    assert found.decide(request("split", data_class="personal")).shadow is None


def test_a_third_arm_has_its_weight_and_takes_no_part() -> None:
    more = EXPERIMENT.replace(
        "]\nfallback", '  { name = "third", upstream = "small", model = "tiny", weight = 2.0 },\n]\nfallback', 1
    )
    found = table(more, Standings(Fixed(0.5)))
    decisions = [found.decide(request("split", f"u{number}")) for number in range(2000)]
    firsts = [decision.targets[0].arm for decision in decisions]
    assert 880 < firsts.count("third") < 1120
    assert 400 < firsts.count("next") < 600
    assert all((decision.experiment == "") == (decision.targets[0].arm == "third") for decision in decisions)
    assert all("next" not in [t.arm for t in decision.targets[1:]] for decision in decisions)


def test_a_fallback_alias_is_served_by_what_is_proven() -> None:
    more = EXPERIMENT + '[models.outer]\narms=[{name="a",upstream="cloud",model="big"}]\nfallback=["split"]\n'
    standings = Standings(Fixed(0.5))
    found = table(more, standings)
    assert {tuple(places(found.decide(request("outer", f"u{n}")))) for n in range(50)} == {(BIG, GLM)}
    standings.now = Fixed(1.0)
    assert places(found.decide(request("outer"))) == [BIG, ("house", "glm-5.2-int4"), GLM]


def test_a_place_is_tried_once() -> None:
    more = '[models.twice]\narms=[{name="a",upstream="house",model="glm-5.2"}]\nfallback=["assistant","cheap"]\n'
    assert places(table(more).decide(request("twice"))) == [GLM, TINY]


def test_first_steps_are_a_plain_split() -> None:
    found = settings(EXPERIMENT)
    first = FirstSteps(found)
    assert first.standing("int4") == Fixed(0.05)
    assert first.standing("other") is None


def test_pins_of_experiments_that_are_gone_are_dropped() -> None:
    assert set(split(Standings(), pins={"old": Pins()}).pins) == {"int4"}
