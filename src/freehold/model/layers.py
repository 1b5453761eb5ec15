"""The small pieces every layer is made of: weights without behaviour, rotary tables, the dense MLP.

Modules hold parameters under the checkpoint's names; the maths is in `ops`. Shape suffixes as in `ops/interface.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from freehold.model.config import GlmConfig
from freehold.model.ops.interface import Ops
from freehold.model.packed import PackedWeight


class Linear(nn.Module):
    """weight [O, I] and an optional bias [O]. Uninitialised: a checkpoint or a trainer fills it.

    `packing.pack_model` replaces the weight by a packed one.
    """

    weight: nn.Parameter | PackedWeight

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(outputs, dtype=dtype, device=device)) if bias else None


class Norm(nn.Module):
    """weight [H], and a bias [H] for LayerNorm."""

    def __init__(self, size: int, *, bias: bool = False, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(size, dtype=dtype, device=device)) if bias else None


class MLP(nn.Module):
    """Dense SwiGLU MLP, also the shared experts of a MoE layer."""

    def __init__(self, hidden: int, width: int, *, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, width, dtype=dtype, device=device)
        self.up_proj = Linear(hidden, width, dtype=dtype, device=device)
        self.down_proj = Linear(width, hidden, dtype=dtype, device=device)

    def forward(self, ops: Ops, x_TH: Tensor) -> Tensor:
        return ops.swiglu(x_TH, self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)


class Rope:
    """Rotary angles: pos · theta^(-2j/Q) for j < Q/2, fp32, no scaling (rope_type "default").

    Source: Su et al. 2021 (RoFormer); theta is 8e6 for GLM-5.2.
    """

    def __init__(self, config: GlmConfig) -> None:
        exponent = torch.arange(0, config.qk_rope_head_dim, 2, dtype=torch.float32) / config.qk_rope_head_dim
        self._inverse_Q2 = 1.0 / (config.rope_theta**exponent)

    def tables(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin), fp32 [T, Q/2] each."""
        angles_TQ2 = positions_T.float()[:, None] * self._inverse_Q2.to(positions_T.device)
        return angles_TQ2.cos(), angles_TQ2.sin()
