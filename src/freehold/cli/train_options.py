"""The options that the stages of training share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import typer

Run: TypeAlias = Annotated[
    Path, typer.Argument(metavar="RUN", help="The run's directory: new, or one to go on in.", show_default=False)
]
From: TypeAlias = Annotated[
    Path, typer.Option("--from", metavar="DIR", help="The model to start from: a run, or a checkpoint.")
]
FromOrNothing: TypeAlias = Annotated[
    Path | None, typer.Option("--from", metavar="DIR", help="A run or checkpoint to train further; else from nothing.")
]
Config: TypeAlias = Annotated[
    Path | None, typer.Option(metavar="FILE", help="config.json of a model from nothing. Default: freehold-tiny's.")
]
TokenizerFrom: TypeAlias = Annotated[
    Path | None,
    typer.Option("--tokenizer", metavar="DIR", help="Its tokenizer, for a model from nothing. Default: a new one."),
]
Text: TypeAlias = Annotated[
    list[Path] | None, typer.Option(metavar="FILE", help="Text to train on (repeatable), in place of generated data.")
]
Chats: TypeAlias = Annotated[
    list[Path] | None,
    typer.Option(metavar="FILE", help="JSONL chats to train on (repeatable), in place of generated data."),
]
Tokens: TypeAlias = Annotated[
    str | None, typer.Option(help="How many to train on: 500k, 10M. Default: the recipe's of freehold-tiny.")
]
OptimizerKind: TypeAlias = Annotated[
    Literal["muon", "adamw"] | None, typer.Option("--optimizer", help="muon for hidden matrices, or adamw for all.")
]
Lr: TypeAlias = Annotated[float | None, typer.Option(help="The peak learning rate.")]
ScheduleKind: TypeAlias = Annotated[
    Literal["wsd", "cosine", "constant"] | None, typer.Option("--schedule", help="Of the learning rate.")
]
BatchTokens: TypeAlias = Annotated[int | None, typer.Option(help="Tokens of one pass.")]
Accumulate: TypeAlias = Annotated[int | None, typer.Option(help="Passes a step of the optimiser.")]
Longest: TypeAlias = Annotated[int | None, typer.Option(help="Tokens of the longest row; longer texts are cut.")]
MtpLoss: TypeAlias = Annotated[
    Literal["cross-entropy", "total-variation"] | None, typer.Option(help="What the MTP layer is trained for.")
]
Bf16: TypeAlias = Annotated[bool | None, typer.Option("--bf16/--fp32", help="Matrix products in bf16, or all in fp32.")]
Seed: TypeAlias = Annotated[int, typer.Option(help="The same seed, machine and threads give the same model.")]
Threads: TypeAlias = Annotated[int | None, typer.Option(help="Compute threads. Default: what the machine has.")]
