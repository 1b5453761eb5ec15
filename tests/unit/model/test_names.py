"""Published tensor names and shapes: the counts of the real checkpoints, and each shape that is easy to get wrong."""

from __future__ import annotations

from collections import Counter

import pytest

from freehold.model.config import GlmConfig
from freehold.model.inspect import published_config, published_json
from freehold.model.names import PARTS, TensorSpec, tensor_specs
from freehold.model.sizes import SIZES, size_config


def specs_of(name: str) -> dict[str, TensorSpec]:
    specs = list(tensor_specs(published_config(name)))
    by_name = {spec.name: spec for spec in specs}
    assert len(by_name) == len(specs)
    return by_name


@pytest.fixture(scope="module")
def glm52() -> dict[str, TensorSpec]:
    return specs_of("glm-5.2")


def weights(specs: dict[str, TensorSpec]) -> int:
    return sum(spec.size for spec in specs.values() if spec.dtype == "model")


def test_glm_52_has_the_published_tensors(glm52: dict[str, TensorSpec]) -> None:
    assert len(glm52) == 59_585
    assert weights(glm52) == 753_329_921_024
    biases = [spec for spec in glm52.values() if spec.dtype == "float32"]
    assert sum(spec.size for spec in biases) == 19_456
    assert {spec.name.rsplit(".", 1)[1] for spec in biases} == {"e_score_correction_bias"}


def test_glm_51_has_an_indexer_in_every_layer() -> None:
    specs = specs_of("glm-5.1")
    assert len(specs) == 59_870
    assert weights(specs) + 19_456 == 753_864_139_008
    assert sum(name.endswith("indexer.wk.weight") for name in specs) == 79


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.embed_tokens.weight", (154880, 6144)),
        ("lm_head.weight", (154880, 6144)),
        ("model.norm.weight", (6144,)),
        ("model.layers.0.input_layernorm.weight", (6144,)),
        ("model.layers.78.post_attention_layernorm.weight", (6144,)),
        ("model.layers.5.self_attn.q_a_proj.weight", (2048, 6144)),
        ("model.layers.5.self_attn.q_a_layernorm.weight", (2048,)),
        ("model.layers.5.self_attn.q_b_proj.weight", (16384, 2048)),
        ("model.layers.5.self_attn.kv_a_proj_with_mqa.weight", (576, 6144)),
        ("model.layers.5.self_attn.kv_a_layernorm.weight", (512,)),
        ("model.layers.5.self_attn.kv_b_proj.weight", (28672, 512)),
        ("model.layers.5.self_attn.o_proj.weight", (6144, 16384)),
        ("model.layers.6.self_attn.indexer.wq_b.weight", (4096, 2048)),
        ("model.layers.6.self_attn.indexer.wk.weight", (128, 6144)),
        ("model.layers.6.self_attn.indexer.weights_proj.weight", (32, 6144)),
        ("model.layers.78.self_attn.indexer.k_norm.weight", (128,)),
        ("model.layers.78.self_attn.indexer.k_norm.bias", (128,)),
        ("model.layers.2.mlp.gate_proj.weight", (12288, 6144)),
        ("model.layers.2.mlp.down_proj.weight", (6144, 12288)),
        ("model.layers.3.mlp.gate.weight", (256, 6144)),
        ("model.layers.3.mlp.gate.e_score_correction_bias", (256,)),
        ("model.layers.78.mlp.experts.255.up_proj.weight", (2048, 6144)),
        ("model.layers.77.mlp.experts.0.down_proj.weight", (6144, 2048)),
        ("model.layers.3.mlp.shared_experts.gate_proj.weight", (2048, 6144)),
        ("model.layers.78.eh_proj.weight", (6144, 12288)),
        ("model.layers.78.enorm.weight", (6144,)),
        ("model.layers.78.hnorm.weight", (6144,)),
        ("model.layers.78.shared_head.norm.weight", (6144,)),
    ],
)
def test_published_shapes(glm52: dict[str, TensorSpec], name: str, shape: tuple[int, ...]) -> None:
    assert glm52[name].shape == shape


def test_layers_have_the_published_number_of_tensors(glm52: dict[str, TensorSpec]) -> None:
    per_layer = Counter(spec.layer for spec in glm52.values())
    full = (6, 10, 14, 18, 22, 26, 30, 34, 38, 42, 46, 50, 54, 58, 62, 66, 70, 74)
    assert per_layer == {
        None: 3,
        **dict.fromkeys((0, 1, 2), 17),
        **{layer: 787 if layer in full else 782 for layer in range(3, 78)},
        78: 791,
    }


def test_parts_and_layers_follow_from_the_name(glm52: dict[str, TensorSpec]) -> None:
    assert {spec.part for spec in glm52.values()} == set(PARTS)
    for spec in glm52.values():
        assert (spec.layer is None) == (not spec.name.startswith("model.layers."))
        if spec.layer is not None:
            assert spec.name.startswith(f"model.layers.{spec.layer}.")
    only_mtp = {spec.name for spec in glm52.values() if spec.part == "mtp"}
    suffixes = ("enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight")
    assert only_mtp == {f"model.layers.78.{suffix}" for suffix in suffixes}


def test_attention_bias_adds_three_biases_a_layer() -> None:
    raw = published_json("glm-5.2")
    without = {spec.name: spec.shape for spec in tensor_specs(GlmConfig.from_dict(raw))}
    with_bias = {spec.name: spec.shape for spec in tensor_specs(GlmConfig.from_dict(raw | {"attention_bias": True}))}
    added = {name: shape for name, shape in with_bias.items() if name not in without}
    assert len(added) == 79 * 3
    assert {name.removeprefix("model.layers.7."): shape for name, shape in added.items() if ".7." in name} == {
        "self_attn.q_a_proj.bias": (2048,),
        "self_attn.kv_a_proj_with_mqa.bias": (576,),
        "self_attn.o_proj.bias": (6144,),
    }


def test_without_mtp_the_layer_is_gone() -> None:
    raw = published_json("glm-5.2") | {"num_nextn_predict_layers": 0}
    specs = list(tensor_specs(GlmConfig.from_dict(raw)))
    assert len(specs) == 59_585 - 791
    assert max(spec.layer for spec in specs if spec.layer is not None) == 77


def test_two_shared_experts_are_one_wider_mlp() -> None:
    raw = size_config("nano") | {"n_shared_experts": 2}
    specs = {spec.name: spec.shape for spec in tensor_specs(GlmConfig.from_dict(raw))}
    assert specs["model.layers.3.mlp.shared_experts.gate_proj.weight"] == (64, 64)


@pytest.mark.parametrize("size", SIZES)
def test_names_and_shapes_are_those_of_transformers(size: str) -> None:
    """transformers fuses routed experts and has no MTP layer; everything else must be there under the same name."""
    import torch
    import transformers

    config = GlmConfig.from_dict(size_config(size))
    ours = {spec.name: spec.shape for spec in tensor_specs(config) if spec.layer != config.num_hidden_layers}
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.GlmMoeDsaConfig(**size_config(size)))
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    experts, hidden, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
    for name in [name for name in theirs if ".mlp.experts." in name]:
        prefix, fused = name.rsplit(".", 1)
        shape = theirs.pop(name)
        assert shape == ((experts, 2 * width, hidden) if fused == "gate_up_proj" else (experts, hidden, width))
        for expert in range(experts):
            for part in ("gate_proj", "up_proj") if fused == "gate_up_proj" else ("down_proj",):
                theirs[f"{prefix}.{expert}.{part}.weight"] = (hidden, width) if part == "down_proj" else (width, hidden)
    assert ours == theirs
