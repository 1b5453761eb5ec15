"""Recipes and stages: what is refused, and how long a stage is."""

from __future__ import annotations

import pytest

from freehold.errors import InvalidRequest
from freehold.model.config import GlmConfig
from freehold.train.objective import Objective
from freehold.train.recipe import Stage, stage, tiny_recipe


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": ()}, "lengths"),
        ({"lengths": (512, 256)}, "lengths"),
        ({"lengths": (256, 256)}, "lengths"),
        ({"tokens": 0}, "tokens"),
        ({"accumulate": 0}, "accumulate"),
        ({"batch_tokens": 1000, "lengths": (1280,)}, "longest row"),
        ({"prompt_weight": 1.5}, "prompt_weight"),
    ],
)
def test_a_stage_that_cannot_be_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        Stage("pretrain", **{"tokens": 1000, "objective": Objective(), **changes})  # type: ignore[arg-type]


def test_a_stage_is_as_long_as_its_tokens_in_passes_that_are_not_full() -> None:
    made = Stage("pretrain", 100_000, Objective(), batch_tokens=2000, accumulate=2, lengths=(1000,))
    assert made.loop(corpus_tokens=100_000, per_epoch=70).steps == 35  # once over the corpus
    assert made.loop(corpus_tokens=25_000, per_epoch=18).steps == 36  # four times
    assert made.corpus().tokens == 100_000
    assert made.corpus().longest == 1000


def test_the_recipe_of_freehold_tiny_is_a_model_of_at_most_12_million_bytes() -> None:
    recipe = tiny_recipe()
    config = GlmConfig.from_dict(recipe.config)
    assert config.has_mtp
    assert {"full", "shared"} == set(config.indexer_types)
    assert recipe.stages[0].name == "pretrain"
    assert recipe.stages[-1].objective.indexer == "sparse"  # as it is run
    assert recipe.stages[-1].lengths[-1] > 4 * config.index_topk


def test_a_scaled_recipe_has_less_of_everything() -> None:
    recipe, trial = tiny_recipe(), tiny_recipe().scaled(0.01)
    for whole, part in zip(recipe.stages, trial.stages, strict=True):
        assert part.tokens == pytest.approx(0.01 * whole.tokens, abs=1)
        assert part.optim == whole.optim


def test_a_stage_is_the_recipes_with_changes() -> None:
    assert stage("sft", tokens=5).tokens == 5
    assert stage("sft", tokens=5).optim == stage("sft").optim
