"""The operations in plain PyTorch: the exact, differentiable, readable twin of every fast path.

Source: `transformers` 5.23 `models/glm_moe_dsa` for the maths, DeepSeek-V3.2 for the sparse attention it descends
from. Shape suffixes as in `interface.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from freehold.model.index_keys import Fp8Keys, IndexKeys
from freehold.model.inputs import Span
from freehold.model.latents import Fp8Latents, Latents, latent_rows
from freehold.model.ops.interface import HeadWeights, Weight

# Elements of the largest temporary: bounds memory, and keeps blocks of work near the cache.
_SCORE_BLOCK = 1 << 22
_GATHER_BLOCK = 1 << 22


class ReferenceOps:
    """Implements `interface.Ops`."""

    name = "reference"
    expands = True

    def linear(self, x_TI: Tensor, weight_OI: Weight, bias_O: Tensor | None = None) -> Tensor:
        return F.linear(x_TI, plain(weight_OI, x_TI.dtype), bias_O)

    def linear_fp32(self, x_TI: Tensor, weight_OI: Weight) -> Tensor:
        return F.linear(x_TI.float(), plain(weight_OI, torch.float32).float())

    def rms_norm(self, x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        x = x_TH.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        return weight_H * x.to(x_TH.dtype)

    def layer_norm(self, x_TH: Tensor, weight_H: Tensor, bias_H: Tensor, eps: float) -> Tensor:
        return F.layer_norm(x_TH.float(), weight_H.shape, weight_H.float(), bias_H.float(), eps).to(x_TH.dtype)

    def rope(self, x_TNC: Tensor, cos_TQ2: Tensor, sin_TQ2: Tensor, interleaved: bool, first: int = 0) -> Tensor:
        dims = 2 * cos_TQ2.shape[-1]
        before, x_TNQ, after = torch.split(x_TNC, [first, dims, x_TNC.shape[-1] - first - dims], dim=-1)
        x, cos, sin = x_TNQ.float(), cos_TQ2[:, None], sin_TQ2[:, None]
        if interleaved:
            even, odd = x[..., 0::2], x[..., 1::2]
            out = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
        else:
            low, high = x.chunk(2, dim=-1)
            out = torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)
        return torch.cat((before, out.to(x_TNC.dtype), after), dim=-1)

    def write_cache(
        self,
        x_TC: Tensor,
        weight_A: Tensor,
        bias_A: Tensor | None,
        eps: float,
        cos_TQ2: Tensor,
        sin_TQ2: Tensor,
        interleaved: bool,
        first: int,
        cache_SC: Tensor | Fp8Keys | Fp8Latents,
        slots_T: Tensor,
    ) -> None:
        normed, rest = torch.split(x_TC, [weight_A.shape[0], x_TC.shape[1] - weight_A.shape[0]], dim=-1)
        if bias_A is None:
            normed = self.rms_norm(normed, weight_A, eps)
        else:
            normed = self.layer_norm(normed, weight_A, bias_A, eps)
        x_TC = torch.cat((normed, rest), dim=-1)
        self._store(cache_SC, slots_T, self.rope(x_TC[:, None], cos_TQ2, sin_TQ2, interleaved, first)[:, 0])

    def _store(self, cache_SC: Tensor | Fp8Keys | Fp8Latents, slots_T: Tensor, row_TC: Tensor) -> None:
        if isinstance(cache_SC, Fp8Keys | Fp8Latents):
            cache_SC.write(slots_T, row_TC)
        else:
            cache_SC[slots_T] = row_TC.to(cache_SC.dtype)

    def swiglu(self, x_TH: Tensor, gate_IH: Weight, up_IH: Weight, down_HI: Weight) -> Tensor:
        gated = F.silu(self.linear(x_TH, gate_IH)) * self.linear(x_TH, up_IH)
        return self.linear(gated, down_HI)

    def route(
        self,
        x_TH: Tensor,
        weight_EH: Weight,
        bias_E: Tensor,
        *,
        top_k: int,
        n_group: int,
        topk_group: int,
        normalise: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        scores_TE = self.linear_fp32(x_TH, weight_EH).sigmoid()
        choice_TE = scores_TE + bias_E
        if n_group > 1:
            grouped_TGM = choice_TE.view(x_TH.shape[0], n_group, -1)
            worth_TG = grouped_TGM.topk(2, dim=-1).values.sum(-1)
            kept_TG = torch.zeros_like(worth_TG, dtype=torch.bool)
            kept_TG.scatter_(1, stable_topk(worth_TG, topk_group), True)
            choice_TE = grouped_TGM.masked_fill(~kept_TG[..., None], float("-inf")).flatten(1)
        ids_TX = stable_topk(choice_TE, top_k)
        weights_TX = scores_TE.gather(1, ids_TX)
        if normalise:
            weights_TX = weights_TX / (weights_TX.sum(-1, keepdim=True) + 1e-20)
        return ids_TX, weights_TX * scale

    def experts(
        self, x_TH: Tensor, ids_TX: Tensor, weights_TX: Tensor, gate_up_EIH: Weight, down_EHI: Weight
    ) -> Tensor:
        # Rows are sorted by expert, each expert sees its rows once, and every token sums its experts in one order.
        tokens, chosen = ids_TX.shape
        order = torch.argsort(ids_TX.flatten(), stable=True)
        counts = torch.bincount(ids_TX.flatten(), minlength=down_EHI.shape[0]).tolist()
        rows = x_TH.index_select(0, order // chosen)
        gate_up, down = matrices(gate_up_EIH, x_TH.dtype), matrices(down_EHI, x_TH.dtype)
        parts = []
        for expert, part in enumerate(torch.split(rows, counts)):
            if part.shape[0]:
                gate, up = F.linear(part, gate_up(expert)).chunk(2, dim=-1)
                parts.append(F.linear(F.silu(gate) * up, down(expert)))
        out = torch.empty(tokens * chosen, x_TH.shape[1], dtype=x_TH.dtype, device=x_TH.device)
        out = out.index_copy(0, order, torch.cat(parts)) if parts else out
        weighted = out.view(tokens, chosen, -1).float() * weights_TX[..., None]
        return weighted.sum(1).to(x_TH.dtype)

    def select(
        self,
        query_TJD: Tensor,
        weight_TJ: Tensor,
        keys_SD: IndexKeys,
        spans: tuple[Span, ...],
        block_size: int,
        topk: int,
    ) -> Tensor:
        width = min(topk, max((span.end for span in spans), default=0))
        rows = sum(span.length for span in spans)
        chosen_RK = torch.full((rows, width), -1, dtype=torch.int64, device=query_TJD.device)
        row = 0
        for span in spans:
            slots_P = span.slots_P(block_size)
            dense = max(0, min(topk, span.end) - span.start)  # rows that see at most topk positions: no scoring
            dense = min(dense, span.length)
            for i in range(dense):
                seen = span.start + i + 1
                chosen_RK[row + i, :seen] = slots_P[:seen]
            if dense < span.length:
                if isinstance(keys_SD, Fp8Keys):
                    keys_PD, scales_P = keys_SD.rows(slots_P)
                else:
                    keys_PD, scales_P = keys_SD[slots_P].float(), None
                positions = self._best(query_TJD, weight_TJ, keys_PD, scales_P, span, dense, topk)
                chosen_RK[row + dense : row + span.length] = slots_P[positions]
            row += span.length
        return chosen_RK

    def _best(
        self,
        query_TJD: Tensor,
        weight_TJ: Tensor,
        keys_PD: Tensor,
        scales_P: Tensor | None,
        span: Span,
        skip: int,
        topk: int,
    ) -> Tensor:
        """Positions [rows, topk] chosen for the span's rows after the first `skip`, scored in blocks of rows."""
        heads = query_TJD.shape[1]
        block = max(1, _SCORE_BLOCK // (heads * span.end))
        found = []
        for first in range(skip, span.length, block):
            last = min(first + block, span.length)
            rows = slice(span.row + first, span.row + last)
            seen = span.start + last
            dots = torch.matmul(query_TJD[rows].float(), keys_PD[:seen].T)  # [rows, J, P]
            scores = torch.matmul(weight_TJ[rows, None], F.relu(dots)).squeeze(1)
            if scales_P is not None:
                scores *= scales_P[:seen]
            if last - first > 1:
                positions = torch.arange(span.start + first, seen, device=scores.device)
                scores.masked_fill_(torch.arange(seen, device=scores.device) > positions[:, None], float("-inf"))
            found.append(stable_topk(scores, topk))
        return torch.cat(found)

    def absorb(self, query_RNC: Tensor, kv_b_OV: HeadWeights, nope: int) -> Tensor:
        kv_b_OV = plain(kv_b_OV, query_RNC.dtype)
        query_nope, query_rope = torch.split(query_RNC, [nope, query_RNC.shape[-1] - nope], dim=-1)
        up_key_NAV = kv_b_OV.view(query_RNC.shape[1], -1, kv_b_OV.shape[1])[:, :nope]
        absorbed_RNV = torch.matmul(query_nope.transpose(0, 1), up_key_NAV).transpose(0, 1)
        return torch.cat((absorbed_RNV, query_rope), dim=-1)

    def unabsorb(self, mixed_RNV: Tensor, kv_b_OV: HeadWeights, nope: int) -> Tensor:
        kv_b_OV = plain(kv_b_OV, mixed_RNV.dtype)
        up_value_NOV = kv_b_OV.view(mixed_RNV.shape[1], -1, kv_b_OV.shape[1])[:, nope:]
        return torch.matmul(mixed_RNV.transpose(0, 1), up_value_NOV.transpose(1, 2)).transpose(0, 1)

    def sparse_attention(
        self, query_RNL: Tensor, latent_SL: Latents, slots_RK: Tensor, rank: int, scale: float
    ) -> Tensor:
        block = max(1, _GATHER_BLOCK // (slots_RK.shape[1] * query_RNL.shape[2]))
        out = []
        for first in range(0, slots_RK.shape[0], block):
            slots = slots_RK[first : first + block]
            latent = latent_rows(latent_SL, slots.clamp(min=0), query_RNL.dtype)  # [R, K, L]
            scores = torch.matmul(query_RNL[first : first + block], latent.transpose(1, 2)).float() * scale
            scores = scores.masked_fill((slots < 0)[:, None], float("-inf"))
            # A padded slot has weight 0, but what lies there may be anything, NaN too.
            values = latent[..., :rank].masked_fill((slots < 0)[..., None], 0.0)
            out.append(torch.matmul(torch.softmax(scores, dim=-1).to(query_RNL.dtype), values))
        return torch.cat(out)

    def dense_attention(
        self,
        query_TNC: Tensor,
        latent_SL: Latents,
        kv_b_OV: HeadWeights,
        span: Span,
        block_size: int,
        nope: int,
        scale: float,
    ) -> Tensor:
        kv_b_OV = plain(kv_b_OV, query_TNC.dtype)
        heads, rank = query_TNC.shape[1], kv_b_OV.shape[1]
        latent = latent_rows(latent_SL, span.slots_P(block_size), query_TNC.dtype)  # [P, L]
        expanded = F.linear(latent[:, :rank], kv_b_OV).view(span.end, heads, -1)  # [P, N, nope + v]
        key_rope = latent[:, None, rank:].expand(-1, heads, -1)
        keys = torch.cat((expanded[..., :nope], key_rope), dim=-1).transpose(0, 1)
        values = expanded[..., nope:].transpose(0, 1)
        query = query_TNC[span.row : span.row + span.length].transpose(0, 1)
        scores = torch.matmul(query, keys.transpose(1, 2)).float() * scale  # [N, rows, P]
        positions = torch.arange(span.start, span.end, device=scores.device)
        ahead = torch.arange(span.end, device=scores.device) > positions[:, None]
        weights = torch.softmax(scores.masked_fill(ahead, float("-inf")), dim=-1).to(query.dtype)
        return torch.matmul(weights, values).transpose(0, 1)


def plain(weight: Weight | HeadWeights, dtype: torch.dtype) -> Tensor:
    """A weight as a tensor: itself, or dequantised to dtype."""
    return weight if isinstance(weight, Tensor) else weight.dequantize(dtype=dtype)


def matrices(weight: Weight, dtype: torch.dtype) -> Callable[[int], Tensor]:
    """The matrices of a stack by their place. Those of a tensor share one node of the gradient's graph."""
    if isinstance(weight, Tensor):
        return weight.unbind().__getitem__
    return lambda index: weight.dequantize(index, dtype)


def stable_topk(scores: Tensor, k: int) -> Tensor:
    """Indices [..., k] of the k largest in the last dim, the lowest index first among equals (NaN counts as largest).

    The set is what a stable descending sort would give; its order within a row is not specified. `torch.topk` breaks
    ties arbitrarily, so rows where the k-th value also occurs outside the chosen set are chosen again by rank.
    """
    if k >= scores.shape[-1]:
        return torch.arange(scores.shape[-1], device=scores.device).expand_as(scores)
    best = scores.topk(k, dim=-1)
    threshold = best.values.amin(-1, keepdim=True)
    tied = (scores >= threshold).sum(-1) != k
    if not bool(tied.any()):
        return best.indices
    ids = best.indices.reshape(-1, k).clone()
    flat, rows = scores.reshape(-1, scores.shape[-1]), tied.reshape(-1)
    ids[rows] = flat[rows].sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return ids.view(*scores.shape[:-1], k)
