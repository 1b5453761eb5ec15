"""What rules would save, exactly by price, and by the lengths that an effort leads to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from freehold.gateway.prices import cost, price_of
from freehold.gateway.routing.savings import MIN_ROWS, Savings, lines, savings
from freehold.ledger import Row
from tests.live_gateway import LiveGateway
from tests.routing import TOML, settings

RULES = """
[[routes]]
name = "cheap"
when = { model = ["api"], path = "efficiency" }
to = "cheap"
mode = "shadow"
[[routes]]
name = "think-less"
when = { model = ["assistant"] }
effort = "low"
mode = "shadow"
[[routes]]
name = "moved"
when = { model = ["api"] }
to = "assistant"
effort = "low"
"""
SETTINGS = settings(RULES)


def row(upstream: str, model_id: str, **fields: Any) -> Row:
    tokens = {"input_tokens": 1000, "cached_tokens": 0, "output_tokens": 100} | {
        name: fields.pop(name) for name in ("input_tokens", "cached_tokens", "output_tokens") if name in fields
    }
    prices = price_of(SETTINGS.upstreams[upstream].models[model_id].prices)
    known = {"cost": cost(prices, *tokens.values())} | tokens | {"alias": "api"} | fields
    return Row(row_id="1", request_id="1", at=0.0, endpoint="chat", model_id=model_id, upstream=upstream, **known)


def test_a_shadow_rule_saves_the_difference_of_the_prices() -> None:
    (found,) = savings(SETTINGS, [row("cloud", "big", would="cheap")] * 10)
    # 1,000 input and 100 output tokens: 4,500 micro-dollars at the API, 60 at the small one.
    assert (found.route, found.mode, found.alias, found.calls) == ("cheap", "shadow", "api", 10)
    assert (found.spent, found.price, found.effort) == (45_000, 45_000 - 600, None)


def test_a_rule_that_is_on_has_saved_what_the_alias_would_have_cost() -> None:
    (found,) = savings(SETTINGS, [row("house", "glm-5.2", route="moved", effort="low")])
    assert (found.spent, found.price) == (700, 4500 - 700)


def test_a_rule_that_costs_more_saves_less_than_nothing() -> None:
    rules = '[[routes]]\nname = "up"\nto = "api"\nmode = "shadow"\n'
    (found,) = savings(settings(rules), [row("small", "tiny", alias="cheap", would="up")])
    assert found.price == 60 - 4500


def test_the_effort_needs_rows_of_both() -> None:
    asked = [row("house", "glm-5.2", alias="assistant", would="think-less", effort="high", output_tokens=1000)]
    low = [row("house", "glm-5.2", alias="assistant", effort="low", output_tokens=250)]
    (found,) = savings(SETTINGS, asked * MIN_ROWS + low * (MIN_ROWS - 1))
    assert (found.price, found.effort) == (0, None)
    (found,) = savings(SETTINGS, asked * MIN_ROWS + low * MIN_ROWS)
    # 750 output tokens less a call, at 2 micro-dollars each.
    assert (found.price, found.effort) == (0, MIN_ROWS * 750 * 2)


def test_where_nothing_changes_the_effort_adds_nothing() -> None:
    (found,) = savings(SETTINGS, [row("house", "glm-5.2", alias="assistant", would="think-less", effort="low")])
    assert (found.price, found.effort) == (0, 0)


def test_what_says_nothing_about_cost_is_left_out() -> None:
    good = row("cloud", "big", would="cheap")
    bad = [
        row("cloud", "big", would="cheap", shadow_of="x"),
        row("cloud", "big", would="cheap", error="cut"),
        row("cloud", "big", would="cheap", cost=None),
        row("cloud", "big", would="gone"),
        row("cloud", "big", would="cheap", alias="gone", route="moved"),
        row("cloud", "big"),
    ]
    poor = row("cloud", "big", would="cheap", error="thinking_cut")  # cost as much as a good one
    assert savings(SETTINGS, [good, poor, *bad])[0].calls == 2
    assert savings(SETTINGS, []) == []


def test_a_call_may_count_for_the_rule_that_was_and_the_one_that_would_be() -> None:
    found = savings(SETTINGS, [row("house", "glm-5.2", route="moved", would="cheap", effort="low")])
    assert [(each.route, each.price) for each in found] == [("cheap", 700 - 60), ("moved", 4500 - 700)]


def test_new_settings_keep_what_still_says_the_same() -> None:
    added = Savings(SETTINGS)
    for _ in range(10):
        added(row("cloud", "big", would="cheap"))
        added(row("house", "glm-5.2", route="moved", effort="low"))
    before = {each.route: each for each in added.report()}
    assert set(before) == {"cheap", "moved"}
    added.configure(settings(RULES.replace('name = "think-less"', 'name = "new"')))
    assert {each.route: each for each in added.report()} == before
    added(row("cloud", "big", would="new"))  # a rule that the first settings did not have
    assert {each.route for each in added.report()} == {"cheap", "new", "moved"}
    # Other prices at the place that a rule is compared with: what was added up there is worth nothing now.
    added.configure(settings(RULES, TOML.replace("input = 0.05", "input = 0.06")))
    assert {each.route for each in added.report()} == {"moved"}
    added.configure(settings(RULES.replace('name = "moved"', 'name = "moved"\nmode = "shadow"')))
    assert added.report() == []
    added(row("cloud", "big", would="cheap"))
    (found,) = added.report()
    assert (found.calls, found.price) == (1, 4500 - 60)


def test_rules_and_aliases_that_are_gone_are_forgotten() -> None:
    added = Savings(SETTINGS)
    added(row("cloud", "big", would="cheap"))
    added(row("house", "glm-5.2", route="moved", effort="low"))
    added.configure(settings(RULES.partition('[[routes]]\nname = "think')[0]))
    assert [each.route for each in added.report()] == ["cheap"]
    added.configure(settings())
    assert added.report() == []
    assert not added._sums


def test_a_reload_reaches_savings(gateway: Callable[..., LiveGateway]) -> None:
    live = gateway(TOML + RULES)
    assert live.parts is not None
    (savings,) = [each for each in live.parts.configured if isinstance(each, Savings)]
    live.call(lambda: savings(row("house", "glm-5.2", alias="assistant", would="added")))
    live.write(TOML + RULES.replace('name = "think-less"', 'name = "added"'))
    live.reload()
    live.call(lambda: savings(row("house", "glm-5.2", alias="assistant", would="added")))
    assert [(each.route, each.calls) for each in live.call(savings.report)] == [("added", 1)]


def test_the_report_in_words() -> None:
    rows = [row("cloud", "big", would="cheap")] * 1000 + [row("house", "glm-5.2", route="moved", effort="low")]
    effort = "by price; with the effort's own output lengths: too few calls to tell"
    assert lines(savings(SETTINGS, rows)) == [
        f"cheap (api, 1000 calls) would save $4.44 (99% of $4.50) {effort}",
        f"moved (api, 1 calls) saves $0.0038 (84% of $0.0045) {effort}",
    ]
