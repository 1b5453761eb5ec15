"""The multi-token-prediction layer: one more decoder layer that drafts the token after next.

At position p it reads the embedding of token p+1 and the target's hidden state at p *after* the final norm, and what it
gives, after a norm of its own and through the target's head, predicts token p+2. There are two ways to run it:

    extend   over positions that the target has computed. Writes their entries to the layer's own latent and index-key
             cache; the last row of a sequence gives its first draft.
    draft    from a draft to the next one. Its input is what the layer gave before, after its norm. It attends to what
             the last extended row of the sequence attended to: entries made by the target only, never to drafts, and
             it leaves nothing in the cache. So the layer was trained (`index_share_for_mtp_iteration`).

A model that does not share the selection in this way drafts by extending: each draft gets an index and a cache entry of
its own, which the next true extension overwrites.

Source: DeepSeek-V3 §2.2, vLLM 0.32 `deepseek_mtp`, SGLang 0.5.23 `deepseek_nextn`; sharing: the GLM-5.2 release notes.

Shape suffixes: T rows, N sequences, H hidden, S slots, L latent_dim, K selected slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from freehold.model.cache import PagedCache
from freehold.model.config import GlmConfig
from freehold.model.decoder import DecoderLayer
from freehold.model.index_keys import IndexKeys
from freehold.model.inputs import ForwardInput, Span
from freehold.model.latents import Latents
from freehold.model.layers import Linear, Norm
from freehold.model.mla import Plan
from freehold.model.ops.interface import Ops


@dataclass(frozen=True, slots=True)
class Extended:
    """What extending gave: hidden_TH, a state for each row (after the layer's norm, where not said otherwise), and
    selection_NK, the slots that the last row of each span attended to, -1 where there are fewer."""

    hidden_TH: Tensor
    selection_NK: Tensor


class MtpFew(Protocol):
    """The MTP layer in one call for few rows, without its input and its last norm; None for what it does not take."""

    def extend(
        self, z_TH: Tensor, inputs: ForwardInput, rope: tuple[Tensor, Tensor], cache: PagedCache
    ) -> Extended | None: ...

    def draft(
        self, z_NH: Tensor, rope: tuple[Tensor, Tensor], selection_NK: Tensor, cache: PagedCache
    ) -> Tensor | None: ...


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


class MtpLayer(DecoderLayer):
    """Checkpoint layer `num_hidden_layers`: a full sparse decoder layer with its own input and head norm.

    `Glm.extend_mtp` and `Glm.draft_mtp` call it.
    """

    def __init__(self, config: GlmConfig, *, dtype: torch.dtype, device: str) -> None:
        super().__init__(config, full=True, sparse=True, dtype=dtype, device=device)
        self.topk = config.index_topk
        self.input = MtpInput(config, dtype=dtype, device=device)
        self.shared_head = SharedHead(config, dtype=dtype, device=device)

    def enter(self, ops: Ops, embedding_TH: Tensor, hidden_TH: Tensor) -> Tensor:
        """The residual stream that the layer starts from."""
        z_TH: Tensor = self.input(ops, embedding_TH, hidden_TH)
        return z_TH

    def leave(self, ops: Ops, z_TH: Tensor) -> Tensor:
        """The state that the head reads, and that the next draft step starts from."""
        return ops.rms_norm(z_TH, self.shared_head.norm.weight, self.eps)

    def extend(
        self,
        ops: Ops,
        z_TH: Tensor,
        inputs: ForwardInput,
        rope: tuple[Tensor, Tensor],
        latent_SL: Latents,
        keys_SD: IndexKeys,
    ) -> Extended:
        plan = Plan.of(inputs, self.topk, expand=ops.expands)
        z_TH, slots_RK = self(ops, z_TH, inputs, plan, rope, latent_SL, keys_SD, None)
        return Extended(self.leave(ops, z_TH), last_selection(inputs, plan.sparse, slots_RK, self.topk))

    def draft(
        self, ops: Ops, z_NH: Tensor, rope: tuple[Tensor, Tensor], latent_SL: Latents, selection_NK: Tensor
    ) -> Tensor:
        x_NH = ops.rms_norm(z_NH, self.input_layernorm.weight, self.eps)
        z_NH = z_NH + self.self_attn.attend_given(ops, x_NH, *rope, latent_SL, selection_NK)
        x_NH = ops.rms_norm(z_NH, self.post_attention_layernorm.weight, self.eps)
        return self.leave(ops, z_NH + self.mlp(ops, x_NH))


def last_selection(inputs: ForwardInput, scored: tuple[Span, ...], slots_RK: Tensor | None, topk: int) -> Tensor:
    """[N, K] slots that the last row of each span attends to.

    slots_RK: the selection of the rows of `scored` spans. Rows in no such span attend to all that is before them.
    """
    width = min(topk, max(span.end for span in inputs.spans))
    last_NK = torch.full((len(inputs.spans), width), -1, dtype=torch.int64, device=inputs.slots_T.device)
    rows: dict[int, int] = {}  # last row of a scored span → its place in slots_RK
    place = 0
    for span in scored:
        place += span.length
        rows[span.row + span.length - 1] = place - 1
    for n, span in enumerate(inputs.spans):
        chosen = rows.get(span.row + span.length - 1)
        if chosen is not None:
            assert slots_RK is not None
            last_NK[n, : slots_RK.shape[1]] = slots_RK[chosen]
        else:
            last_NK[n, : span.end] = span.slots_P(inputs.block_size)
    return last_NK
