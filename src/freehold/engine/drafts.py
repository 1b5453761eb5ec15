"""Proposes drafts with the MTP layer, at the end of a step, for the next one.

Behind the target's forward pass the layer is extended over the same positions (prompt chunks, the last token and the
accepted drafts), with the token that follows each. The last state of a request gives its first draft, and a draft step
each further one. Requests whose drafts must match get the likeliest token, or, with a seed, the token that the layer's
distribution gives for the very random number that the target will choose with; the others get a random one.

The layer knows neither penalties nor guides: what they forbid is drafted in vain, and rejected.

Shapes: T rows, N requests that draft, H hidden, V vocabulary, K selected slots.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from freehold.engine.coverage import Coverage
from freehold.engine.draft_policy import Policy
from freehold.engine.sampler import Sampler
from freehold.engine.sampling_state import RequestState, draw, probabilities
from freehold.engine.speculate import Draft, Verified, must_match
from freehold.engine.step import ScheduledSeq, StepInput
from freehold.model.cache import PagedCache
from freehold.model.glm import Glm
from freehold.model.inputs import ForwardInput, Span
from freehold.model.ops.native import SMALL_ROWS


@dataclass(frozen=True, slots=True)
class Proposal:
    """Drafts that follow the token `last` at `position`."""

    position: int
    last: int
    drafts: tuple[Draft, ...]


@dataclass(slots=True)
class _Chain:
    """A request that drafts: its span of the target's input, how many drafts it may have, and its last token."""

    seq: ScheduledSeq
    state: RequestState
    span: Span
    most: int
    position: int
    last: int
    drafts: list[Draft]


def most_drafts(decoding: int, rows: int = 0) -> int:
    """How many drafts each of `decoding` requests may have in a step that has `rows` rows without drafts.

    Steps of up to SMALL_ROWS rows add up every row in one order, whatever else is in the step; drafts must not make a
    larger one of such a step, for then they could change a token.
    """
    if not decoding:
        return 0
    room = SMALL_ROWS - (rows if decoding <= rows <= SMALL_ROWS else decoding)
    return max(0, room // decoding)


class Drafter:
    """Owns the MTP layer's side of the cache, and the drafts between two steps. Used from one thread.

    coverage: of the cache, where several drafters (of a model and of its adapters) share one.
    """

    def __init__(
        self,
        model: Glm,
        cache: PagedCache,
        sampler: Sampler,
        policy: Policy,
        coverage: Coverage | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.model, self.cache, self.sampler, self.policy = model, cache, sampler, policy
        self._clock = clock
        self.coverage = Coverage(cache.num_blocks, cache.block_size) if coverage is None else coverage
        self._proposals: dict[str, Proposal] = {}

    def release(self, request_id: str) -> None:
        self.coverage.drop(request_id)
        self._proposals.pop(request_id, None)

    def take(self, step: StepInput) -> list[tuple[Draft, ...]]:
        """The drafts to verify in this step, for each of its sequences."""
        if not self._proposals:
            return [()] * len(step.seqs)
        proposals = [self._proposals.pop(seq.request_id, None) for seq in step.seqs]
        decoding = sum(len(seq.token_ids) == 1 and seq.samples for seq in step.seqs)
        most = most_drafts(decoding, step.num_tokens)
        return [
            proposal.drafts[: min(most, len(seq.block_ids) * self.cache.block_size - seq.start - 1)]
            if proposal is not None and (proposal.position, (proposal.last,)) == (seq.start, seq.token_ids)
            else ()
            for seq, proposal in zip(step.seqs, proposals, strict=True)
        ]

    def follow(
        self, step: StepInput, inputs: ForwardInput, hidden_TH: Tensor, outcomes: Sequence[Verified | None]
    ) -> None:
        """Extend the MTP layer over what the step computed, and propose the next drafts.

        inputs, hidden_TH: of the target, rows of drafts included. outcomes: of the sequences that sample, else None.
        """
        decoding = sum(outcome is not None and not outcome.ended for outcome in outcomes)
        most = self.policy.plan(max(1, decoding), most_drafts(max(1, decoding)))
        if most is None:
            for seq in step.seqs:
                self.coverage.skip(seq, len(seq.token_ids))
            return
        started = self._clock()
        self._extend(step, inputs, hidden_TH, outcomes, most)
        if decoding == len(step.seqs) and _only_decodes(step):
            self.policy.note_drafting(decoding, most, self._clock() - started)

    def note_verified(
        self, step: StepInput, outcomes: Sequence[Verified | None], drafts: Sequence[tuple[Draft, ...]], seconds: float
    ) -> None:
        """What came of the drafts of a step, and how long it took up to here."""
        proposed = [len(each) for each in drafts]
        if any(proposed):
            self.policy.note_verified(
                (count, outcome.accepted)
                for count, outcome in zip(proposed, outcomes, strict=True)
                if count and outcome is not None
            )
        if _only_decodes(step) and min(proposed) == max(proposed):
            self.policy.note_target(len(proposed), proposed[0], seconds)

    def _extend(
        self,
        step: StepInput,
        inputs: ForwardInput,
        hidden_TH: Tensor,
        outcomes: Sequence[Verified | None],
        most: int,
    ) -> None:
        rows: list[int] = []
        following: list[int] = []
        spans: list[Span] = []
        chains: list[_Chain] = []
        places: list[int] = []
        size = self.cache.block_size
        for seq, span, outcome in zip(step.seqs, inputs.spans, outcomes, strict=True):
            known = self._followers(seq, outcome)
            if not known:
                self.coverage.skip(seq, len(seq.token_ids))
                continue
            base, blanks = self.coverage.base(seq)
            if blanks:
                self._blank(span, seq.start - blanks, blanks)
            self.coverage.extend(seq, base, len(known))
            spans.append(Span(len(rows), len(known), seq.start - base, span.table_B[base // size :]))
            rows.extend(range(span.row, span.row + len(known)))
            following.extend(known)
            if (chain := self._chain(seq, span, outcome, most)) is not None:
                places.append(len(spans) - 1)
                chains.append(chain)
        if not rows:
            return
        own = slice(None) if len(rows) == inputs.num_rows else torch.tensor(rows)
        extended_inputs = ForwardInput(
            torch.tensor(following), inputs.positions_T[own], inputs.slots_T[own], tuple(spans), size
        )
        extended = self.model.extend_mtp(hidden_TH[own], extended_inputs, self.cache)
        if chains:
            last = [spans[place].row + spans[place].length - 1 for place in places]
            self._propose(chains, extended.hidden_TH[last], extended.selection_NK[places])

    def _followers(self, seq: ScheduledSeq, outcome: Verified | None) -> list[int]:
        """The token after each position that is to be extended."""
        if outcome is None:
            return [] if seq.following is None else [*seq.token_ids[1:], seq.following]
        return [] if outcome.error is not None else [*seq.token_ids[1:], *outcome.token_ids]

    def _blank(self, span: Span, first: int, count: int) -> None:
        """Zeros for positions that have no entry but share a block with ones that will: whatever lies there, it is
        not this request's."""
        size, layer = self.cache.block_size, self.model.config.num_hidden_layers
        positions = torch.arange(first, first + count)
        slots = span.table_B[positions // size] * size + positions % size
        self.cache.blank(layer, slots)

    def _chain(self, seq: ScheduledSeq, span: Span, outcome: Verified | None, most: int) -> _Chain | None:
        if outcome is None or outcome.ended or not outcome.token_ids:
            return None
        state = self.sampler.state(seq.request_id)
        position = seq.start + len(seq.token_ids) + len(outcome.token_ids) - 1  # of the last token
        most = min(most, state.params.max_tokens - state.num_output - 1)
        if most < 1:
            return None
        return _Chain(seq, state, span, most, position, outcome.token_ids[-1], [])

    def _propose(self, chains: list[_Chain], hidden_NH: Tensor, selection_NK: Tensor) -> None:
        everyone, depth = chains, 0
        while going_on := self._draw(chains, depth, self.model.logits(hidden_NH)):
            if len(going_on) < len(chains):
                hidden_NH, selection_NK = hidden_NH[going_on], selection_NK[going_on]
                chains = [chains[n] for n in going_on]
            hidden_NH = self._next(chains, depth, hidden_NH, selection_NK)
            depth += 1
        for chain in everyone:
            self._proposals[chain.seq.request_id] = Proposal(chain.position, chain.last, tuple(chain.drafts))

    def _draw(self, chains: list[_Chain], depth: int, logits_NV: Tensor) -> list[int]:
        """Give each chain a draft; returns the places of those that get another one."""
        going_on: list[int] = []
        for n, (chain, likeliest, best) in enumerate(zip(chains, *self.sampler.likeliest(logits_NV), strict=True)):
            if not math.isfinite(best):
                continue
            if chain.state.is_greedy:
                chain.drafts.append(Draft(likeliest))
            else:
                chain.drafts.append(draw_draft(logits_NV[n], chain.state, depth))
            if depth + 1 < chain.most and self._has_place(chain, depth):
                going_on.append(n)
        return going_on

    def _has_place(self, chain: _Chain, depth: int) -> bool:
        """Whether another draft step can run: without sharing it needs a place in the cache."""
        if self.model.config.index_share_for_mtp_iteration:
            return True
        return chain.position + depth < len(chain.seq.block_ids) * self.cache.block_size

    def _next(self, chains: list[_Chain], depth: int, hidden_NH: Tensor, selection_NK: Tensor) -> Tensor:
        """The states behind the drafts just given."""
        token_ids_N = torch.tensor([chain.drafts[-1].token_id for chain in chains])
        positions_N = torch.tensor([chain.position + depth for chain in chains])
        if self.model.config.index_share_for_mtp_iteration:
            return self.model.draft_mtp(hidden_NH, token_ids_N, positions_N, selection_NK, self.cache)
        size = self.cache.block_size
        spans, slots = [], []
        for n, chain in enumerate(chains):
            position, base = chain.position + depth, self.coverage.base_of(chain.seq.request_id)
            spans.append(Span(n, 1, position - base, chain.span.table_B[base // size :]))
            slots.append(chain.seq.block_ids[position // size] * size + position % size)
        inputs = ForwardInput(token_ids_N, positions_N, torch.tensor(slots), tuple(spans), size)
        return self.model.extend_mtp(hidden_NH, inputs, self.cache).hidden_TH


def _only_decodes(step: StepInput) -> bool:
    return all(len(seq.token_ids) == 1 and seq.samples for seq in step.seqs)


def draw_draft(logits_V: Tensor, state: RequestState, depth: int) -> Draft:
    """A draft from the layer's distribution at the request's temperature and with its filters."""
    row_V = logits_V.to(device="cpu", dtype=torch.float32, copy=True).numpy()
    q_V = probabilities(row_V, state)
    if must_match(state):
        return Draft(draw(q_V, state.peek(depth)))
    return Draft(draw(q_V, state.uniform()), q_V)
