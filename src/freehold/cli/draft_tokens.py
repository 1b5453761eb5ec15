"""The option of commands that may draft with a model's MTP layer."""

from __future__ import annotations

from typing import Annotated

import typer

DraftTokens = Annotated[
    int | None,
    typer.Option(
        help="Most tokens that the MTP layer drafts for a request and step; 0: none.",
        min=0,
        max=15,
        show_default="3, if the checkpoint has such a layer",
    ),
]
