"""The operations of a training pass: whole sequences side by side, gradients, and what the losses need to know.

The model's code is the engine's. Three of its operations work differently here, because no cache outlives a pass:

    write_cache       the rows are the cache, in order: slot r is row r (`_store`)
    select            gives a mask [B, T, T] of the positions each row attends to, not a list of slots
    sparse_attention  takes that mask; every row goes this way, and index_topk beyond the context means dense

They also record the indexer's scores with the attention that they should foretell (Kullback-Leibler divergence, which
sends gradients into indexers alone), and how many rows each expert was given.

Source: DeepSeek-V3.2 §2.1 (indexer losses), DeepSeek-V3 §2.1 (balance by bias), GLM-5.2 (one indexer for four layers).
Shape suffixes: B sequences side by side, T positions of each (query), S the same (key), R = B · T rows; else as in
`model/ops/interface.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from freehold.model.index_keys import IndexKeys
from freehold.model.inputs import Span
from freehold.model.latents import Latents
from freehold.model.ops.interface import Weight
from freehold.model.ops.reference import ReferenceOps, stable_topk


@dataclass(slots=True)
class Foretold:
    """One indexer's scores fp32 [B, T, S], what they chose [B, T, S], and the sum of the attention of `layers` layers
    over it, fp32 [B, T, S] without gradient."""

    scores_BTS: Tensor
    chosen_BTS: Tensor
    attended_BTS: Tensor
    layers: int = 0

    def divergence(self, counted_BT: Tensor) -> Tensor:
        """KL(attention of the group's layers, averaged ‖ softmax of the scores) over what was chosen; the mean over
        the rows that count."""
        target_BTS = self.attended_BTS / self.attended_BTS.sum(-1, keepdim=True).clamp(min=1e-20)
        log_q_BTS = self.scores_BTS.masked_fill(~self.chosen_BTS, float("-inf")).log_softmax(-1)
        log_q_BTS = log_q_BTS.masked_fill(~self.chosen_BTS, 0.0)
        row_BT = (torch.xlogy(target_BTS, target_BTS) - target_BTS * log_q_BTS).sum(-1)
        return (row_BT * counted_BT).sum() / counted_BT.sum().clamp(min=1)


@dataclass(slots=True)
class Load:
    """Rows that each expert of one layer was given, and the correction bias that steers them."""

    bias_E: Tensor
    rows_E: Tensor


@dataclass
class TrainingOps(ReferenceOps):
    """Implements `interface.Ops` for one pass at a time over B sequences of T rows; `begin` starts one.

    half: the products of attention and of indexers in bf16. (In a model so small that training it on a CPU makes sense,
    other products gain nothing from bf16, and autocast loses: it copies more than it saves.)
    teach: whether indexers are to be taught, that is whether scores and attention are recorded in `foretold`.
    loads: rows by expert, for each router by its bias, since they were last taken.
    """

    half: bool = False
    teach: bool = False
    foretold: list[Foretold] = field(default_factory=list)
    loads: dict[int, Load] = field(default_factory=dict)

    name = "training"
    expands = False

    def begin(self, allowed_BTS: Tensor) -> None:
        """allowed_BTS: bool, the positions each row may attend to at all (its own document, up to itself)."""
        self._allowed_BTS = allowed_BTS
        length = allowed_BTS.shape[-1]
        # Less than any score, and falling: what is not allowed is chosen last, and there are no ties among it.
        self._least_S = -1e30 * (1 + torch.arange(length, device=allowed_BTS.device) / length)

    def _store(self, cache_SC: Latents | IndexKeys, slots_T: Tensor, row_TC: Tensor) -> None:
        assert isinstance(cache_SC, Tensor)
        cache_SC.copy_(row_TC)

    def select(
        self,
        query_TJD: Tensor,
        weight_TJ: Tensor,
        keys_SD: IndexKeys,
        spans: tuple[Span, ...],
        block_size: int,
        topk: int,
    ) -> Tensor:
        """Bool [B, T, S]: for each row the topk best of what it may attend to, lowest position first among equals."""
        assert isinstance(keys_SD, Tensor)
        allowed_BTS = self._allowed_BTS
        batch, length = allowed_BTS.shape[:2]
        sparse = topk < length
        if not sparse and not self.teach:
            return allowed_BTS
        dtype = torch.bfloat16 if self.half else query_TJD.dtype
        query = query_TJD.reshape(batch, -1, query_TJD.shape[-1]).to(dtype)  # [B, T · J, D]
        keys_BSD = keys_SD.view(batch, length, -1).to(dtype)
        dots = F.relu(torch.matmul(query, keys_BSD.transpose(1, 2))).view(batch, length, -1, length)
        scores_BTS = torch.matmul(weight_TJ.view(batch, length, 1, -1).to(dtype), dots).squeeze(2).float()
        chosen_BTS = allowed_BTS
        if sparse:
            ranked = torch.where(allowed_BTS, scores_BTS.detach(), self._least_S)
            chosen_BTS = torch.zeros_like(allowed_BTS).scatter_(-1, stable_topk(ranked, topk), True) & allowed_BTS
        if self.teach:
            self.foretold.append(Foretold(scores_BTS, chosen_BTS, torch.zeros_like(scores_BTS)))
        return chosen_BTS

    def sparse_attention(
        self, query_RNL: Tensor, latent_SL: Latents, slots_RK: Tensor, rank: int, scale: float
    ) -> Tensor:
        """As in the interface, with slots_RK a mask [B, T, S]."""
        assert isinstance(latent_SL, Tensor)
        batch, length = slots_RK.shape[:2]
        heads = query_RNL.shape[1]
        dtype = torch.bfloat16 if self.half else query_RNL.dtype
        query_BNTL = (query_RNL * scale).to(dtype).view(batch, length, heads, -1).transpose(1, 2)
        latent_BSL = latent_SL.view(batch, length, -1).to(dtype)
        scores = torch.matmul(query_BNTL, latent_BSL[:, None].transpose(2, 3))
        weights_BNTS = scores.masked_fill_(~slots_RK[:, None], float("-inf")).softmax(-1)
        if self.teach and self.foretold and self.foretold[-1].chosen_BTS is slots_RK:
            self.foretold[-1].attended_BTS += weights_BNTS.detach().float().sum(1)
            self.foretold[-1].layers += 1
        mixed_BNTV = torch.matmul(weights_BNTS, latent_BSL[:, None, :, :rank])
        return mixed_BNTV.transpose(1, 2).reshape(batch * length, heads, rank).to(query_RNL.dtype)

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
        """As in the interface; counts the rows of each expert."""
        ids_TX, weights_TX = super().route(
            x_TH, weight_EH, bias_E, top_k=top_k, n_group=n_group, topk_group=topk_group, normalise=normalise,
            scale=scale,
        )  # fmt: skip
        load = self.loads.setdefault(id(bias_E), Load(bias_E, torch.zeros_like(bias_E)))
        load.rows_E += torch.bincount(ids_TX.flatten(), minlength=bias_E.shape[0])
        return ids_TX, weights_TX

    def take_foretold(self) -> list[Foretold]:
        """What was recorded since the last call."""
        taken, self.foretold = self.foretold, []
        return taken

    def balance(self, rate: float) -> None:
        """Move each router's bias by `rate` towards even loads, up for experts with fewer rows than the mean, and
        forget the loads."""
        for load in self.loads.values():
            load.bias_E += rate * torch.sign(load.rows_E.mean() - load.rows_E)
        self.loads = {}
