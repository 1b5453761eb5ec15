"""Executes engine steps on the model: build the batch, run the layers, take the rows that matter, sample.

One thread calls it; nothing here knows about queues or requests beyond their ids.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from freehold.engine.batch import BatchBuilder
from freehold.engine.sampler import Sampled, Sampler
from freehold.engine.step import NewRequest, ScheduledSeq, SeqOutput, StepInput
from freehold.errors import EngineError
from freehold.model.cache import PagedCache
from freehold.model.glm import Glm
from freehold.model.pager import PagingStats
from freehold.types import TokenLogprobs

# Rows of prompt logits made at once when a prompt is scored: bounds [rows, vocabulary] in memory.
_SCORE_ROWS = 256


class ModelRunner:
    """Implements `step.Runner` on a `Glm` and its cache."""

    def __init__(self, model: Glm, cache: PagedCache, sampler: Sampler) -> None:
        self.model, self.cache, self.sampler = model, cache, sampler
        self.batches = BatchBuilder(cache.block_size)
        # Prompts still to be scored for `prompt_logprobs`: all their tokens, and how many alternatives.
        self._scored: dict[str, tuple[tuple[int, ...], int]] = {}

    def execute(self, step: StepInput) -> list[SeqOutput]:
        self.release(step.finished)
        for request in step.new:
            self._add(request)
        with torch.inference_mode():
            hidden_TH = self.model(self.batches.build(step), self.cache)
            return self._outputs(step, hidden_TH)

    def release(self, request_ids: tuple[str, ...]) -> None:
        for request_id in request_ids:
            self.sampler.drop(request_id)
            self.batches.release(request_id)
            self._scored.pop(request_id, None)

    @property
    def paging(self) -> PagingStats | None:
        """What paged experts took; None if all are in memory. Any thread may ask."""
        return None if self.model.pager is None else self.model.pager.stats

    def close(self) -> None:
        self._scored.clear()
        if self.model.pager is not None:
            self.model.pager.close()

    def _add(self, request: NewRequest) -> None:
        self.sampler.add(request)
        if request.params.prompt_logprobs is not None:
            self._scored[request.request_id] = (request.prompt_token_ids, request.params.prompt_logprobs)

    def _outputs(self, step: StepInput, hidden_TH: Tensor) -> list[SeqOutput]:
        last_rows: list[int] = []
        ids: list[str] = []
        scores: list[tuple[TokenLogprobs, ...] | EngineError | None] = []
        row = 0
        for seq in step.seqs:
            scores.append(self._score(seq, hidden_TH[row : row + len(seq.token_ids)]))
            row += len(seq.token_ids)
            if seq.samples:
                last_rows.append(row - 1)
                ids.append(seq.request_id)
        sampled: Iterator[Sampled] = iter(())
        if ids:
            rows = hidden_TH if len(ids) == hidden_TH.shape[0] else hidden_TH[last_rows]
            sampled = iter(self.sampler.sample(self.model.logits(rows), ids))
        outputs = []
        for seq, score in zip(step.seqs, scores, strict=True):
            token = next(sampled) if seq.samples else None
            if isinstance(score, EngineError):
                outputs.append(SeqOutput(seq.request_id, error=score))
                continue
            if token is None:
                outputs.append(SeqOutput(seq.request_id, prompt_logprobs=score))
                continue
            outputs.append(
                SeqOutput(
                    seq.request_id,
                    token_ids=() if token.error else (token.token_id,),
                    logprobs=None if token.logprobs is None else (token.logprobs,),
                    prompt_logprobs=score,
                    error=token.error,
                )
            )
        return outputs

    def _score(self, seq: ScheduledSeq, hidden_PH: Tensor) -> tuple[TokenLogprobs, ...] | EngineError | None:
        """The logprob of each next prompt token this chunk's positions predict; an error if the logits are broken."""
        wanted = self._scored.get(seq.request_id)
        if wanted is None:
            return None
        prompt, top = wanted
        following = prompt[seq.start + 1 : seq.start + 1 + len(seq.token_ids)]
        found: list[TokenLogprobs] = []
        for first in range(0, len(following), _SCORE_ROWS):
            targets = torch.tensor(following[first : first + _SCORE_ROWS], dtype=torch.int64)
            logits_PV = self.model.logits(hidden_PH[first : first + len(targets)])
            try:
                found.extend(self.sampler.score(logits_PV, targets, top))
            except EngineError as error:
                return error
        return tuple(found)
