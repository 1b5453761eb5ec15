"""`freehold ledger`: what the gateway wrote down, asked from the command line."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from freehold.cli.gateway_store import CONFIG, ConfigOption, JsonOption, actor, moment, with_store
from freehold.errors import InvalidRequest

if TYPE_CHECKING:
    from freehold.gateway.config import Settings
    from freehold.gateway.keeping.filters import Filter
    from freehold.gateway.keeping.queries import Change, Spread, Sums
    from freehold.gateway.keeping.records import Usage
    from freehold.gateway.keeping.store import Store

SUBCOMMANDS: Mapping[str, tuple[str, str]] = {
    "cost": ("freehold.cli.ledger", "Calls, tokens and cost by prompt version, or by anything else."),
    "tokens": ("freehold.cli.ledger", "How many tokens a request takes, by task or by anything else."),
    "regressions": ("freehold.cli.ledger", "What the newest version of each prompt changed."),
    "budgets": ("freehold.cli.ledger", "What budgets have spent and reserved today."),
    "release": ("freehold.cli.ledger", "Give back what killed gateways left reserved."),
    "export": ("freehold.cli.ledger", "Write rows to a .parquet or .jsonl file."),
    "forget": ("freehold.cli.ledger", "Erase who a person is from all rows, or everybody."),
}

Since = Annotated[str | None, typer.Option(metavar="WHEN", help="7d, 12h or a UTC date.", show_default=False)]
Until = Annotated[str | None, typer.Option(metavar="WHEN", help="Before then.", show_default=False)]
Only = Annotated[
    list[str] | None, typer.Option(metavar="NAME=VALUE", help="As prompt_name=summarise.", show_default=False)
]
Shadows = Annotated[bool, typer.Option("--shadows", help="Mirrored calls too.")]
By = Annotated[list[str] | None, typer.Option(help="Also model_id, key_id, team, arm, ...; several are combined.")]


def ledger() -> None:
    """What the gateway wrote down: costs, tokens, regressions, budgets."""


def cost(
    by: By = None,
    since: Since = None,
    until: Until = None,
    only: Only = None,
    shadows: Shadows = False,
    config: ConfigOption = CONFIG,
    as_json: JsonOption = False,
) -> None:
    """Calls, tokens and cost by prompt version, or by anything else."""
    from freehold.gateway.access.budget import dollars
    from freehold.gateway.keeping.queries import sums

    groups = by or ["prompt_name", "prompt_version"]
    which = _filter(since, until, only, shadows)

    async def ask(store: Store, settings: Settings) -> list[Sums]:
        return await sums(store, groups, which)

    found = with_store(config, ask)
    if as_json:
        typer.echo(json.dumps([{**dict(zip(groups, each.group, strict=True)), **_facts(each)} for each in found]))
        return
    header = (*groups, "requests", "failed", "input", "cached", "output", "reasoning", "cost", "a request")
    lines = [
        (
            *each.group,
            f"{each.requests:,}",
            f"{each.failures:,}",
            f"{each.input_tokens:,}",
            f"{each.cached_tokens:,}",
            f"{each.output_tokens:,}",
            f"{each.reasoning_tokens:,}",
            dollars(each.cost) + (" or more" if each.uncosted else ""),
            dollars(round(each.cost / each.requests)),
        )
        for each in found
    ]
    _table(header, lines, left=len(groups))


def tokens(
    by: By = None,
    count: Annotated[str, typer.Option(help="output_tokens, input_tokens or reasoning_tokens.")] = "output_tokens",
    since: Since = None,
    until: Until = None,
    only: Only = None,
    shadows: Shadows = False,
    config: ConfigOption = CONFIG,
    as_json: JsonOption = False,
) -> None:
    """How many tokens a request takes, by task or by anything else."""
    from freehold.gateway.keeping.queries import tokens as ask_tokens

    groups = by or ["task", "model_id"]
    which = _filter(since, until, only, shadows)

    async def ask(store: Store, settings: Settings) -> list[Spread]:
        return await ask_tokens(store, groups, count, which)

    found = with_store(config, ask)
    if as_json:
        typer.echo(json.dumps([{**dict(zip(groups, each.group, strict=True)), **_facts(each)} for each in found]))
        return
    lines = [
        (*each.group, f"{each.requests:,}", f"{each.mean:,.1f}", f"{each.p50:,}", f"{each.p95:,}", f"{each.largest:,}")
        for each in found
    ]
    _table((*groups, "requests", "mean", "p50", "p95", "most"), lines, left=len(groups))


def regressions(
    before: Annotated[str | None, typer.Option("--from", metavar="VERSION", show_default=False)] = None,
    after: Annotated[str | None, typer.Option("--to", metavar="VERSION", show_default=False)] = None,
    since: Since = None,
    until: Until = None,
    only: Only = None,
    config: ConfigOption = CONFIG,
    as_json: JsonOption = False,
) -> None:
    """What the newest version of each prompt changed."""
    from freehold.gateway.keeping.queries import regressions as ask_regressions

    which = _filter(since, until, only, shadows=False)

    async def ask(store: Store, settings: Settings) -> list[Change]:
        return await ask_regressions(store, which, before, after)

    found = with_store(config, ask)
    if as_json:
        typer.echo(json.dumps([{**asdict(each), "worse": each.worse} for each in found]))
        return
    verdicts = {True: "worse", False: "better", None: ""}
    lines = [
        (
            each.prompt_name,
            f"{each.before} -> {each.after}",
            each.metric,
            verdicts[each.worse],
            _figure(each.metric, each.was),
            _figure(each.metric, each.now),
            f"{_figure(each.metric, each.difference.low)} to {_figure(each.metric, each.difference.high)}",
            f"{each.rows[0]:,} and {each.rows[1]:,}",
        )
        for each in found
    ]
    _table(("prompt", "versions", "metric", "", "was", "is", "difference (99%)", "attempts"), lines, left=4)


def budgets(config: ConfigOption = CONFIG, as_json: JsonOption = False) -> None:
    """What budgets have spent and reserved today."""
    from freehold.gateway.access.budget import dollars
    from freehold.gateway.access.keys import micro_dollars
    from freehold.gateway.keeping.records import day_of

    async def ask(store: Store, settings: Settings) -> tuple[list[Usage], dict[str, int]]:
        limits = {f"key:{name}": micro_dollars(key.budget_per_day) for name, key in settings.keys.items()}
        limits |= {f"key:{record.key_id}": record.budget_per_day for record in await store.keys()}
        limits |= {f"team:{name}": micro_dollars(team.budget_per_day) for name, team in settings.teams.items()}
        known = {scope: limit for scope, limit in limits.items() if limit is not None}
        return await store.usage(day_of(time.time())), known

    used, limits = with_store(config, ask)
    facts = {scope: {"spent": 0, "reserved": 0, "budget": limit} for scope, limit in limits.items()}
    for each in used:
        facts[each.scope] = {"spent": each.spent, "reserved": each.reserved, "budget": limits.get(each.scope, -1)}
    if as_json:
        typer.echo(json.dumps({scope: {k: v for k, v in each.items() if v >= 0} for scope, each in facts.items()}))
        return
    lines = [
        (scope, *(dollars(each[name]) if each[name] >= 0 else "" for name in ("spent", "reserved", "budget")))
        for scope, each in sorted(facts.items())
    ]
    _table(("budget of", "spent", "reserved", "a UTC day"), lines, left=1)


def release(
    silent_for: Annotated[str, typer.Option(metavar="SPAN", help="Gateways that wrote nothing for so long.")] = "2h",
    config: ConfigOption = CONFIG,
) -> None:
    """Give back what killed gateways left reserved."""
    older_than = moment(silent_for, "silent_for")
    assert older_than is not None

    async def give_back(store: Store, settings: Settings) -> int:
        return await store.release_stranded(older_than, actor())

    typer.echo(f"{with_store(config, give_back)} reservations released; a running gateway knows when it starts again")


def export(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Ends in .parquet or .jsonl.", show_default=False)],
    since: Since = None,
    until: Until = None,
    only: Only = None,
    config: ConfigOption = CONFIG,
) -> None:
    """Write rows to a .parquet or .jsonl file."""
    from freehold.gateway.keeping.export import export as write

    which = _filter(since, until, only, shadows=True)

    async def work(store: Store, settings: Settings) -> int:
        return await write(store, file, which)

    typer.echo(f"{file}: {with_store(config, work):,} rows")


def forget(
    user: Annotated[
        str | None, typer.Option(metavar="ID", help="The person's id, as requests have it.", show_default=False)
    ] = None,
    everyone: Annotated[bool, typer.Option("--everyone", help="Destroy the key of all pseudonyms.")] = False,
    config: ConfigOption = CONFIG,
) -> None:
    """Erase who a person is from all rows, or everybody."""
    from freehold.gateway.keeping.erasure import forget_everyone, forget_person

    if (user is None) == (not everyone):
        raise InvalidRequest("say either --user ID or --everyone")

    async def work(store: Store, settings: Settings) -> str:
        if user is not None:
            return f"{await forget_person(store, user, actor())} rows say no longer whose they are"
        await forget_everyone(store, actor())
        return "the key of all pseudonyms is destroyed; restart the gateway, which makes a new one"

    typer.echo(with_store(config, work))


def _filter(since: str | None, until: str | None, only: Sequence[str] | None, shadows: bool) -> Filter:
    from freehold.gateway.keeping.filters import NAMES, Filter

    given: dict[str, Any] = {}
    for each in only or ():
        name, equals, value = each.partition("=")
        if not equals or name not in NAMES:
            raise InvalidRequest(f"--only {each}: NAME=VALUE with one of {', '.join(NAMES)}", param="only")
        given[name] = value
    return Filter(since=moment(since, "since"), until=moment(until, "until"), shadows=shadows, **given)


def _facts(each: Sums | Spread) -> dict[str, Any]:
    return {name: value for name, value in asdict(each).items() if name != "group"}


def _figure(metric: str, value: float) -> str:
    if metric == "failures":
        return f"{100 * value:.2f}%"
    if metric == "cost":
        return f"{'-' if value < 0 else ''}${abs(value) / 1e6:.6f}"
    return f"{1000 * value:,.1f} ms" if metric in ("ttft", "tpot") else f"{value:,.1f}"


def _table(header: Sequence[str], lines: Sequence[Sequence[str]], left: int) -> None:
    """Columns in plain text: the first `left` of them to the left, figures to the right."""
    if not lines:
        typer.echo("The ledger has no such rows.")
        return
    widths = [max(len(line[column]) for line in (header, *lines)) for column in range(len(header))]
    for line in (header, *lines):
        cells = [
            text.ljust(width) if column < left else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        typer.echo("  ".join(cells).rstrip())
