"""`freehold tiny`: make a small checkpoint with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def tiny(
    directory: Annotated[
        Path, typer.Argument(help="Where to write it; empty, or made by this command.", show_default=False)
    ],
    size: Annotated[str, typer.Option(help="nano (1.3M weights), small (130M) or medium (1.7G).")] = "small",
    seed: Annotated[int, typer.Option(help="The same seed gives the same weights, everywhere.")] = 0,
    fp8: Annotated[bool, typer.Option("--fp8", help="Store matrices as FP8 with block scales (needs torch).")] = False,
    force: Annotated[bool, typer.Option("--force", help="Write into a directory that has other files.")] = False,
) -> None:
    """Make a small checkpoint with random weights."""
    from rich.console import Console

    from freehold.cli.progress import byte_progress
    from freehold.model.tiny import made_before, make_tiny

    console = Console(highlight=False, soft_wrap=True)
    if made_before(directory, size, seed, fp8) and not force:
        console.print(f"{directory}: already holds {size} with seed {seed}; nothing to do (--force makes it again)")
        return
    with byte_progress(f"writing {size}") as progress:
        written = make_tiny(directory, size, seed, fp8=fp8, force=force, progress=progress)
    shards = f"{written.shards} shard{'s' if written.shards > 1 else ''}"
    console.print(f"{directory}: {written.tensors:,} tensors, {written.data_bytes:,} bytes in {shards}")
    console.print("Its weights are random, so its text is noise; everything else is real.")
    console.print(f"Next: freehold inspect {directory}   or: freehold serve {directory}")
