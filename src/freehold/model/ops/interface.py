"""The contract every set of operations fulfils: `reference.ReferenceOps` in plain PyTorch, and the fast ones.

A model is given one `Ops` object when it is built and calls nothing else for its maths, so a fast path replaces
operations one by one and is tested against the reference with the same signature.

Shape suffixes: T rows (tokens), R rows of one selection, H hidden, I intermediate, N attention heads, J index heads,
D index head size, L latent_dim, V kv_lora_rank, C head size or cache row, K selected slots, S cache slots, E experts,
X chosen experts a token, Q rope dims.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from freehold.model.index_keys import Fp8Keys, IndexKeys
from freehold.model.inputs import Span
from freehold.model.latents import Fp8Latents, Latents
from freehold.model.packed import PackedHeads, PackedWeight

Weight = Tensor | PackedWeight
"""A matrix [O, I], or a stack of them, as a tensor or packed for the native kernels."""

HeadWeights = Tensor | PackedHeads
"""kv_b [N · (nope + v), V]: per head its rows of W_UK, then those of W_UV."""


class Ops(Protocol):
    """Operations on tensors. None of them keeps state; inputs are never modified unless said."""

    name: str
    expands: bool
    """Whether rows whose whole context is within topk go to `dense_attention`, rather than all to the selected form."""

    def linear(self, x_TI: Tensor, weight_OI: Weight, bias_O: Tensor | None = None) -> Tensor:
        """x Wᵀ (+ b), in x's dtype: [T, O]."""
        ...

    def linear_fp32(self, x_TI: Tensor, weight_OI: Weight) -> Tensor:
        """x Wᵀ computed and returned in fp32, whatever the inputs' dtype: fp32 [T, O]."""
        ...

    def rms_norm(self, x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        """w · (x · rsqrt(mean(x²) + eps)), computed in fp32, rounded to x's dtype before the weight (last dim)."""
        ...

    def layer_norm(self, x_TH: Tensor, weight_H: Tensor, bias_H: Tensor, eps: float) -> Tensor:
        """LayerNorm over the last dim, computed in fp32, result in x's dtype."""
        ...

    def rope(self, x_TNC: Tensor, cos_TQ2: Tensor, sin_TQ2: Tensor, interleaved: bool, first: int = 0) -> Tensor:
        """x with its Q values from `first` rotated and the rest as they are: [T, N, C], C ≥ first + Q.

        Rotates the pairs (x_2j, x_2j+1) if interleaved, else (x_j, x_j+Q/2), in fp32; result in x's dtype and layout.
        """
        ...

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
        """Cache rows slots_T ← x with its leading A values normed and the Q values from `first` rotated (after that).

        The norm is RMSNorm, or LayerNorm when it has a bias. 8-bit caches take the finished row, in x's dtype, and
        quantise it. Modifies cache_SC.
        """
        ...

    def swiglu(self, x_TH: Tensor, gate_IH: Weight, up_IH: Weight, down_HI: Weight) -> Tensor:
        """down(silu(gate(x)) · up(x)): [T, H]."""
        ...

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
        """Sigmoid router in fp32: (expert ids int64 [T, X], weights fp32 [T, X]).

        Experts are chosen by score + bias (within the topk_group best groups, a group's worth being the sum of its
        two best), lowest expert first on ties; the weights are the plain scores.
        """
        ...

    def experts(
        self, x_TH: Tensor, ids_TX: Tensor, weights_TX: Tensor, gate_up_EIH: Weight, down_EHI: Weight
    ) -> Tensor:
        """Σ_x weights · Expert_ids(x): [T, H]. gate_up has the gate's rows first, [E, 2I, H]."""
        ...

    def select(
        self,
        query_TJD: Tensor,
        weight_TJ: Tensor,
        keys_SD: IndexKeys,
        spans: tuple[Span, ...],
        block_size: int,
        topk: int,
    ) -> Tensor:
        """The indexer's choice: for each row of `spans`, the cache slots of the topk positions s ≤ t with the best
        Σ_j weight_j · relu(q_j · k_s), lowest position first on ties; all of them while t < topk.

        weight_TJ is fp32 with every scale folded in. Scores are fp32; the scale of an 8-bit key multiplies its score.
        Returns int64 [R, K] with K = min(topk, longest context), rows in the order of the spans, padded with -1 after
        a row's own positions. Slots are in no particular order within a row.
        """
        ...

    def absorb(self, query_RNC: Tensor, kv_b_OV: HeadWeights, nope: int) -> Tensor:
        """Queries in latent space: [q[:nope] · W_UK of the head, the rest as it is], [R, N, L].

        kv_b has, per head, `nope` rows of W_UK and then those of W_UV.
        """
        ...

    def unabsorb(self, mixed_RNV: Tensor, kv_b_OV: HeadWeights, nope: int) -> Tensor:
        """Mixed latents to values, by each head's W_UV: [R, N, v_head_dim]."""
        ...

    def sparse_attention(
        self, query_RNL: Tensor, latent_SL: Latents, slots_RK: Tensor, rank: int, scale: float
    ) -> Tensor:
        """Absorbed attention over selected slots: softmax(q · latent · scale) · latent[:rank], [R, N, V].

        The softmax is in fp32. A slot of -1 is no slot; a row has at least one slot. 8-bit latents are read as the
        numbers they are, in the query's dtype.
        """
        ...

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
        """Expanded causal attention of one span over all its positions below its end: [T, N, v_head_dim].

        Keys and values are expanded from the cached latents by kv_b (per head: nope key rows, then value rows).
        """
        ...
