"""What routing rules save, from the rows of calls: those in shadow mode would save it, those that are on do.

A row names the rule that was applied (`route`) or would have been (`would`). For each rule and alias this adds up what
the calls cost and what they would have cost the other way: in shadow mode at the rule's target, else at the alias that
was asked for. Two figures, as one is exact and the other is an estimate:

* `price` takes the call's own tokens at the other place's prices.
* `effort` also expects as many output tokens as that model needs on average at that effort, relative to the effort as
  it was. Only rows can tell, so it has no value before there are MIN_ROWS of both; and the average is over calls whose
  clients chose that effort, which may be other calls than those the rule picks.

Other places are the first arm of the alias with a weight. Torch-free.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from freehold.gateway.call import Effort, Price
from freehold.gateway.config import Arm, Route, Settings
from freehold.gateway.prices import cost, price_of
from freehold.ledger import Row

MIN_ROWS = 30
"""Rows of a model at an effort before their mean stands for anything."""

# Classes of answers that came whole, good or not: they cost what they cost, and would elsewhere.
_WHOLE = frozenset(("", "empty", "looping", "tool_json", "thinking_cut", "refusal"))


@dataclass(frozen=True, slots=True)
class Saving:
    """Of one rule, at one alias. calls: with known cost and tokens. spent: what they cost, in micro-dollars. price,
    effort: what the rule saves, or would; negative if it costs more. effort is None as long as nothing can tell."""

    route: str
    mode: str
    alias: str
    calls: int
    spent: int
    price: int
    effort: int | None


@dataclass(slots=True)
class _Output:
    rows: int = 0
    tokens: int = 0

    @property
    def mean(self) -> float | None:
        return self.tokens / self.rows if self.rows >= MIN_ROWS else None


@dataclass(slots=True)
class _Sums:
    """Calls of one rule, alias, model and effort. Amounts are micro-dollars."""

    calls: int = 0
    spent: int = 0
    elsewhere: int = 0  # the calls' own tokens at the other prices
    output: int = 0  # tokens


class Savings:
    """Adds up rows, in memory that depends on the settings and not on the number of rows. Is an `Observer`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._rules = {route.name: route for route in settings.routes}
        self._outputs: defaultdict[tuple[str, str], _Output] = defaultdict(_Output)
        self._sums: defaultdict[tuple[str, str, str, str], _Sums] = defaultdict(_Sums)

    def configure(self, settings: Settings) -> None:
        """Take new settings. What was added up is kept where it still says what it said: for the same rule, against the
        same other place at the same prices."""
        before, rules = {key: self._against(*key[:2]) for key in self._sums}, self._rules
        self._settings = settings
        self._rules = {route.name: route for route in settings.routes}
        for key, against in before.items():
            if against is None or self._rules.get(key[0]) != rules[key[0]] or self._against(*key[:2]) != against:
                del self._sums[key]
        served = {model for upstream in settings.upstreams.values() for model in upstream.models}
        for known in [known for known in self._outputs if known[0] not in served]:
            del self._outputs[known]

    def __call__(self, row: Row) -> None:
        """Count a row. Attempts without a whole answer, shadows and unknown rules or aliases are left out."""
        if row.shadow_of or row.error not in _WHOLE or row.output_tokens is None or row.cost is None:
            return
        if row.alias not in self._settings.models:
            return
        output = self._outputs[row.model_id, row.effort]
        output.rows += 1
        output.tokens += row.output_tokens
        for name in (row.route, row.would):
            if name in self._rules:
                self._count(self._rules[name], row)

    def report(self) -> list[Saving]:
        """One a rule and alias that had calls, in the order of the settings."""
        found: list[Saving] = []
        for rule in self._settings.routes:
            for alias in self._settings.models:
                parts = {key[2:]: sums for key, sums in self._sums.items() if key[:2] == (rule.name, alias)}
                other = self._other(rule, alias)
                if not parts or other is None:
                    continue
                sign = 1 if rule.mode == "shadow" else -1
                spent = sum(sums.spent for sums in parts.values())
                elsewhere = sum(sums.elsewhere for sums in parts.values())
                changes = [self._change(rule, other, model, effort, sums) for (model, effort), sums in parts.items()]
                known = [change for change in changes if change is not None]
                price = sign * (spent - elsewhere)
                found.append(
                    Saving(
                        route=rule.name,
                        mode=rule.mode,
                        alias=alias,
                        calls=sum(sums.calls for sums in parts.values()),
                        spent=spent,
                        price=price,
                        effort=price - sign * sum(known) if len(known) == len(changes) else None,
                    )
                )
        return found

    def _count(self, rule: Route, row: Row) -> None:
        other = self._other(rule, row.alias)
        if other is None or row.cost is None or row.output_tokens is None:
            return
        elsewhere = cost(self._price(other), row.input_tokens, row.cached_tokens, row.output_tokens)
        if elsewhere is None:
            return
        sums = self._sums[rule.name, row.alias, row.model_id, row.effort]
        sums.calls += 1
        sums.spent += row.cost
        sums.elsewhere += elsewhere
        sums.output += row.output_tokens

    def _other(self, rule: Route, alias: str) -> Arm | None:
        """Where the calls do not go now: the rule's target in shadow mode, else the alias itself."""
        name = (rule.to or alias) if rule.mode == "shadow" else alias
        model = self._settings.models.get(name)
        return next((arm for arm in model.arms if arm.weight > 0), None) if model is not None else None

    def _against(self, rule: str, alias: str) -> tuple[str, str, Effort | None, Price] | None:
        """What a rule is compared with at an alias: where, with which effort, at which prices."""
        other = self._other(self._rules[rule], alias)
        return None if other is None else (other.upstream, other.model, other.effort, self._price(other))

    def _price(self, arm: Arm) -> Price:
        return price_of(self._settings.upstreams[arm.upstream].models[arm.model].prices)

    def _change(self, rule: Route, other: Arm, model: str, effort: str, sums: _Sums) -> int | None:
        """What the calls would cost more at the other place because of other output lengths, in micro-dollars."""
        there = self._effort(rule, other, effort)
        if (other.model, there) == (model, effort):
            return 0
        here_mean = self._outputs[model, effort].mean
        there_mean = self._outputs[other.model, there].mean
        if here_mean is None or there_mean is None or here_mean == 0:
            return None
        more = sums.output * (there_mean / here_mean - 1)
        return round(more * self._price(other).output / 1_000_000)

    def _effort(self, rule: Route, other: Arm, effort: str) -> str:
        """At the other place. A rule that is on has replaced the client's own, which the row does not have."""
        if other.effort is not None:
            return other.effort
        if rule.mode == "shadow":
            return effort if rule.effort is None else rule.effort
        return effort if rule.effort is None else ""


def savings(settings: Settings, rows: Iterable[Row]) -> list[Saving]:
    """The report of stored rows."""
    added = Savings(settings)
    for row in rows:
        added(row)
    return added.report()


def lines(report: Iterable[Saving]) -> list[str]:
    """For people: a line each. The share is of what the calls cost, or would have cost, without the rule."""
    found: list[str] = []
    for each in report:
        shadow = each.mode == "shadow"
        without = each.spent if shadow else each.spent + each.price
        share = f" ({each.price / without:.0%} of {_dollars(without)})" if without else ""
        effort = "too few calls to tell" if each.effort is None else _dollars(each.effort)
        found.append(
            f"{each.route} ({each.alias}, {each.calls} calls) {'would save' if shadow else 'saves'} "
            f"{_dollars(each.price)}{share} by price; with the effort's own output lengths: {effort}"
        )
    return found


def _dollars(micro: int) -> str:
    dollars = micro / 1_000_000
    return f"${dollars:,.2f}" if abs(dollars) >= 1 else f"${dollars:.4f}"
