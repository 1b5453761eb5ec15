"""Names and shapes of every tensor of a published GLM-5 family checkpoint, in file order. Torch-free.

Source: the safetensors headers of zai-org/GLM-5.2 and -FP8. `transformers` fuses routed experts and drops the MTP
layer in memory; on disk there is one tensor an expert and projection, and the MTP layer is layer `num_hidden_layers`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from freehold.model.config import GlmConfig

Part = Literal[
    "embed", "norm", "attention", "indexer", "router", "routed_expert", "shared_expert", "dense_mlp", "mtp", "head"
]
PARTS: tuple[Part, ...] = (
    "embed", "norm", "attention", "indexer", "router", "routed_expert", "shared_expert", "dense_mlp", "mtp", "head"
)  # fmt: skip
SCALE_SUFFIX = "_scale_inv"  # an FP8 checkpoint has `X.weight_scale_inv` beside `X.weight`


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor: its published name, its shape, and where it belongs.

    dtype: "model" follows the model's dtype (and may be FP8 on disk if `quantizable`); "float32" is always fp32.
    layer: the decoder layer (the MTP layer is num_hidden_layers), None outside layers.
    part: what it is part of. Everything in the MTP layer keeps its own part ("attention", "routed_expert", …) with
        that layer's number; "mtp" are the four tensors that only an MTP layer has.
    quantizable: GLM-5.2-FP8 stores it as FP8 with block scales.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Literal["model", "float32"]
    layer: int | None
    part: Part
    quantizable: bool = False

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def tensor_specs(config: GlmConfig) -> Iterator[TensorSpec]:
    """Every tensor of the checkpoint, the MTP layer included; 59,585 for GLM-5.2."""
    hidden = config.hidden_size
    yield TensorSpec("model.embed_tokens.weight", (config.vocab_size, hidden), "model", None, "embed")
    for layer in range(config.num_hidden_layers):
        full, sparse = config.indexer_types[layer] == "full", config.mlp_layer_types[layer] == "sparse"
        yield from _layer(config, layer, full, sparse)
    if config.has_mtp:
        yield from _mtp_layer(config)
    yield TensorSpec("model.norm.weight", (hidden,), "model", None, "norm")
    yield TensorSpec("lm_head.weight", (config.vocab_size, hidden), "model", None, "head")


def _mtp_layer(config: GlmConfig) -> Iterator[TensorSpec]:
    """A full decoder layer with its own indexer, and what joins it to the target. It has no embedding or head."""
    layer, hidden = config.num_hidden_layers, config.hidden_size
    prefix = f"model.layers.{layer}."
    yield TensorSpec(prefix + "enorm.weight", (hidden,), "model", layer, "mtp")
    yield TensorSpec(prefix + "hnorm.weight", (hidden,), "model", layer, "mtp")
    yield TensorSpec(prefix + "eh_proj.weight", (hidden, 2 * hidden), "model", layer, "mtp")
    yield from _layer(config, layer, full=True, sparse=True)
    yield TensorSpec(prefix + "shared_head.norm.weight", (hidden,), "model", layer, "mtp")


def _layer(config: GlmConfig, layer: int, full: bool, sparse: bool) -> Iterator[TensorSpec]:
    prefix = f"model.layers.{layer}."
    yield TensorSpec(prefix + "input_layernorm.weight", (config.hidden_size,), "model", layer, "norm")
    yield from _attention(config, layer, prefix + "self_attn.")
    if full:
        yield from _indexer(config, layer, prefix + "self_attn.indexer.")
    yield TensorSpec(prefix + "post_attention_layernorm.weight", (config.hidden_size,), "model", layer, "norm")
    if not sparse:
        yield from _mlp(config, layer, prefix + "mlp.", config.intermediate_size, "dense_mlp")
        return
    gate = prefix + "mlp.gate."
    yield TensorSpec(gate + "weight", (config.n_routed_experts, config.hidden_size), "model", layer, "router")
    yield TensorSpec(gate + "e_score_correction_bias", (config.n_routed_experts,), "float32", layer, "router")
    for expert in range(config.n_routed_experts):
        yield from _mlp(config, layer, f"{prefix}mlp.experts.{expert}.", config.moe_intermediate_size, "routed_expert")
    shared_width = config.moe_intermediate_size * config.n_shared_experts
    yield from _mlp(config, layer, prefix + "mlp.shared_experts.", shared_width, "shared_expert")


def _attention(config: GlmConfig, layer: int, prefix: str) -> Iterator[TensorSpec]:
    heads, hidden = config.num_attention_heads, config.hidden_size

    def linear(name: str, out_features: int, in_features: int, bias: bool = False) -> Iterator[TensorSpec]:
        shape = (out_features, in_features)
        yield TensorSpec(f"{prefix}{name}.weight", shape, "model", layer, "attention", quantizable=True)
        if bias:
            yield TensorSpec(f"{prefix}{name}.bias", (out_features,), "model", layer, "attention")

    yield from linear("q_a_proj", config.q_lora_rank, hidden, config.attention_bias)
    yield TensorSpec(prefix + "q_a_layernorm.weight", (config.q_lora_rank,), "model", layer, "norm")
    yield from linear("q_b_proj", heads * config.qk_head_dim, config.q_lora_rank)
    yield from linear("kv_a_proj_with_mqa", config.latent_dim, hidden, config.attention_bias)
    yield TensorSpec(prefix + "kv_a_layernorm.weight", (config.kv_lora_rank,), "model", layer, "norm")
    yield from linear("kv_b_proj", heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank)
    yield from linear("o_proj", hidden, heads * config.v_head_dim, config.attention_bias)


def _indexer(config: GlmConfig, layer: int, prefix: str) -> Iterator[TensorSpec]:
    heads, dim, hidden = config.index_n_heads, config.index_head_dim, config.hidden_size

    def spec(name: str, *shape: int, quantizable: bool = False) -> TensorSpec:
        return TensorSpec(prefix + name, shape, "model", layer, "indexer", quantizable)

    yield spec("wq_b.weight", heads * dim, config.q_lora_rank, quantizable=True)
    yield spec("wk.weight", dim, hidden, quantizable=True)
    yield spec("weights_proj.weight", heads, hidden)
    yield spec("k_norm.weight", dim)
    yield spec("k_norm.bias", dim)


def _mlp(config: GlmConfig, layer: int, prefix: str, width: int, part: Part) -> Iterator[TensorSpec]:
    hidden = config.hidden_size
    yield TensorSpec(prefix + "gate_proj.weight", (width, hidden), "model", layer, part, quantizable=True)
    yield TensorSpec(prefix + "up_proj.weight", (width, hidden), "model", layer, part, quantizable=True)
    yield TensorSpec(prefix + "down_proj.weight", (hidden, width), "model", layer, part, quantizable=True)
