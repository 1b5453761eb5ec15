"""Wrong models: each makes a right `Glm` wrong in one way that a deployment has been wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from freehold.model.glm import Glm
from freehold.model.inputs import Span
from freehold.model.ops.reference import ReferenceOps


def half_split_indexer_rope(model: Glm) -> Glm:
    """The indexer rotates halves instead of pairs (transformers before its fix, mlx-lm)."""
    for layer in model.layers:
        if layer.self_attn.indexer is not None:
            layer.self_attn.indexer.interleaved = False
    return model


class _OneRowLate(ReferenceOps):
    """Selects for the position before: the newest key is never seen."""

    def select(
        self, query_TJD: Tensor, weight_TJ: Tensor, keys_SD: Tensor, spans: tuple[Span, ...], block_size: int, topk: int
    ) -> Tensor:
        slots = super().select(query_TJD, weight_TJ, keys_SD, spans, block_size, topk)
        return torch.cat((slots[:1], slots[:-1]))


def selection_one_row_late(model: Glm) -> Glm:
    model.ops = _OneRowLate()
    return model


def bf16_correction_bias(model: Glm) -> Glm:
    """The router's correction bias, at a large offset, rounded to bf16."""
    for layer in model.layers:
        gate = getattr(layer.mlp, "gate", None)
        if gate is not None:
            gate.e_score_correction_bias.copy_((gate.e_score_correction_bias + 34.5).bfloat16().float() - 34.5)
    return model


def scaled_shared_expert(model: Glm) -> Glm:
    """routed_scaling_factor applied to the shared expert too."""
    for layer in model.layers:
        shared = getattr(layer.mlp, "shared_experts", None)
        if shared is not None:
            shared.down_proj.weight.mul_(model.config.routed_scaling_factor)
    return model


def wrong_softmax_scale(model: Glm) -> Glm:
    """Scaled by the latent's size, as if the absorbed query were the real one."""
    for layer in model.layers:
        layer.self_attn.scale = model.config.latent_dim**-0.5
    return model


def last_full_layer_ignored(model: Glm) -> Glm:
    """Shared layers reuse the selection of the full layer before the nearest one."""
    full = model.config.full_layers
    stale: dict[int, Any] = {}

    def keep(layer: Any, _: Any, output: Any) -> None:
        stale[0] = stale.get(1)
        stale[1] = output[-1]

    def swap(layer: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (*args[:-1], stale[0])

    for i, layer in enumerate(model.layers):
        if i in full:
            layer.self_attn.register_forward_hook(keep)
        else:
            layer.self_attn.register_forward_pre_hook(swap)
    return model


def latent_eps(model: Glm) -> Glm:
    """The eps of the latent norms that the oracle does not have (ours, by default)."""
    for layer in model.layers:
        layer.self_attn.eps = 1e-2
    return model
