"""`freehold gateway`: one address in front of every engine and API, from one settings file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

SUBCOMMANDS = {
    "run": ("freehold.cli.gateway", "Serve the gateway of a settings file; `freehold gateway CONFIG` is short for it."),
    "check": ("freehold.cli.gateway", "Check a settings file, and show what it means."),
}
DEFAULT = "run"

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="The settings, a TOML file.", show_default=False)]


def gateway() -> None:
    """One address in front of every engine and API: keys, limits, a row per call, a guarded canary."""


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
