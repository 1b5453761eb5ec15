"""What a model is trained for: its losses over a batch, and which parameters learn.

    language     -log p(next token)
    mtp          the same for the tokens after the next ones, from the MTP layer run as in inference: the first draft
                 from the target's states, later ones from the layer's own, attending to what the first attended to.
                 As cross-entropy, or as the expected share of drafts lost (total variation)
    indexer      how far each indexer's scores are from the attention of the layers that use its choice

Source: DeepSeek-V3 §2.2 (MTP), DeepSeek-V3.2 §2.1 (indexer: warm-up over everything with the rest frozen, then over
the selection, together with the model on sparse attention), Bebop (arXiv 2606.12370: total variation over a chain).

Shape suffixes: B sequences side by side, T positions, R = B · T rows, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freehold.errors import InvalidRequest
from freehold.model.cache import PagedCache
from freehold.model.glm import Glm
from freehold.model.inputs import ForwardInput, Span
from freehold.model.mla import Plan
from freehold.train.batches import Batch
from freehold.train.head_loss import head_loss
from freehold.train.ops import TrainingOps

IndexerLoss = Literal["none", "warm-up", "sparse"]
MtpLoss = Literal["cross-entropy", "total-variation"]

_VARIATION_ROWS = 768  # rows a step whose whole distributions are compared: each is a row of logits, several times


@dataclass(frozen=True, slots=True)
class Objective:
    """What is minimised: language + mtp_weight · mtp + indexer_weight · indexer.

    indexer: "none" leaves indexers alone and attends to everything; "warm-up" attends to everything and trains nothing
    but indexers; "sparse" attends to what they choose and trains them with the rest.
    mtp_drafts: how many drafts are trained. mtp_share: share of each batch's sequences that the MTP layer sees.
    half: products of attention, indexers and the head in bf16; weights and everything else stay in the model's dtype.
    balance_rate: how far a router's correction bias moves for the loads that one learner saw in a step.
    """

    mtp_weight: float = 0.3
    mtp_drafts: int = 1
    mtp_loss: MtpLoss = "cross-entropy"
    mtp_share: float = 1.0
    indexer: IndexerLoss = "none"
    indexer_weight: float = 1.0
    half: bool = False
    balance_rate: float = 1e-3


@dataclass(frozen=True, slots=True)
class Losses:
    """total: to be differentiated. parts: each loss before its weight. tokens: of the batch's documents."""

    total: Tensor
    parts: dict[str, float]
    tokens: int


@dataclass(frozen=True, slots=True)
class _Pass:
    """One batch as the model takes it, and what of it the MTP layer sees."""

    inputs: ForwardInput
    cache: PagedCache
    allowed_BTS: Tensor

    def part(self, rows: int, sequences: int, ids_R: Tensor) -> _Pass:
        """The first sequences only, with other tokens; the cache is shared."""
        inputs = self.inputs
        span = Span(0, rows, 0, inputs.spans[0].table_B)
        part = ForwardInput(ids_R, inputs.positions_T[:rows], inputs.slots_T[:rows], (span,), rows)
        return _Pass(part, self.cache, self.allowed_BTS[:sequences])


class TrainingModel:
    """A model, an objective, and the operations that record what the losses need. It replaces `model.ops`.

    Raises InvalidRequest for an objective that the model cannot have (an MTP loss without an MTP layer).
    """

    def __init__(self, model: Glm, objective: Objective) -> None:
        if objective.mtp_weight and model.mtp is None:
            raise InvalidRequest("the model has no MTP layer: its loss needs mtp_weight = 0")
        if model.config.indexer_types and not model.config.full_layers and objective.indexer != "none":
            raise InvalidRequest("the model has no indexer to train")
        self.model, self.objective = model, objective
        self.ops = TrainingOps(half=objective.half, teach=objective.indexer != "none")
        model.ops = self.ops
        self._topk = model.config.index_topk if objective.indexer == "sparse" else 1 << 40
        for layer in [*model.decoder_layers, *([model.mtp] if model.mtp is not None else [])]:
            if layer.self_attn.indexer is not None:
                layer.self_attn.indexer.topk = self._topk
        chosen = {id(parameter) for _, parameter in self.parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in chosen)

    def replica(self) -> TrainingModel:
        """Another of the same model, sharing every parameter, that can work on a batch in a thread of its own."""
        twin = Glm(self.model.config, dtype=self.model.dtype, device="meta")
        for mine, other in zip(self.model.modules(), twin.modules(), strict=True):
            other._parameters = mine._parameters
        return TrainingModel(twin, self.objective)

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that learn, by name; correction biases never do (`balance` moves them)."""
        for name, parameter in self.model.named_parameters():
            if name.endswith("e_score_correction_bias"):
                continue
            if not self.objective.mtp_weight and name.startswith("mtp.") and self.objective.indexer != "warm-up":
                continue
            indexer = ".indexer." in name
            if {"none": not indexer, "warm-up": indexer, "sparse": True}[self.objective.indexer]:
                yield name, parameter

    def losses(self, batch: Batch) -> Losses:
        """Losses of one batch. `total` has gradients to `parameters`, in fp32."""
        warm_up = self.objective.indexer == "warm-up"
        one = self._pass(batch)
        self.ops.begin(one.allowed_BTS)
        self.ops.take_foretold()
        hidden_RH = self.model(one.inputs, one.cache)
        parts = {"language": self._head_loss(hidden_RH, _ahead(batch.ids_BT, 1), _ahead(_weights(batch, 1), 1))}
        foretold = self.ops.take_foretold()
        counted_BT = (batch.document_BT >= 0).float()
        if self.objective.mtp_weight or (warm_up and self.model.mtp is not None):
            parts["mtp"] = self._mtp(one, batch, hidden_RH)
            foretold += self.ops.take_foretold()
        if foretold:
            found = [f.divergence(counted_BT[: f.scores_BTS.shape[0]]) for f in foretold if f.layers]
            parts["indexer"] = torch.stack(found).mean()
        weights = {
            "language": 0.0 if warm_up else 1.0,
            "mtp": 0.0 if warm_up else self.objective.mtp_weight,
            "indexer": self.objective.indexer_weight,
        }
        total = torch.stack([weights[name] * loss for name, loss in parts.items() if weights[name]]).sum()
        return Losses(total, {name: float(loss.detach()) for name, loss in parts.items()}, batch.tokens)

    def balance(self) -> None:
        """After a step of the optimiser: even out the experts' loads. A warm-up leaves them."""
        self.ops.balance(0.0 if self.objective.indexer == "warm-up" else self.objective.balance_rate)

    def _pass(self, batch: Batch) -> _Pass:
        rows = batch.ids_BT.numel()
        span = Span(0, rows, 0, torch.zeros(1, dtype=torch.int64))
        inputs = ForwardInput(
            batch.ids_BT.flatten(), batch.positions_BT.flatten(), torch.arange(rows), (span,), block_size=rows
        )
        return _Pass(inputs, PagedCache(self.model.config, 1, rows, self.model.dtype), batch.allowed())

    def _head_loss(self, hidden_RH: Tensor, target_BT: Tensor, weight_BT: Tensor) -> Tensor:
        weight_VH = self.model.lm_head.weight
        assert isinstance(weight_VH, Tensor)
        return head_loss(hidden_RH, weight_VH, target_BT.flatten(), weight_BT.flatten(), half=self.objective.half)

    def _mtp(self, whole: _Pass, batch: Batch, hidden_RH: Tensor) -> Tensor:
        """Loss of the drafts. The draft after j others, at row p, is of the token at p + j + 2."""
        sequences = max(1, round(self.objective.mtp_share * batch.ids_BT.shape[0]))
        batch = Batch(*(t[:sequences] for t in (batch.ids_BT, batch.weight_BT, batch.document_BT, batch.positions_BT)))
        rows = batch.ids_BT.numel()
        one = whole.part(rows, sequences, _ahead(batch.ids_BT, 1).flatten())
        self.ops.begin(one.allowed_BTS)
        states = self._drafts(one, batch, hidden_RH[:rows])
        if self.objective.mtp_loss == "total-variation":
            return self._variation(states, batch, hidden_RH[:rows])
        losses = [
            self._head_loss(state_RH, _ahead(batch.ids_BT, j + 2), _ahead(_weights(batch, j + 2), j + 2))
            for j, state_RH in enumerate(states)
        ]
        return torch.stack(losses).mean()

    def _drafts(self, one: _Pass, batch: Batch, hidden_RH: Tensor) -> list[Tensor]:
        """States [R, H] that the head turns into each draft in turn; at every row, as if it were the last verified."""
        model, mtp = self.model, self.model.mtp
        assert mtp is not None
        layer, inputs = model.config.num_hidden_layers, one.inputs
        latent, keys = one.cache.latent[layer], one.cache.index[layer]
        assert isinstance(latent, Tensor)
        assert isinstance(keys, Tensor)
        rows = inputs.num_rows
        one.cache.latent[layer], one.cache.index[layer] = latent[:rows], keys[:rows]
        rope = model.rope.tables(inputs.positions_T)
        z_RH = mtp.enter(self.ops, F.embedding(inputs.token_ids_T, model.embed_tokens), hidden_RH)
        plan = Plan.of(inputs, self._topk, expand=False)
        z_RH, chosen = mtp(self.ops, z_RH, inputs, plan, rope, one.cache.latent[layer], one.cache.index[layer], None)
        states = [mtp.leave(self.ops, z_RH)]
        teach, self.ops.teach = self.ops.teach, False
        for j in range(1, self.objective.mtp_drafts):
            ids_R = _ahead(batch.ids_BT, j + 1).flatten()
            rope = model.rope.tables(inputs.positions_T + j)
            z_RH = mtp.enter(self.ops, F.embedding(ids_R, model.embed_tokens), states[-1])
            states.append(mtp.draft(self.ops, z_RH, rope, one.cache.latent[layer], chosen))
        self.ops.teach = teach
        return states

    def _variation(self, states: list[Tensor], batch: Batch, hidden_RH: Tensor) -> Tensor:
        """1 - mean_j Π_{i ≤ j} (1 - d_TV(target, draft) of the i-th draft): the share of drafts that a verifier is
        expected to refuse. The target's distributions have no gradient. Over some rows, evenly spread."""
        drafts = len(states)
        usable_R = (_weights(batch, drafts + 1).roll(-drafts - 1, dims=1) > 0).flatten()
        rows = usable_R.nonzero()[:, 0]
        rows = rows[:: max(1, -(-rows.numel() // _VARIATION_ROWS))]
        if not rows.numel():
            return hidden_RH.sum() * 0.0
        kept = torch.ones(rows.numel())
        expected = torch.zeros(())
        for j, state_RH in enumerate(states):
            with torch.no_grad():
                target_RV = self.model.logits(hidden_RH[rows + j + 1]).float().softmax(-1)
            draft_RV = self.model.logits(state_RH[rows]).float().softmax(-1)
            kept = kept * (1 - 0.5 * (target_RV - draft_RV).abs().sum(-1))
            expected = expected + kept.mean() / drafts
        return 1 - expected


def _ahead(x_BT: Tensor, by: int) -> Tensor:
    """x at the position `by` later, the end of a sequence wrapping around (its weight is 0)."""
    return x_BT.roll(-by, dims=1)


def _weights(batch: Batch, ahead: int) -> Tensor:
    """[B, T]: what each token counts for, 0 where the one `ahead` before it is of another document."""
    same = torch.zeros_like(batch.document_BT, dtype=torch.bool)
    same[:, ahead:] = batch.document_BT[:, ahead:] == batch.document_BT[:, :-ahead]
    return batch.weight_BT * (same & (batch.document_BT >= 0))
