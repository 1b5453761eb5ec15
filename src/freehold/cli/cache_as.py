"""The options of commands that say how an engine's caches are stored."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class Stored(StrEnum):
    AUTO = "auto"
    FP8 = "fp8"


IndexCacheOption = Annotated[
    Stored, typer.Option("--index-cache", help="How the indexer's keys are stored: as computed, or in 8 bits.")
]
LatentCacheOption = Annotated[
    Stored, typer.Option("--latent-cache", help="How latents are stored: as computed, or in 8 bits.")
]
