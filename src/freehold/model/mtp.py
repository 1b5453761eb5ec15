"""The multi-token-prediction layer: one more decoder layer that drafts the token after next.

It reads the embedding of the next token and the target's hidden state *after* the final norm, and shares embedding and
output head with the target. Source: DeepSeek-V3 §2.2, vLLM 0.32 `deepseek_mtp`, SGLang 0.5.23 `deepseek_nextn`.

Shape suffixes: T rows, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from freehold.model.config import GlmConfig
from freehold.model.layers import Linear, Norm
from freehold.model.ops.interface import Ops


class SharedHead(nn.Module):
    """The norm before the (shared) output head."""

    def __init__(self, config: GlmConfig, *, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.norm = Norm(config.hidden_size, dtype=dtype, device=device)


class MtpInput(nn.Module):
    """eh_proj(concat[enorm(embedding), hnorm(hidden)]): the layer's input."""

    def __init__(self, config: GlmConfig, *, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.enorm = Norm(config.hidden_size, dtype=dtype, device=device)
        self.hnorm = Norm(config.hidden_size, dtype=dtype, device=device)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size, dtype=dtype, device=device)

    def forward(self, ops: Ops, embedding_TH: Tensor, hidden_TH: Tensor) -> Tensor:
        embedding = ops.rms_norm(embedding_TH, self.enorm.weight, self.eps)
        hidden = ops.rms_norm(hidden_TH, self.hnorm.weight, self.eps)
        return ops.linear(torch.cat((embedding, hidden), dim=-1), self.eh_proj.weight)
