"""Executes engine steps on the model: build the batch, run the layers, take the rows that matter, sample.

One thread calls it; nothing here knows about queues or requests beyond their ids.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from freehold.engine.batch import BatchBuilder
from freehold.engine.coverage import Coverage
from freehold.engine.draft_policy import Policy
from freehold.engine.drafts import Drafter
from freehold.engine.sampler import Sampler
from freehold.engine.speculate import Candidate, Draft, Verified, verify
from freehold.engine.step import NewRequest, ScheduledSeq, SeqOutput, StepInput
from freehold.errors import EngineError
from freehold.model.cache import PagedCache
from freehold.model.glm import Glm
from freehold.model.inputs import ForwardInput
from freehold.model.pager import PagingStats
from freehold.types import TokenLogprobs

# Rows of prompt logits made at once when a prompt is scored: bounds [rows, vocabulary] in memory.
_SCORE_ROWS = 256


@dataclass(frozen=True, slots=True)
class Served:
    """A model that a runner computes requests with: as it was loaded, or with an adapter.

    drafts: how many tokens to draft for each request and step; None: none. Needs a model with an MTP layer.
    """

    model: Glm
    drafts: Policy | None = None


class ModelRunner:
    """Implements `step.Runner` on a `Glm` and its cache.

    drafts: as of `Served`. adapters: the model with each of its adapters, by name. The requests of a step that have the
    same adapter are computed together, and those of different ones one after the other: all in the one cache.
    """

    def __init__(
        self,
        model: Glm,
        cache: PagedCache,
        sampler: Sampler,
        drafts: Policy | None = None,
        adapters: Mapping[str, Served] | None = None,
    ) -> None:
        self.model, self.cache, self.sampler = model, cache, sampler
        # One for all: a block that a request with one adapter gave back may go to one with another.
        coverage = Coverage(cache.num_blocks, cache.block_size)

        def drafter(served: Served) -> Drafter | None:
            return None if served.drafts is None else Drafter(served.model, cache, sampler, served.drafts, coverage)

        self.drafter = drafter(Served(model, drafts))
        self._adapted = {name: (served.model, drafter(served)) for name, served in (adapters or {}).items()}
        self._adapter_of: dict[str, str] = {}  # of the requests that have one
        self.batches = BatchBuilder(cache.block_size)
        # Prompts still to be scored for `prompt_logprobs`: all their tokens, and how many alternatives.
        self._scored: dict[str, tuple[tuple[int, ...], int]] = {}

    def execute(self, step: StepInput) -> list[SeqOutput]:
        self.release(step.finished)
        for request in step.new:
            self._add(request)
        groups: dict[str | None, list[ScheduledSeq]] = {}
        for seq in step.seqs:
            groups.setdefault(self._adapter_of.get(seq.request_id), []).append(seq)
        outputs: dict[str, SeqOutput] = {}
        with torch.inference_mode():
            for adapter, seqs in groups.items():
                found = self._compute(replace(step, seqs=tuple(seqs)), adapter)
                outputs.update((output.request_id, output) for output in found)
        return [outputs[seq.request_id] for seq in step.seqs]

    def _compute(self, step: StepInput, adapter: str | None) -> list[SeqOutput]:
        """A step, or the part of one, whose sequences all have this adapter or none."""
        started = time.perf_counter()
        model, drafter = (self.model, self.drafter) if adapter is None else self._adapted[adapter]
        drafts = drafter.take(step) if drafter is not None else [()] * len(step.seqs)
        inputs = self.batches.build(step, [[draft.token_id for draft in each] for each in drafts])
        hidden_TH = model(inputs, self.cache)
        scores = [
            self._score(model, seq, hidden_TH[span.row : span.row + len(seq.token_ids)])
            for seq, span in zip(step.seqs, inputs.spans, strict=True)
        ]
        outcomes = self._sample(model, step, inputs, hidden_TH, drafts)
        if drafter is not None:
            drafter.note_verified(step, outcomes, drafts, time.perf_counter() - started)
            drafter.follow(step, inputs, hidden_TH, outcomes)
        return [
            _output(seq, outcome, len(each), score)
            for seq, outcome, each, score in zip(step.seqs, outcomes, drafts, scores, strict=True)
        ]

    def release(self, request_ids: tuple[str, ...]) -> None:
        for request_id in request_ids:
            self.sampler.drop(request_id)
            self.batches.release(request_id)
            self._scored.pop(request_id, None)
            adapter = self._adapter_of.pop(request_id, None)
            drafter = self.drafter if adapter is None else self._adapted[adapter][1]
            if drafter is not None:
                drafter.release(request_id)

    @property
    def paging(self) -> PagingStats | None:
        """What paged experts took; None if all are in memory. Any thread may ask."""
        return None if self.model.pager is None else self.model.pager.stats

    def close(self) -> None:
        self._scored.clear()
        if self.model.pager is not None:
            self.model.pager.close()

    def _add(self, request: NewRequest) -> None:
        if request.adapter is not None:
            self._adapter_of[request.request_id] = request.adapter
        self.sampler.add(request)
        if request.params.prompt_logprobs is not None:
            self._scored[request.request_id] = (request.prompt_token_ids, request.params.prompt_logprobs)

    def _sample(
        self,
        model: Glm,
        step: StepInput,
        inputs: ForwardInput,
        hidden_TH: Tensor,
        drafts: Sequence[tuple[Draft, ...]],
    ) -> list[Verified | None]:
        """What each sequence that samples gets, None for the others."""
        rows: list[int] = []
        candidates: list[Candidate] = []
        for seq, span, each in zip(step.seqs, inputs.spans, drafts, strict=True):
            if seq.samples:
                candidates.append(Candidate(seq.request_id, len(rows), each))
                rows.extend(range(span.row + len(seq.token_ids) - 1, span.row + span.length))
        if not rows:
            return [None] * len(step.seqs)
        sampled_RH = hidden_TH if len(rows) == hidden_TH.shape[0] else hidden_TH[rows]
        found = iter(verify(self.sampler, model.logits(sampled_RH), candidates))
        return [next(found) if seq.samples else None for seq in step.seqs]

    def _score(
        self, model: Glm, seq: ScheduledSeq, hidden_PH: Tensor
    ) -> tuple[TokenLogprobs, ...] | EngineError | None:
        """The logprob of each next prompt token this chunk's positions predict; an error if the logits are broken."""
        wanted = self._scored.get(seq.request_id)
        if wanted is None:
            return None
        prompt, top = wanted
        following = prompt[seq.start + 1 : seq.start + 1 + len(seq.token_ids)]
        found: list[TokenLogprobs] = []
        for first in range(0, len(following), _SCORE_ROWS):
            targets = torch.tensor(following[first : first + _SCORE_ROWS], dtype=torch.int64)
            logits_PV = model.logits(hidden_PH[first : first + len(targets)])
            try:
                found.extend(self.sampler.score(logits_PV, targets, top))
            except EngineError as error:
                return error
        return tuple(found)


def _output(
    seq: ScheduledSeq,
    outcome: Verified | None,
    proposed: int,
    score: tuple[TokenLogprobs, ...] | EngineError | None,
) -> SeqOutput:
    if isinstance(score, EngineError):
        return SeqOutput(seq.request_id, error=score)
    if outcome is None:
        return SeqOutput(seq.request_id, prompt_logprobs=score)
    return SeqOutput(
        seq.request_id,
        token_ids=outcome.token_ids,
        logprobs=outcome.logprobs or None,
        prompt_logprobs=score,
        draft_proposed=proposed,
        draft_accepted=outcome.accepted,
        error=outcome.error,
    )
