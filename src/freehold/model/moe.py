"""Mixture of experts: a sigmoid router in fp32, routed experts stacked in two tensors, and a shared expert.

The correction bias steers the choice only and stays fp32 (in bf16 its spread vanishes in its offset, and nearly every
token is routed wrongly); routed_scaling_factor applies once, to the routed part.

Source: DeepSeek-V3 (auxiliary-loss-free balancing), `transformers` 5.23 `GlmMoeDsaMoE`.
Shape suffixes: T rows, H hidden, E experts, X chosen experts, I expert width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from freehold.model.config import GlmConfig
from freehold.model.layers import MLP
from freehold.model.ops.interface import Ops
from freehold.model.packed import PackedWeight


class Router(nn.Module):
    weight: nn.Parameter | PackedWeight

    def __init__(self, config: GlmConfig, *, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.config = config
        experts, hidden = config.n_routed_experts, config.hidden_size
        self.weight = nn.Parameter(torch.empty(experts, hidden, dtype=dtype, device=device))
        self.e_score_correction_bias = nn.Parameter(
            torch.empty(experts, dtype=torch.float32, device=device), requires_grad=False
        )

    def forward(self, ops: Ops, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        """(expert ids int64 [T, X], weights fp32 [T, X])."""
        config = self.config
        return ops.route(
            x_TH,
            self.weight,
            self.e_score_correction_bias,
            top_k=config.num_experts_per_tok,
            n_group=config.n_group,
            topk_group=config.topk_group,
            normalise=config.norm_topk_prob,
            scale=config.routed_scaling_factor,
        )


class Experts(nn.Module):
    """gate_up_proj [E, 2I, H], the gate's rows first; down_proj [E, H, I]."""

    gate_up_proj: nn.Parameter | PackedWeight
    down_proj: nn.Parameter | PackedWeight

    def __init__(self, config: GlmConfig, *, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        experts, hidden, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden, dtype=dtype, device=device))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width, dtype=dtype, device=device))


class MoE(nn.Module):
    def __init__(self, config: GlmConfig, *, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.gate = Router(config, dtype=dtype, device=device)
        self.experts = Experts(config, dtype=dtype, device=device)
        width = config.moe_intermediate_size * config.n_shared_experts
        self.shared_experts = MLP(config.hidden_size, width, dtype=dtype, device=device)

    def forward(self, ops: Ops, x_TH: Tensor) -> Tensor:
        ids_TX, weights_TX = self.gate(ops, x_TH)
        routed_TH = ops.experts(x_TH, ids_TX, weights_TX, self.experts.gate_up_proj, self.experts.down_proj)
        shared_TH: Tensor = self.shared_experts(ops, x_TH)
        return routed_TH + shared_TH
