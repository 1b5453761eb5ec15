"""Makes freehold-tiny again: tokenizer, data, every stage of the recipe, the mean of the last ones, and its card.

A directory has all of it; each part that is complete is kept, so that after a kill the same command goes on:

    tokenizer/        the new tokenizer
    corpus/STAGE/     generated data of each stage
    1-pretrain/ ...   the runs, as `loop` and `stages` keep them
    plot.png          the logs of all stages
    recipe.json       what it is made by; another recipe refuses to go on here
    freehold-tiny/    the checkpoint, with the logs, the plot, and a model card without measurements yet
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch

from freehold.model.chat.template import ChatTemplate
from freehold.model.checkpoint_files import Progress, write_text
from freehold.model.tokenizer import Tokenizer
from freehold.train.card import write_card
from freehold.train.log import LOG_NAME
from freehold.train.loop import Finished, StepReport
from freehold.train.plot import plot
from freehold.train.publish import drop_unused_tokens, write
from freehold.train.recipe import Recipe
from freehold.train.run_directory import begin, run_lock
from freehold.train.stages import Source, Start, from_directory, from_nothing, run_stage
from freehold.train.tokenizer import generated_tokenizer


class Shown(Protocol):
    """How a long job is shown: what it does now, and bars."""

    def say(self, text: str) -> None: ...

    def counting(self, name: str) -> AbstractContextManager[Progress]: ...

    def training(self, name: str) -> AbstractContextManager[Callable[[StepReport], None]]: ...


@dataclass(frozen=True, slots=True)
class Made:
    """The checkpoint, and each stage's run."""

    directory: Path
    stages: dict[str, Finished]


def make(recipe: Recipe, out: Path, shown: Shown) -> Made:
    """Follow the recipe, from wherever it stopped. Raises InvalidRequest if `out` has another recipe's; what
    `run_stage` raises."""
    with run_lock(out):
        begin(out, asdict(recipe), "recipe.json")
        tokenizer = _tokenizer(recipe, out / "tokenizer", shown)
        runs: list[Path] = []
        finished: dict[str, Finished] = {}
        start: Start | None = None
        for number, stage in enumerate(recipe.stages, 1):
            run = out / f"{number}-{stage.name}"
            start = from_directory(runs[-1]) if runs else from_nothing(recipe.config, tokenizer, recipe.seed)
            with shown.counting(f"data of {stage.name}") as progress:
                corpus, held_out = Source().corpora(out / "corpus" / stage.name, stage, tokenizer, progress)
            with shown.training(stage.name) as report:
                finished[stage.name] = run_stage(stage, start, corpus, run, held_out=held_out, report=report)
            runs.append(run)
            plot(runs, out / "plot.png")
        _publish(recipe, averaged([from_directory(run) for run in runs[-recipe.averaged :]]), runs, out)
    return Made(out / recipe.name, finished)


def _tokenizer(recipe: Recipe, directory: Path, shown: Shown) -> Tokenizer:
    vocab_size = int(recipe.config["vocab_size"])
    if not (directory / "tokenizer.json").exists():
        shown.say("making the tokenizer")
        partial = directory.with_name(directory.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        generated_tokenizer(ChatTemplate.builtin(), vocab_size).save(partial)
        partial.rename(directory)
    return Tokenizer(Tokenizer.from_dir(directory).backend, vocab_size=vocab_size)


def averaged(starts: Sequence[Start]) -> Start:
    """The last of several stages of one model, with the mean of all of their weights; changes it in place."""
    last = starts[-1].model.state_dict()
    held = [start.model.state_dict() for start in starts]
    for name, weight in last.items():
        weight.copy_(torch.stack([each[name] for each in held]).mean(0, dtype=weight.dtype))
    return starts[-1]


def _publish(recipe: Recipe, start: Start, runs: list[Path], out: Path) -> None:
    """The last run's weights as freehold-tiny, without the rows of tokens that there are not.

    Nothing in a checkpoint depends on when it was written.
    """
    tokenizer, config = drop_unused_tokens(start.model, start.tokenizer, start.config)
    write(start.model, tokenizer, config, out / recipe.name, replace=True)
    training = out / recipe.name / "training"
    training.mkdir()
    shutil.copyfile(out / "plot.png", training / "plot.png")
    shutil.copyfile(out / "recipe.json", training / "recipe.json")
    for run in runs:
        write_text(training / f"{run.name}.csv", (run / LOG_NAME).read_text(encoding="utf-8"))
    write_card(out / recipe.name)
