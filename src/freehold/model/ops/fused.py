"""All decoder layers in one native call, for the rows of a decode step.

A step of one token is hundreds of operations of a few microseconds, and each costs about as much again in Python. Here
the whole stack of layers is described to C once, when the model is loaded, and a step is one call. It computes what the
layers' own `forward` computes with `NativeOps`, with the same kernels in the same order: equal bit for bit, which is
its test. Prefill does not need it: its operations are long.

The structures are those of `native/layers.h`. Shape suffixes: T rows, H hidden.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from freehold.model.cache import PagedCache
from freehold.model.config import GlmConfig
from freehold.model.glm import DecoderLayer
from freehold.model.index_keys import Fp8Keys, IndexKeys
from freehold.model.indexer import KEY_NORM_EPS
from freehold.model.inputs import ForwardInput
from freehold.model.mla import LatentAttention
from freehold.model.moe import MoE
from freehold.model.ops.native import SMALL_ROWS, NativeOps
from freehold.model.packed import PANEL, PackedHeads, PackedWeight

MOST_ROWS = 256
"""Of a step, in spans of at most SMALL_ROWS rows: kMostRows of `native/layers.h`."""


def _struct(name: str, pointers: str, integers: str = "", doubles: str = "") -> type[ctypes.Structure]:
    fields: list[tuple[str, Any]] = [(field, ctypes.c_void_p) for field in pointers.split()]
    fields += [(field, ctypes.c_int64) for field in integers.split()]
    fields += [(field, ctypes.c_double) for field in doubles.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


_LayerWeights = _struct(
    "_LayerWeights",
    "input_norm post_norm query_norm latent_norm query_a query_b latent_a up_key up_value output "
    "index_query index_key index_weights index_norm index_norm_bias gate up down "
    "router expert_gate_up expert_down router_bias",
    "experts",
)
_LayerSizes = _struct(
    "_LayerSizes",
    "",
    "hidden query_rank heads nope rope value rank index_heads index_dim topk chosen expert_width normalise "
    "interleaved index_interleaved",
    "eps latent_eps index_eps attention_scale index_scale router_scale",
)


class _Step(ctypes.Structure):
    _fields_ = (
        ("hidden", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("spans", ctypes.c_void_p),
        ("span_count", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("latents", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("selection", ctypes.c_void_p),
        ("width", ctypes.c_int64),
    )


_Pointers = ctypes.Array[ctypes.c_void_p]


class FusedLayers:
    """Decoder layers `first` .. of a packed model, as one call. Call it under `torch.inference_mode()`.

    first: the cache layer of layers[0]. Raises ValueError if a layer has what the native call does not take: use
    `fits` to ask first.
    """

    def __init__(self, ops: NativeOps, config: GlmConfig, layers: Sequence[DecoderLayer], first: int = 0) -> None:
        if not fits(config, layers):
            raise ValueError("these layers cannot run as one native call")
        self._ops, self._first, self._count = ops, first, len(layers)
        self._topk = config.index_topk
        self._sizes = _sizes(config)
        # The modules own the memory that these point to.
        self._layers = tuple(layers)
        self._weights = (_LayerWeights * len(layers))(*(_weights(layer) for layer in layers))
        self._caches: tuple[PagedCache, _Pointers, _Pointers, _Pointers] | None = None

    def __call__(
        self, hidden_TH: Tensor, inputs: ForwardInput, rope: tuple[Tensor, Tensor], cache: PagedCache
    ) -> Tensor | None:
        """The layers' output, in hidden_TH; None for a step that is not one for it: a prompt's chunk, another cache."""
        rows, spans = inputs.num_rows, inputs.spans
        short = rows <= SMALL_ROWS or (rows <= MOST_ROWS and all(span.length <= SMALL_ROWS for span in spans))
        if rows == 0 or not short or cache.latent[0].dtype is not torch.bfloat16:
            return None
        width = min(self._topk, max(span.end for span in spans))
        selection = torch.empty((rows, width), dtype=torch.int64)
        # Addresses only: the tensors live until the call returns.
        described = (ctypes.c_int64 * (4 * len(spans)))()
        tables = [span.table_B.contiguous() for span in spans]
        for i, span in enumerate(spans):
            described[4 * i : 4 * i + 4] = [span.row, span.length, span.start, tables[i].data_ptr()]
        latents, keys, scales = self._pointers(cache)
        cos, sin = rope
        step = _Step(
            hidden_TH.data_ptr(), rows, cos.data_ptr(), sin.data_ptr(), inputs.slots_T.data_ptr(),
            ctypes.addressof(described), len(spans), inputs.block_size, ctypes.addressof(latents),
            ctypes.addressof(keys), ctypes.addressof(scales), selection.data_ptr(), width,
        )  # fmt: skip
        self._ops.run_layers(
            ctypes.addressof(self._sizes), ctypes.addressof(self._weights), self._count, ctypes.addressof(step)
        )
        return hidden_TH

    def _pointers(self, cache: PagedCache) -> tuple[_Pointers, _Pointers, _Pointers]:
        """Where each layer's caches lie; kept while the cache is the same."""
        if self._caches is None or self._caches[0] is not cache:
            chosen = range(self._first, self._first + self._count)
            array = ctypes.c_void_p * self._count
            latents = array(*(cache.latent[i].data_ptr() for i in chosen))
            index = [_addresses(cache.index[i]) for i in chosen]
            keys, scales = array(*(key for key, _ in index)), array(*(scale for _, scale in index))
            self._caches = (cache, latents, keys, scales)
        return self._caches[1:]


def _addresses(keys: IndexKeys | None) -> tuple[int | None, int | None]:
    """Where a layer's index keys lie, and their scales if they have any."""
    if isinstance(keys, Fp8Keys):
        return keys.values_SD.data_ptr(), keys.scales_S.data_ptr()
    return (None if keys is None else keys.data_ptr()), None


def fits(config: GlmConfig, layers: Sequence[DecoderLayer]) -> bool:
    """Whether all that these layers have is packed, nothing is of a rare kind (biases, grouped routing), and the first
    layer selects for itself."""
    if config.attention_bias or config.n_group > 1 or layers[0].self_attn.indexer is None:
        return False
    return all(_weights_or_none(layer) is not None for layer in layers)


def _sizes(config: GlmConfig) -> ctypes.Structure:
    return _LayerSizes(
        hidden=config.hidden_size,
        query_rank=config.q_lora_rank,
        heads=config.num_attention_heads,
        nope=config.qk_nope_head_dim,
        rope=config.qk_rope_head_dim,
        value=config.v_head_dim,
        rank=config.kv_lora_rank,
        index_heads=config.index_n_heads,
        index_dim=config.index_head_dim,
        topk=config.index_topk,
        chosen=config.num_experts_per_tok,
        expert_width=config.moe_intermediate_size,
        normalise=config.norm_topk_prob,
        interleaved=config.rope_interleave,
        index_interleaved=config.indexer_rope_interleave,
        eps=config.rms_norm_eps,
        latent_eps=config.latent_norm_eps,
        index_eps=KEY_NORM_EPS,
        attention_scale=config.softmax_scale,
        index_scale=config.index_n_heads**-0.5 * config.index_head_dim**-0.5,
        router_scale=config.routed_scaling_factor,
    )


def _weights(layer: DecoderLayer) -> ctypes.Structure:
    weights = _weights_or_none(layer)
    assert weights is not None
    return weights


def _weights_or_none(layer: DecoderLayer) -> ctypes.Structure | None:
    attention: LatentAttention = layer.self_attn
    indexer, moe = attention.indexer, layer.mlp if isinstance(layer.mlp, MoE) else None
    mlp = layer.mlp.shared_experts if isinstance(layer.mlp, MoE) else layer.mlp
    heads = attention.kv_b_proj.weight
    if not isinstance(heads, PackedHeads):
        return None
    matrices: dict[str, object] = {
        "query_a": attention.q_a_proj.weight,
        "query_b": attention.q_b_proj.weight,
        "latent_a": attention.kv_a_proj_with_mqa.weight,
        "output": attention.o_proj.weight,
        "up_key": heads.up_key,
        "up_value": heads.up_value,
        "gate": mlp.gate_proj.weight,
        "up": mlp.up_proj.weight,
        "down": mlp.down_proj.weight,
    }
    vectors = {
        "input_norm": layer.input_layernorm.weight,
        "post_norm": layer.post_attention_layernorm.weight,
        "query_norm": attention.q_a_layernorm.weight,
        "latent_norm": attention.kv_a_layernorm.weight,
    }
    if indexer is not None:
        matrices |= {"index_query": indexer.wq_b.weight, "index_key": indexer.wk.weight}
        matrices["index_weights"] = indexer.weights_proj.weight
        assert indexer.k_norm.bias is not None
        vectors |= {"index_norm": indexer.k_norm.weight, "index_norm_bias": indexer.k_norm.bias}
    if moe is not None:
        matrices |= {"router": moe.gate.weight, "expert_gate_up": moe.experts.gate_up_proj}
        matrices["expert_down"] = moe.experts.down_proj
        vectors["router_bias"] = moe.gate.e_score_correction_bias
    handles = {name: weight.handle for name, weight in matrices.items() if isinstance(weight, PackedWeight)}
    gate, up = mlp.gate_proj.weight, mlp.up_proj.weight
    if len(handles) < len(matrices) or not (isinstance(gate, PackedWeight) and isinstance(up, PackedWeight)):
        return None
    if not gate.like(up) or (moe is not None and moe.gate.config.moe_intermediate_size % PANEL):
        return None
    addresses = {name: vector.data_ptr() for name, vector in vectors.items()}
    return _LayerWeights(**handles, **addresses, experts=0 if moe is None else moe.gate.config.n_routed_experts)
