"""`freehold train pretrain`, `indexer` and `sft`: one stage of training each."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from freehold.cli import train_options as options
from freehold.errors import ConfigError, InvalidRequest

if TYPE_CHECKING:
    from freehold.train.recipe import Stage, StageName
    from freehold.train.stages import Source, Start


@dataclass(frozen=True)
class Asked:
    """What was said about the training itself; None where nothing was."""

    tokens: str | None
    optimizer: Literal["muon", "adamw"] | None
    lr: float | None
    schedule: Literal["wsd", "cosine", "constant"] | None
    batch_tokens: int | None
    accumulate: int | None
    longest: int | None
    bf16: bool | None
    mtp_loss: Literal["cross-entropy", "total-variation"] | None
    seed: int
    threads: int | None


def pretrain(
    run: options.Run,
    start: options.FromOrNothing = None,
    config: options.Config = None,
    tokenizer: options.TokenizerFrom = None,
    text: options.Text = None,
    tokens: options.Tokens = None,
    optimizer: options.OptimizerKind = None,
    lr: options.Lr = None,
    schedule: options.ScheduleKind = None,
    batch_tokens: options.BatchTokens = None,
    accumulate: options.Accumulate = None,
    longest: options.Longest = None,
    bf16: options.Bf16 = None,
    mtp_loss: options.MtpLoss = None,
    seed: options.Seed = 0,
    threads: options.Threads = None,
) -> None:
    """Train on text, with dense attention: from nothing, or further."""
    asked = Asked(
        tokens, optimizer, lr, schedule, batch_tokens, accumulate, longest, bf16, mtp_loss, seed, threads
    )  # fmt: skip
    if start is not None and (config is not None or tokenizer is not None):
        raise InvalidRequest("--config and --tokenizer are for a model from nothing; --from has its own")
    set_threads(threads)
    from freehold.train.stages import Source

    source = Source(text=tuple(text or ()))
    begin = _from(start) if start is not None else _new(config, tokenizer, source, seed)
    _train("pretrain", run, begin, source, asked)


def indexer(
    run: options.Run,
    start: options.From,
    text: options.Text = None,
    tokens: options.Tokens = None,
    optimizer: options.OptimizerKind = None,
    lr: options.Lr = None,
    schedule: options.ScheduleKind = None,
    batch_tokens: options.BatchTokens = None,
    accumulate: options.Accumulate = None,
    longest: options.Longest = None,
    bf16: options.Bf16 = None,
    seed: options.Seed = 0,
    threads: options.Threads = None,
) -> None:
    """Teach the indexers of a trained model what its attention looks at."""
    asked = Asked(tokens, optimizer, lr, schedule, batch_tokens, accumulate, longest, bf16, None, seed, threads)
    set_threads(threads)
    from freehold.train.stages import Source

    _train("indexer", run, _from(start), Source(text=tuple(text or ())), asked)


def sft(
    run: options.Run,
    start: options.From,
    chats: options.Chats = None,
    tokens: options.Tokens = None,
    optimizer: options.OptimizerKind = None,
    lr: options.Lr = None,
    schedule: options.ScheduleKind = None,
    batch_tokens: options.BatchTokens = None,
    accumulate: options.Accumulate = None,
    longest: options.Longest = None,
    bf16: options.Bf16 = None,
    mtp_loss: options.MtpLoss = None,
    seed: options.Seed = 0,
    threads: options.Threads = None,
) -> None:
    """Train on chats, with sparse attention, mostly on what the assistant says."""
    asked = Asked(
        tokens, optimizer, lr, schedule, batch_tokens, accumulate, longest, bf16, mtp_loss, seed, threads
    )  # fmt: skip
    set_threads(threads)
    from freehold.train.stages import Source

    _train("sft", run, _from(start), Source(chats=tuple(chats or ())), asked)


def count(text: str) -> int:
    """500000, "500k" or "10M" as a number. Raises InvalidRequest for anything else, and for 0."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kM]?)", text)
    value = round(float(match[1]) * {"": 1, "k": 1_000, "M": 1_000_000}[match[2]]) if match else 0
    if value < 1:
        raise InvalidRequest(f"--tokens {text}: say a number above 0, as 500000, 500k or 10M", param="tokens")
    return value


def changed(name: StageName, asked: Asked) -> Stage:
    """The recipe's stage with what was asked for."""
    from freehold.train.recipe import stage

    made = stage(name, seed=asked.seed)
    changes: dict[str, Any] = {}
    if asked.tokens is not None:
        changes["tokens"] = count(asked.tokens)
    if asked.longest is not None:
        shorter = tuple(length for length in made.lengths if length < asked.longest)
        changes["lengths"] = (*shorter, asked.longest)
        changes["batch_tokens"] = max(made.batch_tokens, asked.longest)
    for key in ("batch_tokens", "accumulate"):
        if (value := getattr(asked, key)) is not None:
            changes[key] = value
    if asked.optimizer is not None:
        changes["optim"] = replace(made.optim, kind=asked.optimizer)
    if asked.lr is not None:
        changes["optim"] = replace(changes.get("optim", made.optim), lr=asked.lr, matrix_lr=None)
    if asked.schedule is not None:
        changes["schedule"] = replace(made.schedule, kind=asked.schedule)
    if asked.bf16 is not None:
        changes["objective"] = replace(made.objective, half=asked.bf16)
    if asked.mtp_loss is not None:
        changes["objective"] = replace(changes.get("objective", made.objective), mtp_loss=asked.mtp_loss)
    return replace(made, **changes)


def set_threads(threads: int | None) -> None:
    if threads is None:
        return
    if threads < 1:
        raise InvalidRequest(f"--threads {threads}: must be at least 1", param="threads")
    import torch

    torch.set_num_threads(threads)


def _from(directory: Path) -> Start:
    from freehold.train.stages import from_directory

    return from_directory(directory)


def _new(config: Path | None, tokenizer: Path | None, source: Source, seed: int) -> Start:
    from freehold.model.config import GlmConfig
    from freehold.model.tokenizer import Tokenizer
    from freehold.train.shape import tiny_config
    from freehold.train.stages import from_nothing, new_tokenizer

    raw = tiny_config()
    if config is not None:
        try:
            raw = json.loads(config.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{config}: cannot be read: {error}") from None
        if not isinstance(raw, dict):
            raise ConfigError(f"{config}: expected a JSON object")
        GlmConfig.from_dict(raw)
    if tokenizer is not None:
        return from_nothing(raw, Tokenizer.from_dir(tokenizer), seed)
    typer.echo("making a tokenizer", err=True)
    return from_nothing(raw, new_tokenizer(source, raw["vocab_size"]), seed)


def _train(name: StageName, run: Path, start: Start, source: Source, asked: Asked) -> None:
    from freehold.cli.progress import count_progress
    from freehold.cli.training_progress import training_progress
    from freehold.train.stages import run_stage

    made = changed(name, asked)
    with count_progress("data", "tokens") as progress:
        corpus, held_out = source.corpora(run / "corpus", made, start.tokenizer, progress)
    with training_progress(name) as report:
        finished = run_stage(made, start, corpus, run, held_out=held_out, report=report)
    _print_finished(run, finished.steps, finished.tokens, finished.seconds)


def _print_finished(run: Path, steps: int, tokens: int, seconds: float) -> None:
    typer.echo(f"{run}: {steps:,} steps, {tokens:,} tokens, {seconds / 60:,.1f} minutes")
    typer.echo(f"Next: freehold chat {run / 'model'}   or: freehold train plot {run}")
