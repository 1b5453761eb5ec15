"""`freehold train plot`: draw the log of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Runs, one after another.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="The file. Default: plot.png in the last run.")] = None,
) -> None:
    """Draw the log of a run as a PNG."""
    from freehold.train.plot import plot

    path = runs[-1] / "plot.png" if out is None else out
    plot(runs, path)
    typer.echo(str(path))
