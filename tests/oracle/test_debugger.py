"""The layer debugger must name the layer and the part where a wrong model first differs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from freehold.model.glm import Glm
from freehold.model.oracle import compare_layers, load_oracle, load_ours, stable_selection
from freehold.model.sizes import size_config
from freehold.model.tiny import write_random_checkpoint
from tests.faults import models as faults

PROMPT = torch.randint(0, 448, (120,), generator=torch.Generator().manual_seed(5)).tolist()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("nano")
    write_random_checkpoint(size_config("nano") | {"dtype": "float32"}, directory, seed=1, dtype="float32")
    return directory


def first_difference(model: Glm, checkpoint: Path, prompt: list[int]) -> str | None:
    with stable_selection():
        points = compare_layers(model, load_oracle(checkpoint), prompt)
    return next((point.point for point in points if point.differs), None)


def test_a_right_model_differs_nowhere(checkpoint: Path) -> None:
    assert first_difference(load_ours(checkpoint), checkpoint, PROMPT) is None


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        (faults.half_split_indexer_rope, "layers.0.selection"),
        (faults.selection_one_row_late, "layers.0.selection"),
        (faults.wrong_softmax_scale, "layers.0.attention"),
        (faults.latent_eps, "layers.0.attention"),
        (faults.bf16_correction_bias, "layers.3.mlp"),
        (faults.scaled_shared_expert, "layers.3.mlp"),
        (faults.last_full_layer_ignored, "layers.3.attention"),
    ],
)
def test_a_wrong_model_is_named(fault: Callable[[Glm], Glm], named: str, checkpoint: Path) -> None:
    with torch.inference_mode():
        wrong = fault(load_ours(checkpoint))
    assert first_difference(wrong, checkpoint, PROMPT) == named


def test_a_wrong_indexer_is_invisible_up_to_topk(checkpoint: Path) -> None:
    """Why prompts must be longer than index_topk."""
    wrong = faults.half_split_indexer_rope(load_ours(checkpoint))
    assert first_difference(wrong, checkpoint, PROMPT[: wrong.config.index_topk]) is None


def test_the_switch_for_the_latent_eps_matters(checkpoint: Path) -> None:
    points = None
    with stable_selection():
        points = compare_layers(
            load_ours(checkpoint, oracle_eps=False), load_oracle(checkpoint), PROMPT, tolerance=1e-6
        )
    assert points[0].point == "layers.0.selection"
    assert any(point.differs for point in points)
