"""The whole recipe at a small scale: every stage, going on after an interruption, and the checkpoint it ends with."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from freehold.errors import InvalidRequest
from freehold.model.checkpoint_files import Progress
from freehold.train.loop import StepReport
from freehold.train.objective import Objective
from freehold.train.recipe import Recipe
from freehold.train.stages import from_directory
from freehold.train.tiny import make
from tests.unit.train.small import MIXTURE, small_config, small_stage, small_tokenizer

RECIPE = Recipe(
    "small",
    small_config(),
    (
        small_stage("pretrain", tokens=1500, mixture=MIXTURE),
        small_stage("indexer", Objective(mtp_weight=0.0, indexer="warm-up"), tokens=1000, mixture=MIXTURE),
        small_stage("sft", Objective(indexer="sparse"), tokens=1500, mixture=MIXTURE, prompt_weight=0.1),
    ),
)


RUNS = ("2-indexer", "3-sft")


class Quiet:
    """Shows nothing; interrupts the stage of a name after its first step, if given."""

    def __init__(self, interrupt: str = "") -> None:
        self.said: list[str] = []
        self.trained: list[str] = []
        self._interrupt = interrupt

    def say(self, text: str) -> None:
        self.said.append(text)

    @contextmanager
    def counting(self, name: str) -> Iterator[Progress]:
        yield lambda done, total: None

    @contextmanager
    def training(self, name: str) -> Iterator[Callable[[StepReport], None]]:
        def report(made: StepReport) -> None:
            self.trained.append(name)
            if name == self._interrupt:
                signal.raise_signal(signal.SIGINT)

        yield report


def with_tokenizer(out: Path) -> Path:
    """A directory whose tokenizer is made already: that of freehold-tiny takes half a minute."""
    (out / "tokenizer").mkdir(parents=True)
    small_tokenizer().save(out / "tokenizer")
    return out


def test_a_recipe_that_was_interrupted_ends_with_the_same_checkpoint(tmp_path: Path) -> None:
    whole, parts = with_tokenizer(tmp_path / "whole"), with_tokenizer(tmp_path / "parts")
    made = make(RECIPE, whole, Quiet())
    assert list(made.stages) == ["pretrain", "indexer", "sft"]
    assert made.directory == whole / "small"
    assert sorted(path.name for path in (made.directory / "training").iterdir()) == [
        "1-pretrain.csv",
        "2-indexer.csv",
        "3-sft.csv",
        "plot.png",
        "recipe.json",
    ]

    with pytest.raises(KeyboardInterrupt):
        make(RECIPE, parts, Quiet(interrupt="indexer"))
    assert not (parts / "small").exists()
    later = Quiet()
    make(RECIPE, parts, later)
    assert "pretrain" not in later.trained
    assert later.said == []
    assert manifest(parts) == manifest(whole)

    again = Quiet()
    make(RECIPE, parts, again)
    assert again.trained == []
    assert manifest(parts) == manifest(whole)
    with pytest.raises(InvalidRequest, match="seed"):
        make(replace(RECIPE, seed=1), parts, Quiet())


def manifest(out: Path) -> str:
    return (out / "small" / "SHA256SUMS").read_text()


def test_what_is_published_is_the_mean_of_the_last_stages(tmp_path: Path) -> None:
    recipe = replace(RECIPE, averaged=2)
    made = make(recipe, tmp_path / "out", Quiet())
    found = load_file(made.directory / "model.safetensors")
    first, second = (from_directory(tmp_path / "out" / run).model.checkpoint_tensors() for run in RUNS)
    assert any(not torch.equal(first[name], second[name]) for name in found)
    for name, weight in found.items():
        mean = (first[name].float() + second[name].float()) / 2
        assert torch.equal(weight, mean[: len(weight)].to(weight.dtype)), name


def test_a_mean_of_more_stages_than_there_are_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="averaged = 4 must be 1 to 3"):
        replace(RECIPE, averaged=4)
