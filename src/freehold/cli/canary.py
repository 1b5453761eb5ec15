"""`freehold canary`: see and steer the experiments of a running gateway, through its admin API."""

from __future__ import annotations

import asyncio
import getpass
import json
import os
from collections.abc import Mapping
from typing import Annotated, Any
from urllib.parse import quote

import typer

SUBCOMMANDS: Mapping[str, tuple[str, str]] = {
    "status": ("freehold.cli.canary", "Where each canary stands: guardrails, bounds, and what could be seen by now."),
    "pause": ("freehold.cli.canary", "Stop the ramp where it is; the guardrails go on."),
    "resume": ("freehold.cli.canary", "Go on after a pause, or after the gateway held it."),
    "force": ("freehold.cli.canary", "Take the next step now, whatever is known; after the last one, promote."),
    "abort": ("freehold.cli.canary", "Roll back now."),
    "replay": ("freehold.cli.canary", "Decide again from the ledger, and say whether it comes out the same."),
}

Name = Annotated[str, typer.Argument(metavar="EXPERIMENT", help="Its name in the settings.", show_default=False)]
Url = Annotated[str, typer.Option("--url", help="The gateway.")]
KeyEnv = Annotated[str, typer.Option("--admin-key-env", help="Environment variable with the admin key.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
WIDTH = 100  # of the table, also where the terminal has less: a line that wraps is better than one that is cut
_URL, _KEY = "http://127.0.0.1:8080", "FREEHOLD_ADMIN_KEY"


def canary() -> None:
    """See and steer the canaries of a running gateway."""


def status(
    name: Annotated[str | None, typer.Argument(metavar="[EXPERIMENT]", help="One of them.", show_default=False)] = None,
    url: Url = _URL,
    admin_key_env: KeyEnv = _KEY,
    as_json: Json = False,
) -> None:
    """Where each canary stands: guardrails, bounds, and what could be seen by now."""
    found = _ask(url, admin_key_env, "GET", f"experiments/{quote(name, safe='')}" if name else "experiments")
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    from rich.console import Console

    from freehold.cli.canary_status import show

    console = Console(highlight=False)
    console.width = max(console.width, WIDTH)
    experiments = [found] if name else found["experiments"]
    if not experiments:
        console.print("The settings have no experiment.")
    for each in experiments:
        show(each, console)


def pause(name: Name, url: Url = _URL, admin_key_env: KeyEnv = _KEY) -> None:
    """Stop the ramp where it is; the guardrails go on."""
    _command("pause", name, url, admin_key_env)


def resume(name: Name, url: Url = _URL, admin_key_env: KeyEnv = _KEY) -> None:
    """Go on after a pause, or after the gateway held it."""
    _command("resume", name, url, admin_key_env)


def force(name: Name, url: Url = _URL, admin_key_env: KeyEnv = _KEY) -> None:
    """Take the next step now, whatever is known; after the last one, promote."""
    _command("force", name, url, admin_key_env)


def abort(name: Name, url: Url = _URL, admin_key_env: KeyEnv = _KEY) -> None:
    """Roll back now."""
    _command("abort", name, url, admin_key_env)


def replay(name: Name, url: Url = _URL, admin_key_env: KeyEnv = _KEY, as_json: Json = False) -> None:
    """Decide again from the ledger, and say whether it comes out the same."""
    found = _ask(url, admin_key_env, "GET", f"experiments/{quote(name, safe='')}/replay")
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    elif found["same"]:
        typer.echo(
            f"{name}: {found['records']} records, {found['decisions']} decisions: the same again ({found['state']})"
        )
    else:
        numbers = ", ".join(map(str, found["differing"]))
        typer.echo(f"{name}: these of {found['records']} records do not follow from the ledger: {numbers}", err=True)
    if not found["same"]:
        raise typer.Exit(1)


def _command(command: str, name: str, url: str, key_env: str) -> None:
    path = f"experiments/{quote(name, safe='')}/{command}?by={quote(_who(), safe='')}"
    record = _ask(url, key_env, "POST", path)
    typer.echo(f"{name}: {record['state']}, the canary gets {record['share']:.0%}")


def _who() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "command line"


def _ask(url: str, key_env: str, method: str, path: str) -> dict[str, Any]:
    """Raises FreeholdError with what the gateway said."""
    from freehold.client import Client

    async def ask() -> dict[str, Any]:
        async with Client(f"{url.rstrip('/')}/admin", api_key=os.environ.get(key_env), timeout=60.0) as client:
            return await (client.get(path) if method == "GET" else client.post(path, {}))

    return asyncio.run(ask())
