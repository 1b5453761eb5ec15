"""Which matrix of a model is packed in which kind, and that every published tensor has one place in a packed model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from freehold.model.cache import PagedCache
from freehold.model.config import GlmConfig
from freehold.model.destinations import HeadsTarget, Target, held_weights
from freehold.model.glm import Glm
from freehold.model.inputs import single_sequence
from freehold.model.moe import Experts
from freehold.model.names import tensor_specs
from freehold.model.ops.fused import FusedLayers, fits
from freehold.model.ops.reference import ReferenceOps
from freehold.model.packed import PackedHeads, PackedWeight
from freehold.model.packing import Form, Quantize, forms, pack_model
from freehold.model.sizes import size_config
from freehold.model.storage_fp8 import fp8_quantization
from freehold.model.storage_groups import group_quantization
from freehold.model.tiny import write_random_checkpoint
from freehold.model.weights import load_weights
from tests.native_cases import native, needs_native

MTP = "model.layers.8."
NEVER = r"embed_tokens|norm|correction_bias"
SMALL_AND_STEERING = r"mlp\.gate\.|weights_proj|eh_proj"


def config_of(**changes: Any) -> GlmConfig:
    return GlmConfig.from_dict(size_config("nano") | changes)


def packed_model(config: GlmConfig, quantize: Quantize | None = None) -> Glm:
    model = Glm(config).requires_grad_(False).eval()
    pack_model(model, forms(config, quantize))
    return model


def kind_of(target: object) -> str:
    match target:
        case Target(weight=weight):
            return f"{weight.kind}/{weight.group}" if weight.kind in ("int8", "int4") else weight.kind
        case HeadsTarget(heads=heads):
            assert heads.up_key.kind == heads.up_value.kind
            return f"{heads.up_key.kind} heads"
    return "tensor"


def expected_kind(name: str, columns: int, quantize: Quantize | None) -> str:
    """The policy in the words of a name: of nano, whose experts have 32 inputs to their last matrix."""
    if re.search(NEVER, name):
        return "tensor"
    if name.endswith("kv_b_proj.weight"):
        return {None: "bf16", "fp8": "fp8", "int8": "int8", "int4": "int8"}[quantize] + " heads"
    if quantize is None or re.search(SMALL_AND_STEERING, name):
        return "bf16"
    if quantize == "fp8":
        return "bf16" if name.startswith("lm_head") else "fp8"
    if quantize == "int4" and not (".indexer." in name or name.startswith(("lm_head", MTP))):
        return "int4/32"
    return "int8/64" if columns % 64 == 0 else "bf16"


@pytest.mark.parametrize("quantize", [None, "int8", "int4", "fp8"])
def test_every_matrix_is_held_as_the_scheme_says(quantize: Quantize | None) -> None:
    config = config_of()
    tensors = packed_model(config, quantize).checkpoint_tensors()
    specs = {spec.name: spec for spec in tensor_specs(config)}
    assert tensors.keys() == specs.keys()
    for name, target in tensors.items():
        assert tuple(target.shape) == specs[name].shape, name
        assert kind_of(target) == expected_kind(name, specs[name].shape[-1], quantize), name


@pytest.mark.parametrize("scheme", ["int8", "int4", "fp8"])
def test_a_quantised_checkpoint_is_held_as_it_is_stored(scheme: Quantize) -> None:
    """The same as a bf16 one that is quantised on loading."""
    plain = config_of()
    written = fp8_quantization(plain) if scheme == "fp8" else group_quantization(plain, 8 if scheme == "int8" else 4)
    declared = config_of(quantization_config=written)
    form, same = forms(declared), forms(plain, scheme)
    names = [spec.name for spec in tensor_specs(plain) if len(spec.shape) == 2]
    assert [form(name) for name in names] == [same(name) for name in names]


def test_what_a_checkpoint_keeps_unquantised_stays_bf16() -> None:
    raw = fp8_quantization(config_of())
    module = "model.layers.4.self_attn.o_proj"
    form = forms(
        config_of(quantization_config=raw | {"modules_to_not_convert": [*raw["modules_to_not_convert"], module]})
    )
    assert form(module + ".weight") == Form("bf16")
    assert form("model.layers.5.self_attn.o_proj.weight") == Form("fp8")


def test_other_groups_of_a_checkpoint_are_kept() -> None:
    raw = group_quantization(config_of(), 8)
    raw["config_groups"]["group_0"]["weights"]["group_size"] = 32
    held = packed_model(config_of(quantization_config=raw)).checkpoint_tensors()
    assert kind_of(held["model.layers.4.self_attn.q_a_proj.weight"]) == "int8/32"


# Each leaves one thing that the kernels cannot take, named by a pattern.
ODD: list[tuple[dict[str, int], str]] = [
    ({"q_lora_rank": 68}, r"q_b_proj|wq_b"),
    ({"hidden_size": 76}, r"q_a_proj|kv_a_proj|\.wk\.|weights_proj|gate_proj|up_proj|experts\.\d|lm_head|mlp\.gate\."),
    ({"moe_intermediate_size": 40}, r"mlp\.experts\."),
    ({"moe_intermediate_size": 36}, r"mlp\.experts\.|shared_experts\.down"),
    ({"kv_lora_rank": 60}, r"kv_b_proj"),
    ({"qk_nope_head_dim": 36, "qk_head_dim": 68}, r"kv_b_proj"),
    ({"intermediate_size": 100}, r"layers\.[012]\.mlp\.down"),
]


@pytest.mark.parametrize(("changes", "left"), ODD, ids=lambda value: "-".join(value) if isinstance(value, dict) else "")
def test_what_the_kernels_cannot_take_stays_a_tensor(changes: dict[str, int], left: str) -> None:
    tensors = packed_model(config_of(**changes)).checkpoint_tensors()
    for name, target in tensors.items():
        if not re.search(NEVER, name):
            assert isinstance(target, torch.Tensor) == bool(re.search(left, name)), name


@needs_native
@pytest.mark.parametrize("quantize", [None, "int8", "int4", "fp8"])
@pytest.mark.parametrize(("changes", "left"), ODD, ids=lambda value: "-".join(value) if isinstance(value, dict) else "")
def test_a_model_with_odd_sizes_runs_on_what_is_left(
    changes: dict[str, int], left: str, quantize: Quantize | None, tmp_path: Path
) -> None:
    write_random_checkpoint(size_config("nano") | changes, tmp_path)
    config = GlmConfig.from_file(tmp_path)
    model = packed_model(config, quantize)
    load_weights(model, tmp_path)
    assert not fits(config, model.decoder_layers)
    with pytest.raises(ValueError, match="cannot run as one native call"):
        FusedLayers(native("avx2"), config, model.decoder_layers)
    tokens = torch.randint(0, 448, (14,), generator=torch.Generator().manual_seed(1)).tolist()
    found = []
    for ops in (native("avx2"), ReferenceOps()):
        model.ops, cache = ops, PagedCache(config, 4, 16, model.dtype)
        with torch.inference_mode():
            model(single_sequence(tokens[:-1], block_size=16), cache)
            logits = model.logits(model(single_sequence(tokens[-1:], start=13, block_size=16), cache))
            found.append(logits.double())
    # Both round to bf16 after every operation, 8 layers deep.
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 0.15


def test_experts_of_different_forms_are_bf16() -> None:
    """One stack has one kind; quantising what a checkpoint keeps would lose something."""
    module = "model.layers.4.mlp.experts.7.up_proj"
    raw = group_quantization(config_of(), 8)
    experts = (
        packed_model(config_of(quantization_config=raw | {"ignore": [*raw["ignore"], module]})).layers[4].mlp.experts
    )
    assert isinstance(experts.gate_up_proj, PackedWeight)
    assert experts.gate_up_proj.kind == "bf16"


def test_groups_that_do_not_divide_the_inputs_become_bf16() -> None:
    """Also where a checkpoint's own scheme would: nano's experts have 32 inputs, int8's groups 64."""
    experts = packed_model(config_of(), "int8").layers[4].mlp.experts
    assert isinstance(experts, Experts)
    assert isinstance(experts.gate_up_proj, PackedWeight)
    assert isinstance(experts.down_proj, PackedWeight)
    assert (experts.gate_up_proj.kind, experts.gate_up_proj.shape) == ("int8", (16, 64, 64))
    assert (experts.down_proj.kind, experts.down_proj.shape) == ("bf16", (16, 64, 32))


def test_fp8_heads_without_a_common_group_are_bf16_where_they_have_to() -> None:
    config = config_of(v_head_dim=36)  # 68 rows a head: a block ends within any 8 of them
    heads = packed_model(config, "fp8").checkpoint_tensors()["model.layers.4.self_attn.kv_b_proj.weight"]
    assert isinstance(heads, HeadsTarget)
    assert (heads.heads.up_key.kind, heads.heads.up_value.kind) == ("bf16", "fp8")


@pytest.mark.parametrize("quantize", [None, "int4"])
def test_loading_fills_every_packed_matrix(quantize: Quantize | None, tmp_path: Path) -> None:
    """Against the plain model: each place has its own tensor, none another's."""
    write_random_checkpoint(size_config("nano"), tmp_path, seed=5)
    config = GlmConfig.from_file(tmp_path)
    plain = Glm(config).requires_grad_(False)
    load_weights(plain, tmp_path)
    model = packed_model(config, quantize)
    load_weights(model, tmp_path)
    originals = plain.checkpoint_tensors()
    for name, target in model.checkpoint_tensors().items():
        original = originals[name]
        assert isinstance(original, torch.Tensor)
        match target:
            case torch.Tensor():
                found = target
            case Target(weight=weight, index=index, first=first, rows=rows):
                found = weight.dequantize(index)[first : first + rows]
            case HeadsTarget(heads=heads):
                found = heads.dequantize()
        if quantize is None:
            assert torch.equal(found, original), name
        else:
            assert float((found - original).abs().max()) < 0.2 * float(original.abs().max()), name


def test_nothing_is_held_twice() -> None:
    """A packed model has no tensor of a packed weight left, and its bytes are those of the weights."""
    config = config_of()
    for quantize, most in ((None, 2.1), ("int8", 1.3), ("int4", 0.9)):
        model = packed_model(config, quantize)  # type: ignore[arg-type]
        left = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if "embed" not in name)
        assert left < 20_000  # norms and the router's biases
        held = sum(part.num_bytes for part in model.modules() if isinstance(part, PackedWeight))
        weights = sum(spec.size for spec in tensor_specs(config) if len(spec.shape) == 2 and spec.part != "embed")
        assert held < most * weights


def test_held_weights_of_a_plain_stack_are_views() -> None:
    experts = Experts(config_of(), dtype=torch.bfloat16, device="cpu")
    held = dict(held_weights(experts, "model.layers.3.mlp.experts"))
    assert len(held) == 16 * 3
    for target in held.values():
        assert isinstance(target, torch.Tensor)
        target.data.fill_(1.0)
    assert bool((experts.gate_up_proj == 1).all())  # type: ignore[union-attr]
    assert bool((experts.down_proj == 1).all())  # type: ignore[union-attr]


def test_held_weights_of_packed_heads_and_experts() -> None:
    model = packed_model(config_of(), "int4")
    layer = dict(held_weights(model.layers[4], "model.layers.4"))
    heads = layer["model.layers.4.self_attn.kv_b_proj.weight"]
    assert isinstance(heads, HeadsTarget)
    assert isinstance(heads.heads, PackedHeads)
    assert (heads.shape, heads.dtype) == ((4 * 64, 64), torch.bfloat16)
    up = layer["model.layers.4.mlp.experts.3.up_proj.weight"]
    assert isinstance(up, Target)
    assert (up.index, up.first, up.rows, up.shape, up.dtype) == (3, 32, 32, (32, 64), torch.bfloat16)
    assert not any("gate_up" in name for name in layer)
