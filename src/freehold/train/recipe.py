"""Recipes: what is trained on what, for how long and how, stage by stage.

A stage is one run of the loop. It begins with the weights that the stage before it ended with, and with fresh optimiser
state and schedule.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from freehold.errors import InvalidRequest
from freehold.train.corpus import CorpusSettings
from freehold.train.data.mixture import FIRST_MIXTURE, LAST_MIXTURE, MIXTURE
from freehold.train.loop import LoopSettings
from freehold.train.objective import Objective
from freehold.train.optim import Optim
from freehold.train.schedule import Schedule
from freehold.train.shape import tiny_config

StageName: TypeAlias = Literal["pretrain", "indexer", "sft"]


@dataclass(frozen=True, slots=True)
class Stage:
    """tokens: of training, about. lengths: of rows, ascending. batch_tokens: of one pass; accumulate: passes a step.
    prompt_weight: what a token that the model is given counts in the loss, where one it says counts 1. mixture,
    data_seed: of the generated corpus, if it is trained on one. seed: of the order of documents."""

    name: str
    tokens: int
    objective: Objective
    optim: Optim = field(default_factory=Optim)
    schedule: Schedule = field(default_factory=Schedule)
    lengths: tuple[int, ...] = (320, 640, 1280)
    batch_tokens: int = 7680
    accumulate: int = 1
    prompt_weight: float = 1.0
    mixture: Mapping[str, float] = field(default_factory=lambda: dict(MIXTURE))
    data_seed: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 2 or list(self.lengths) != sorted(set(self.lengths)):
            raise InvalidRequest(f"lengths = {self.lengths} must be ascending, from 2", param="lengths")
        for name in ("tokens", "batch_tokens", "accumulate"):
            if getattr(self, name) < 1:
                raise InvalidRequest(f"{name} = {getattr(self, name)} must be at least 1", param=name)
        if self.batch_tokens < self.lengths[-1]:
            raise InvalidRequest(
                f"batch_tokens = {self.batch_tokens} is less than the longest row, {self.lengths[-1]}",
                param="batch_tokens",
            )
        if not 0 <= self.prompt_weight <= 1:
            raise InvalidRequest(f"prompt_weight = {self.prompt_weight} must be 0 to 1", param="prompt_weight")

    def loop(self, corpus_tokens: int, per_epoch: int) -> LoopSettings:
        """per_epoch: passes in which all tokens of the corpus are seen once."""
        steps = math.ceil(self.tokens / corpus_tokens * per_epoch / self.accumulate)
        return LoopSettings(steps, self.optim, self.schedule, self.accumulate, self.seed)

    def corpus(self) -> CorpusSettings:
        """The generated corpus: each token of it is seen once."""
        return CorpusSettings(self.tokens, self.mixture, "train", self.data_seed, self.lengths[-1])


@dataclass(frozen=True, slots=True)
class Recipe:
    """config: config.json of the model. seed: of its first weights. averaged: what is published is the mean of the
    weights that so many of the last stages ended with (model soups, Wortsman et al. 2022)."""

    name: str
    config: Mapping[str, Any]
    stages: tuple[Stage, ...]
    seed: int = 0
    averaged: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.averaged <= len(self.stages):
            raise InvalidRequest(f"averaged = {self.averaged} must be 1 to {len(self.stages)}, the number of stages")

    def scaled(self, share: float) -> Recipe:
        """The same with this share of the tokens, for trials."""
        stages = (replace(stage, tokens=max(1, round(stage.tokens * share))) for stage in self.stages)
        return replace(self, stages=tuple(stages))


def stage(name: StageName, **changes: Any) -> Stage:
    """The stage of this name as freehold-tiny has it, with changes."""
    return replace(_STAGES[name], **changes)


def tiny_recipe() -> Recipe:
    """freehold-tiny: language on everything, then indexers alone on dense attention, then all of it on sparse
    attention, with the loss mostly on what the assistant says, and once more on what it still gets wrong.

    The last stage loses some of what it does not practise (finding facts in a context); the mean of its weights and
    those it began with has both.
    """
    polish = replace(
        _STAGES["sft"],
        name="polish",
        tokens=2_000_000,
        optim=Optim(lr=2e-3, matrix_lr=4e-3),
        schedule=Schedule(decay=1.0),
        mixture=LAST_MIXTURE,
        data_seed=3,
    )
    return Recipe("freehold-tiny", tiny_config(), (*_STAGES.values(), polish), averaged=2)


_SHORT = (96, 128, 160, 192, 256, 320, 384)
_LONG = (*_SHORT, 512, 640, 768, 1024, 1280)
_STAGES: Mapping[StageName, Stage] = {
    "pretrain": Stage(
        "pretrain",
        7_000_000,
        Objective(mtp_share=0.25, half=True),
        Optim(lr=4e-3, matrix_lr=8e-3),
        Schedule(decay=0.0),
        lengths=_SHORT,
        batch_tokens=1280,
        accumulate=2,
        prompt_weight=0.3,
        mixture=FIRST_MIXTURE,
    ),
    "indexer": Stage(
        "indexer",
        300_000,
        Objective(mtp_weight=0.0, indexer="warm-up", half=True),
        Optim(lr=5e-3, decay=0.0),
        lengths=_LONG,
        batch_tokens=2560,
        accumulate=2,
        data_seed=1,
    ),
    "sft": Stage(
        "sft",
        6_000_000,
        Objective(indexer="sparse", mtp_share=0.25, mtp_drafts=3, half=True),
        Optim(lr=4e-3, matrix_lr=8e-3),
        Schedule(decay=0.8),
        lengths=_LONG,
        batch_tokens=1280,
        accumulate=2,
        prompt_weight=0.1,
        data_seed=2,
    ),
}
