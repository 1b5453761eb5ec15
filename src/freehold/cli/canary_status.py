"""What `freehold canary status` prints of one experiment."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from freehold.gateway.canary.windows import METRICS

_COLOURS = {"promoted": "green", "rolled_back": "red", "hold": "yellow", "inconclusive": "yellow"}
_RECENT = 5


def show(found: Mapping[str, Any], console: Console) -> None:
    """found: as the admin API gives it."""
    now, look = found["now"], found["look"]
    colour = _COLOURS.get(now["state"], "cyan")
    state = now["state"].replace("_", " ") + (" (A/A: both arms are the control)" if now["aa"] else "")
    console.print(
        f"[bold]{escape(found['experiment'])}[/bold]  {escape(found['alias'])}: {escape(found['control'])} → "
        f"{escape(found['canary'])}   [{colour}]{state}[/{colour}], the canary gets {now['share']:.0%}"
    )
    if look is None:
        console.print("  no look yet: the first comes after ten requests of the canary")
        return
    control, canary = look["requests"]
    compared = "" if found["compared"] is None else f", {found['compared']:,} of {found['max_requests']:,} in all steps"
    console.print(f"  this step: {canary:,} requests of the canary and {control:,} of the control{compared}")
    console.print(_table(look, found["shown"]))
    for decision in found["decisions"][-_RECENT:]:
        at = datetime.datetime.fromtimestamp(decision["at"], datetime.UTC)
        words = decision["state"].replace("_", " ")
        console.print(
            f"  {at:%Y-%m-%d %H:%M:%S}  {words} {decision['share']:.0%}: {escape(decision['reason'])}", soft_wrap=True
        )


def _table(look: Mapping[str, Any], shown: list[str]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 2), header_style="dim")
    table.add_column("guardrail")
    for column in ("control", "canary", "effect", "is at least", "is at most", "accepted", "visible now"):
        table.add_column(column, justify="right")
    table.add_column("")
    for each in look["guardrails"]:
        metric = each["metric"]
        if each["worse"] and not each["fine"]:
            says = "[red]worse[/red]"
        elif each["fine"] or metric in shown:
            says = "[green]fine[/green]"
        else:
            says = "open"
        table.add_row(
            metric,
            _figure(metric, each["control"]),
            _figure(metric, each["canary"]),
            *(_effect(metric, each[name]) for name in ("effect", "low", "high", "margin", "detectable")),
            says,
        )
    return table


def _figure(metric: str, value: float) -> str:
    kind, of = METRICS[metric].kind, METRICS[metric].of
    if kind == "rate":
        return f"{value:.2%}"
    if of in ("ttft", "tpot", "duration"):
        return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"
    if of == "cost":
        return f"${value / 1e6:.6f}"
    return f"{value:.3g}" if abs(value) < 10 else f"{value:.0f}"


def _effect(metric: str, value: float | None) -> str:
    """Relative effects in per cent, absolute ones in points of a hundred."""
    if value is None:
        return "?"
    return f"{100 * value:+.1f}%" if METRICS[metric].relative else f"{100 * value:+.2f} pt"
