"""`freehold train tiny`: the whole recipe of freehold-tiny."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from freehold.cli import train_options as options
from freehold.cli.progress import count_progress
from freehold.cli.training_progress import training_progress

if TYPE_CHECKING:
    from freehold.train.loop import StepReport


class _Shown:
    """On stderr."""

    def say(self, text: str) -> None:
        typer.echo(text, err=True)

    def counting(self, name: str) -> AbstractContextManager[Callable[[int, int], None]]:
        return count_progress(name, "tokens")

    def training(self, name: str) -> AbstractContextManager[Callable[[StepReport], None]]:
        return training_progress(name)


def tiny(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Where: new, or one to go on in.", show_default=False)],
    share: Annotated[
        float, typer.Option(min=0.0001, max=1.0, help="Of the recipe's tokens: below 1 for a trial.")
    ] = 1.0,
    threads: options.Threads = None,
) -> None:
    """Make freehold-tiny again, from nothing to a checkpoint: the whole recipe."""
    from freehold.cli.train_stage import set_threads
    from freehold.train.recipe import tiny_recipe
    from freehold.train.tiny import make

    set_threads(threads)
    recipe = tiny_recipe()
    made = make(recipe if share == 1 else recipe.scaled(share), out, _Shown())
    for name, finished in made.stages.items():
        typer.echo(
            f"{name}: {finished.steps:,} steps, {finished.tokens:,} tokens, {finished.seconds / 60:,.1f} minutes"
        )
    typer.echo(f"{made.directory}: done.  Next: freehold chat {made.directory}")
