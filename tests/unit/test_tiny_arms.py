"""The models that freehold-tiny is compared with: equal where they should be, different where they should be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from _tiny_arms import ARMS, active_parameters, arm_config
from _tiny_variants import with_config, with_random_indexers
from safetensors.torch import load_file

from freehold.model.config import GlmConfig
from freehold.model.sizes import size_config
from freehold.model.tiny import make_tiny


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_is_a_config(arm: str) -> None:
    GlmConfig.from_dict(arm_config(arm, size_config("nano")))


def test_an_unknown_arm_is_refused() -> None:
    with pytest.raises(ValueError, match="no arm 'sparse'"):
        arm_config("sparse", size_config("nano"))


@pytest.mark.parametrize("size", ["nano", "small"])
def test_the_dense_arm_uses_as_many_weights_a_token(size: str) -> None:
    base = size_config(size)
    dense = arm_config("dense", base)
    config = GlmConfig.from_dict(dense)
    assert set(config.mlp_layer_types) == {"dense"}
    assert config.index_topk == config.max_position_embeddings
    wanted, found = active_parameters(base), active_parameters(dense, attends_to_all=True)
    assert abs(found - wanted) / wanted < 0.005
    assert dense["intermediate_size"] != base["intermediate_size"]


def test_active_parameters_leave_out_what_a_token_does_not_use() -> None:
    base = size_config("nano")
    wider = {**base, "n_routed_experts": 32}
    router = 5 * 16 * (base["hidden_size"] + 1)  # of five sparse layers: a row and a bias for each further expert
    assert active_parameters(wider) - active_parameters(base) == router
    config = GlmConfig.from_dict(base)
    other_head = {**base, "vocab_size": base["vocab_size"] + 1}
    assert active_parameters(other_head) - active_parameters(base) == config.hidden_size


def test_an_indexer_on_every_layer() -> None:
    base = size_config("nano")
    every = GlmConfig.from_dict(arm_config("every-layer", base))
    assert set(every.indexer_types) == {"full"}
    assert active_parameters(arm_config("every-layer", base)) > active_parameters(base)


def test_variants_change_one_thing(tmp_path: Path) -> None:
    made = make_tiny(tmp_path / "model", "nano").directory
    other = with_config(made, tmp_path / "topk", index_topk=8)
    assert GlmConfig.from_file(other).index_topk == 8
    assert json.loads((other / "config.json").read_text()) == {
        **json.loads((made / "config.json").read_text()),
        "index_topk": 8,
    }
    drawn = with_random_indexers(made, tmp_path / "random")
    before, after = load_file(made / "model.safetensors"), load_file(drawn / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    layers = GlmConfig.from_file(made).full_layers
    matrices = ("wq_b", "wk", "weights_proj")
    expected = {f"model.layers.{i}.self_attn.indexer.{name}.weight" for i in layers for name in matrices}
    assert expected <= changed
    assert all(".indexer." in name and not name.startswith("model.layers.8.") for name in changed)
