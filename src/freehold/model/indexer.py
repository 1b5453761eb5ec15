"""The lightning indexer of a full layer: which topk cached tokens each query attends to.

Source: DeepSeek-V3.2 (sparse attention) and `transformers` 5.23 `GlmMoeDsaIndexer`; GLM rotates the first
qk_rope_head_dim dims of query and key in interleaved pairs and applies no Hadamard transform.

Shape suffixes: T rows, H hidden, C q_lora_rank, J index heads, D index head size, K selected slots.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from freehold.model.config import GlmConfig
from freehold.model.index_keys import IndexKeys
from freehold.model.inputs import ForwardInput, Span
from freehold.model.layers import Linear, Norm
from freehold.model.ops.interface import Ops

KEY_NORM_EPS = 1e-6


class Indexer(nn.Module):
    def __init__(self, config: GlmConfig, *, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.heads, self.head_dim = config.index_n_heads, config.index_head_dim
        self.interleaved = config.indexer_rope_interleave
        self.topk = config.index_topk
        self.wq_b = Linear(config.q_lora_rank, self.heads * self.head_dim, dtype=dtype, device=device)
        self.wk = Linear(config.hidden_size, self.head_dim, dtype=dtype, device=device)
        self.k_norm = Norm(self.head_dim, bias=True, dtype=dtype, device=device)
        self.weights_proj = Linear(config.hidden_size, self.heads, dtype=dtype, device=device)

    # Both detach their inputs: an indexer learns from its own loss (KL to the attention it serves) and never from the
    # model's, and moves nothing else. Choosing has no gradient, so nothing is lost.

    def write_keys(self, ops: Ops, x_TH: Tensor, cos: Tensor, sin: Tensor, keys_SD: IndexKeys, slots_T: Tensor) -> None:
        """Caches the index keys of every token, whether or not this step needs a selection."""
        key_TD = ops.linear(x_TH.detach(), self.wk.weight)
        norm = self.k_norm
        assert norm.bias is not None
        ops.write_cache(key_TD, norm.weight, norm.bias, KEY_NORM_EPS, cos, sin, self.interleaved, 0, keys_SD, slots_T)

    def select(
        self,
        ops: Ops,
        x_TH: Tensor,
        latent_TC: Tensor,
        keys_SD: IndexKeys,
        inputs: ForwardInput,
        spans: tuple[Span, ...],
        cos: Tensor,
        sin: Tensor,
    ) -> Tensor:
        """Slots [R, K] for the rows of `spans`. latent_TC is the *normed* query latent; x_TH the layer's normed input.

        The head weights are fp32 before any scaling: rounding them flips near ties.
        """
        x_TH, latent_TC = x_TH.detach(), latent_TC.detach()
        query = ops.linear(latent_TC, self.wq_b.weight).view(-1, self.heads, self.head_dim)
        query_TJD = ops.rope(query, cos, sin, self.interleaved)
        scale = self.heads**-0.5 * self.head_dim**-0.5
        weight_TJ = ops.linear_fp32(x_TH, self.weights_proj.weight) * scale
        return ops.select(query_TJD, weight_TJ, keys_SD, spans, inputs.block_size, self.topk)
