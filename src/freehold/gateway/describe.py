"""Valid settings in words: where calls may go, under which licence and notes, and what looks like an oversight.
Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from freehold.gateway.config import MAX_OUTPUT_TOKENS, Model, Settings, Upstream
from freehold.gateway.policy import Policy, is_local


def describe(settings: Settings) -> list[str]:
    """The settings in words, a line each: upstreams, aliases, classes of data."""
    found: list[str] = []
    for name, upstream in settings.upstreams.items():
        found += _upstream(name, upstream)
    for alias, model in settings.models.items():
        found += _alias(settings, alias, model)
    found += _classes(settings)
    if settings.gateway.air_gapped:
        found.append("air-gapped: only private and loopback addresses are called")
    return found


def warnings(settings: Settings) -> list[str]:
    """What is allowed, and probably not meant."""
    found: list[str] = []
    used = {(arm.upstream, arm.model) for model in settings.models.values() for arm in model.arms}
    for name, upstream in settings.upstreams.items():
        where = f"upstreams.{name}"
        for model_id, model in upstream.models.items():
            if not model.licence:
                found.append(f"{where}.models.{model_id}: no licence is noted")
            if upstream.engine == "api" and not (model.prices.input or model.prices.output):
                found.append(
                    f"{where}.models.{model_id}: an API without prices costs nothing in budgets and the ledger"
                )
            if (name, model_id) not in used:
                found.append(f"{where}.models.{model_id}: no alias uses it")
        if is_local(upstream) is False and not upstream.region:
            found.append(f"{where}: it is outside of this network, and no region is given")
        if is_local(upstream) is False and not upstream.provider:
            found.append(f"{where}: it is outside of this network, and passes for our own; give its provider")
        if is_local(upstream) is False and any(url.startswith("http://") for url in upstream.replicas):
            found.append(f"{where}: prompts and its key go out over http:// unencrypted")
        if upstream.metrics and upstream.engine == "api":
            found.append(f"{where}: metrics need an engine; those of an API are not known")
    budgets = [key.budget_per_day for key in settings.keys.values()]
    budgets += [team.budget_per_day for team in settings.teams.values()]
    if any(budget is not None for budget in budgets):
        found += [
            f"models.{alias}: no max_output_tokens: where a budget must cover it, a call without a limit of its own "
            f"reserves {MAX_OUTPUT_TOKENS:,} output tokens, and a model with less room refuses it"
            for alias, model in settings.models.items()
            if model.output_limit is None
        ]
    policy = Policy(settings)
    found += [
        f"data class {data_class!r} may go nowhere: requests that name it are refused"
        for data_class in _named_classes(settings)
        if not policy.allowed([data_class])
    ]
    return found + _unreachable_rules(settings)


def _upstream(name: str, upstream: Upstream) -> Iterator[str]:
    where = {True: "local", False: "outside", None: "a name, which may be local or not"}[is_local(upstream)]
    facts = [
        f"provider {upstream.provider or 'ourselves'}",
        f"region {upstream.region or 'not given'}",
        f"classes of data: {', '.join(upstream.data_classes) or 'only unclassed'}",
    ]
    yield f"upstream {name}: {', '.join(upstream.replicas)} ({upstream.engine}; {where}); {'; '.join(facts)}"
    if upstream.note:
        yield f"  note: {upstream.note}"
    for model_id, model in upstream.models.items():
        prices = model.prices
        cached = "" if prices.cached_input is None else f", cached input {prices.cached_input:g}"
        weights = f"; weights {model.weights}" if model.weights else ""
        yield (
            f"  model {model_id}: licence {model.licence or 'not given'}; "
            f"USD/Mtok input {prices.input:g}{cached}, output {prices.output:g}{weights}"
        )


def _alias(settings: Settings, alias: str, model: Model) -> Iterator[str]:
    shares = _shares(settings, alias, model)
    arms = ", ".join(f"{arm.name} {shares[arm.name]} ({arm.upstream}: {arm.model})" for arm in model.arms)
    fallback = f"; then {', '.join(model.fallback)}" if model.fallback else ""
    yield f"model {alias}: {arms}{fallback}"
    if model.note:
        yield f"  note: {model.note}"
    for name, each in settings.experiments.items():
        if each.alias == alias:
            steps = _ramp(each.steps)
            first = f"A/A for {each.aa_units:,} units, " if each.aa_units else ""
            yield f"  experiment {name}: {each.canary} against {each.control}, {first}{steps}, sticky by {each.sticky}"


def _shares(settings: Settings, alias: str, model: Model) -> dict[str, str]:
    """What share of the alias's units each arm has: by its weight, and of an experiment's two arms, which pool theirs,
    by the steps of the ramp."""
    total = sum(arm.weight for arm in model.arms)
    weights = {arm.name: arm.weight / total for arm in model.arms}
    shares = {name: _percent(weight) for name, weight in weights.items()}
    for each in settings.experiments.values():
        if each.alias == alias:
            pool = weights[each.control] + weights[each.canary]
            shares[each.control] = _ramp([pool * (1 - step) for step in each.steps])
            shares[each.canary] = _ramp([pool * step for step in each.steps])
    return shares


def _ramp(shares: Sequence[float]) -> str:
    return " → ".join(_percent(share) for share in shares)


def _percent(share: float) -> str:
    """Whole percents, and as many digits as a small share needs: 1e-05 is not 0%."""
    return f"{round(100 * share, 9):.4g}%"


def _classes(settings: Settings) -> Iterator[str]:
    policy = Policy(settings)
    for data_class in _named_classes(settings):
        allowed = policy.allowed([data_class])
        aliases = [
            alias for alias, model in settings.models.items() if any(arm.upstream in allowed for arm in model.arms)
        ]
        to = ", ".join(name for name in settings.upstreams if name in allowed) or "nothing"
        yield f"data class {data_class}: may go to {to}; models {', '.join(aliases) or 'none'}"
        rule = settings.data_classes.get(data_class)
        if rule is not None and rule.note:
            yield f"  note: {rule.note}"


def _named_classes(settings: Settings) -> list[str]:
    """All that upstreams, keys, rules and `[data_classes]` name, each once."""
    named = [*settings.data_classes]
    named += [each for upstream in settings.upstreams.values() for each in upstream.data_classes]
    named += [key.data_class for key in settings.keys.values() if key.data_class]
    named += [each for route in settings.routes for each in route.when.data_class]
    return list(dict.fromkeys(named))


def _unreachable_rules(settings: Settings) -> list[str]:
    """Rules that can never apply: one before them has the same aliases and no condition."""
    open_to: set[str] = set()
    found: list[str] = []
    for route in settings.routes:
        aliases = set(route.when.model or settings.models)
        if aliases <= open_to:
            found.append(f"routes {route.name!r}: an earlier rule without a condition always comes first")
        if route.mode == "on" and not route.when.model_dump(exclude={"model"}, exclude_defaults=True):
            open_to |= aliases
    return found
