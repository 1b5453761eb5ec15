"""One decoder layer: attention over a sparse selection, then a dense MLP or a mixture of experts.

Shape suffixes: T rows, H hidden, R rows of a selection, K selected slots, S slots, L latent_dim, D index key size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from freehold.model.config import GlmConfig
from freehold.model.index_keys import IndexKeys
from freehold.model.inputs import ForwardInput
from freehold.model.latents import Latents
from freehold.model.layers import MLP, Norm
from freehold.model.mla import LatentAttention, Plan
from freehold.model.moe import MoE
from freehold.model.ops.interface import Ops


class DecoderLayer(nn.Module):
    """Pre-norm residual layer: h += attention(norm(h)); h += mlp(norm(h))."""

    def __init__(self, config: GlmConfig, *, full: bool, sparse: bool, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.input_layernorm = Norm(config.hidden_size, dtype=dtype, device=device)
        self.self_attn = LatentAttention(config, full=full, dtype=dtype, device=device)
        self.post_attention_layernorm = Norm(config.hidden_size, dtype=dtype, device=device)
        self.mlp: MoE | MLP
        if sparse:
            self.mlp = MoE(config, dtype=dtype, device=device)
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size, dtype=dtype, device=device)

    def forward(
        self,
        ops: Ops,
        hidden_TH: Tensor,
        inputs: ForwardInput,
        plan: Plan,
        rope: tuple[Tensor, Tensor],
        latent_SL: Latents,
        keys_SD: IndexKeys | None,
        slots_RK: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        x_TH = ops.rms_norm(hidden_TH, self.input_layernorm.weight, self.eps)
        attended, slots_RK = self.self_attn(ops, x_TH, inputs, plan, *rope, latent_SL, keys_SD, slots_RK)
        hidden_TH = hidden_TH + attended
        x_TH = ops.rms_norm(hidden_TH, self.post_attention_layernorm.weight, self.eps)
        return hidden_TH + self.mlp(ops, x_TH), slots_RK
