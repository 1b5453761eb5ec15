"""`freehold gateway`: one address in front of every engine and API, from one settings file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

SUBCOMMANDS = {
    "run": ("freehold.cli.gateway", "Serve the gateway of a settings file; `freehold gateway CONFIG` is short for it."),
    "check": ("freehold.cli.gateway", "Check a settings file, and show what it means."),
    "key": ("freehold.cli.gateway_key", "Keys of the gateway: make, list, revoke."),
    "key new": ("freehold.cli.gateway_key", "Make a key and show it, once."),
    "key list": ("freehold.cli.gateway_key", "All keys made by command, and what they may do."),
    "key revoke": ("freehold.cli.gateway_key", "Revoke a key: within a second it opens nothing."),
    "audit": ("freehold.cli.gateway_audit", "The log of changes to settings, keys and experiments."),
    "audit verify": ("freehold.cli.gateway_audit", "Check that nobody changed the log."),
    "audit show": ("freehold.cli.gateway_audit", "Show the last entries of the log."),
}
DEFAULT = "run"

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="The settings, a TOML file.", show_default=False)]


def gateway() -> None:
    """One address in front of every engine and API."""


def run(config: Config) -> None:
    """Serve the gateway of a settings file; `freehold gateway CONFIG` is short for it."""
    import logging

    from freehold.gateway.server import serve

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    serve(config, notice=lambda line: print(line, flush=True))


def check(config: Config) -> None:
    """Check a settings file, and show what it means."""
    from freehold.gateway.check import report
    from freehold.gateway.config import read

    for line in report(read(config)):
        typer.echo(line)
