"""The option of commands that may quantise a model's weights as they load it."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class Scheme(StrEnum):
    INT8 = "int8"
    INT4 = "int4"
    FP8 = "fp8"


QuantizeAs = Annotated[
    Scheme | None,
    typer.Option(help="Quantise the weights while they load.", show_default="as the checkpoint stores them"),
]
