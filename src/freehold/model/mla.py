"""Multi-head latent attention over a sparse selection.

Per token only a normed latent and one roped key are cached. Rows whose whole context is within index_topk and that
come several at a time (prefill) use the expanded form, per-head keys and values made from the latents; all others use
the absorbed form over the selected slots, in which W_UK moves into the query and W_UV behind the softmax.

Source: DeepSeek-V2 (latent attention), `transformers` 5.23 `GlmMoeDsaAttention`.
Shape suffixes: T rows, R rows of a selection, H hidden, C q_lora_rank, V kv_lora_rank, L = V + Q latent_dim, Q rope
dims, N heads, O v_head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from freehold.model.config import GlmConfig
from freehold.model.index_keys import IndexKeys
from freehold.model.indexer import Indexer
from freehold.model.inputs import ForwardInput, Span
from freehold.model.latents import Latents
from freehold.model.layers import Linear, Norm
from freehold.model.ops.interface import Ops
from freehold.model.packed import PackedHeads


@dataclass(frozen=True, slots=True)
class Plan:
    """How the rows of one forward pass attend; the same for every layer.

    dense: spans in expanded form. sparse: the others; rows_R are their rows, None when that is every row.
    """

    dense: tuple[Span, ...]
    sparse: tuple[Span, ...]
    rows_R: Tensor | None

    @classmethod
    def of(cls, inputs: ForwardInput, topk: int, *, expand: bool = True) -> Plan:
        """Spans are cut where their context passes topk; single rows are never worth expanding.

        expand: whether to use the expanded form at all.
        """
        if not expand:
            return cls((), inputs.spans, None)
        dense: list[Span] = []
        sparse: list[Span] = []
        for span in inputs.spans:
            inside = min(max(topk - span.start, 0), span.length)
            if inside > 1:
                dense.append(Span(span.row, inside, span.start, span.table_B))
            else:
                inside = 0
            if inside < span.length:
                sparse.append(Span(span.row + inside, span.length - inside, span.start + inside, span.table_B))
        if not dense:
            return cls((), tuple(sparse), None)
        rows = [torch.arange(span.row, span.row + span.length) for span in sparse]
        return cls(tuple(dense), tuple(sparse), torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64))


class HeadProjection(nn.Module):
    """kv_b: weight [N · (nope + O), V], for each head its rows of W_UK and then those of W_UV."""

    weight: nn.Parameter | PackedHeads

    def __init__(self, inputs: int, outputs: int, *, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=dtype, device=device))


class LatentAttention(nn.Module):
    """Attention of one layer. `indexer` is None on shared layers, which are handed the selection of a full one."""

    def __init__(self, config: GlmConfig, *, full: bool, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.heads, self.nope, self.rope_dim = (
            config.num_attention_heads,
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
        )
        self.rank, self.value_dim = config.kv_lora_rank, config.v_head_dim
        self.interleaved, self.scale, self.eps = config.rope_interleave, config.softmax_scale, config.latent_norm_eps
        hidden, bias = config.hidden_size, config.attention_bias

        def linear(inputs: int, outputs: int, bias: bool = False) -> Linear:
            return Linear(inputs, outputs, bias=bias, dtype=dtype, device=device)

        self.q_a_proj = linear(hidden, config.q_lora_rank, bias)
        self.q_a_layernorm = Norm(config.q_lora_rank, dtype=dtype, device=device)
        self.q_b_proj = linear(config.q_lora_rank, self.heads * config.qk_head_dim)
        self.kv_a_proj_with_mqa = linear(hidden, config.latent_dim, bias)
        self.kv_a_layernorm = Norm(self.rank, dtype=dtype, device=device)
        self.kv_b_proj = HeadProjection(
            self.rank, self.heads * (self.nope + self.value_dim), dtype=dtype, device=device
        )
        self.o_proj = linear(self.heads * self.value_dim, hidden, bias)
        self.indexer = Indexer(config, dtype=dtype, device=device) if full else None

    def forward(
        self,
        ops: Ops,
        x_TH: Tensor,
        inputs: ForwardInput,
        plan: Plan,
        cos: Tensor,
        sin: Tensor,
        latent_SL: Latents,
        keys_SD: IndexKeys | None,
        slots_RK: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """(output [T, H], selection for this layer and the shared ones above). Writes this layer's cache rows."""
        latent_TC, query_TNC = self._query(ops, x_TH, cos, sin)
        compressed_TL = ops.linear(x_TH, self.kv_a_proj_with_mqa.weight, self.kv_a_proj_with_mqa.bias)
        norm = self.kv_a_layernorm.weight
        ops.write_cache(
            compressed_TL, norm, None, self.eps, cos, sin, self.interleaved, self.rank, latent_SL, inputs.slots_T
        )
        if self.indexer is not None:
            assert keys_SD is not None
            self.indexer.write_keys(ops, x_TH, cos, sin, keys_SD, inputs.slots_T)
            slots_RK = None
            if plan.sparse:
                slots_RK = self.indexer.select(ops, x_TH, latent_TC, keys_SD, inputs, plan.sparse, cos, sin)
        out_TNO = self._attend(ops, query_TNC, inputs, plan, latent_SL, slots_RK)
        return ops.linear(out_TNO.flatten(1), self.o_proj.weight, self.o_proj.bias), slots_RK

    def attend_given(
        self, ops: Ops, x_RH: Tensor, cos: Tensor, sin: Tensor, latent_SL: Latents, slots_RK: Tensor
    ) -> Tensor:
        """Output [R, H] of rows that attend to given slots and are not in the cache themselves: nothing is written."""
        _, query_RNC = self._query(ops, x_RH, cos, sin)
        out_RNO = self._absorbed(ops, query_RNC, latent_SL, slots_RK)
        return ops.linear(out_RNO.flatten(1), self.o_proj.weight, self.o_proj.bias)

    def _query(self, ops: Ops, x_TH: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """The normed query latent [T, C], and the roped queries of all heads."""
        latent_TC = ops.rms_norm(
            ops.linear(x_TH, self.q_a_proj.weight, self.q_a_proj.bias), self.q_a_layernorm.weight, self.eps
        )
        query = ops.linear(latent_TC, self.q_b_proj.weight).view(-1, self.heads, self.nope + self.rope_dim)
        return latent_TC, ops.rope(query, cos, sin, self.interleaved, self.nope)

    def _attend(
        self,
        ops: Ops,
        query_TNC: Tensor,
        inputs: ForwardInput,
        plan: Plan,
        latent_SL: Latents,
        slots_RK: Tensor | None,
    ) -> Tensor:
        if not plan.dense:
            assert slots_RK is not None
            return self._absorbed(ops, query_TNC, latent_SL, slots_RK)
        out_TNO = query_TNC.new_empty(query_TNC.shape[0], self.heads, self.value_dim)
        for span in plan.dense:
            out_TNO[span.row : span.row + span.length] = ops.dense_attention(
                query_TNC, latent_SL, self.kv_b_proj.weight, span, inputs.block_size, self.nope, self.scale
            )
        if plan.sparse:
            assert slots_RK is not None
            rows = plan.rows_R
            out_TNO[rows] = self._absorbed(ops, query_TNC[rows], latent_SL, slots_RK)
        return out_TNO

    def _absorbed(self, ops: Ops, query_RNC: Tensor, latent_SL: Latents, slots_RK: Tensor) -> Tensor:
        query_RNL = ops.absorb(query_RNC, self.kv_b_proj.weight, self.nope)
        mixed_RNV = ops.sparse_attention(query_RNL, latent_SL, slots_RK, self.rank, self.scale)
        return ops.unabsorb(mixed_RNV, self.kv_b_proj.weight, self.nope)
