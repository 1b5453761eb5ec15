"""Chooses the next tokens of a batch, and scores given ones. The only sampling code that knows torch.

Requests that need no mask, penalty or filter are sampled together in a handful of tensor operations; the others row
by row in `sampling_state`, which is also where the order of operations and the filters are defined. Rows are
processed in slices that stay in the CPU's cache: at a vocabulary of 154,880 that is several times faster than whole
batches, whose temporaries come fresh from the system at each step.

Logprobs are of the model's raw distribution: before temperature, penalties, bias and masks. A logprob can therefore be
low for a token that a guide forced, and always compares with another engine's for the same prompt.

Shapes: R rows (requests), P positions, V vocabulary, B blocks of a row, K tokens of `top`.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from freehold.engine.guide import GuideCompiler, GuideState
from freehold.engine.sampling_state import Lane, RequestState, broken_logits, choose, probabilities
from freehold.engine.step import NewRequest
from freehold.errors import EngineError, FreeholdError, MissingExtra
from freehold.types import TokenLogprobs

logger = logging.getLogger(__name__)

_SLICE_ELEMENTS = 1 << 18  # float32 logits worked on at a time: 1 MiB
_LARGEST_BLOCK = 512


@dataclass(frozen=True, slots=True)
class Sampled:
    """The outcome for one row: a token (with logprobs if asked for), or the failure of this request alone.

    token_id is -1 when error is set.
    """

    token_id: int
    logprobs: TokenLogprobs | None = None
    error: Exception | None = None


class Sampler:
    """Samples batches, remembering per request what a later token depends on. Used from one thread.

    State lives from `add` to `drop` and so survives preemption. Unseeded requests share one generator, seeded by the
    system; a seeded request has its own and gives the same tokens in any batch.
    """

    def __init__(self, vocab_size: int, eos_token_ids: tuple[int, ...], guides: GuideCompiler | None) -> None:
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._guides = guides
        self._states: dict[str, RequestState] = {}
        self._random = random.Random()
        self._block = _block_size(vocab_size)

    def add(self, request: NewRequest) -> None:
        """Start remembering a request. A guide that fails to compile becomes the error of its first sample."""
        guide: GuideState | None = None
        error: Exception | None = None
        if request.params.guide is not None:
            if self._guides is None:
                error = MissingExtra("structured output needs llguidance: pip install 'freehold[engine]'")
            else:
                try:
                    guide = self._guides.compile(request.params.guide)
                except FreeholdError as failure:
                    error = failure
        self._states[request.request_id] = RequestState(
            request, self._vocab_size, self._eos_token_ids, self._random, guide, error
        )

    def drop(self, request_id: str) -> None:
        """Forget a request; an unknown one is no error."""
        self._states.pop(request_id, None)

    def state(self, request_id: str) -> RequestState:
        """What is remembered of a request; with `distribution` and `observe`, what verifying drafts needs."""
        return self._states[request_id]

    def sample(self, logits_RV: Tensor, request_ids: Sequence[str]) -> list[Sampled]:
        """Choose one token for each row and take note of it.

        logits_RV: [R, V], any float dtype, left as it is; row r belongs to request_ids[r], already added.
        Greedy takes the lowest id among equally likely ones. Never raises for one request's failure.
        """
        states = [self._states[request_id] for request_id in request_ids]
        lanes = [state.lane for state in states]
        picks: list[int | Exception] = [0] * len(states)
        for lane, pick in ((Lane.GREEDY, self._greedy), (Lane.PLAIN, self._plain), (Lane.ROW, self._row_by_row)):
            rows = [row for row, its_lane in enumerate(lanes) if its_lane is lane]
            if rows:
                own_RV = logits_RV if len(rows) == len(states) else logits_RV[rows]
                for row, outcome in zip(rows, pick(own_RV, [states[row] for row in rows]), strict=True):
                    picks[row] = outcome
        return self.settle(logits_RV, states, picks)

    def settle(self, logits_RV: Tensor, states: Sequence[RequestState], picks: list[int | Exception]) -> list[Sampled]:
        """Take note of the tokens picked for rows, or of why there are none, and score them where that was asked for.

        A token that its request's guide does not allow becomes that request's error.
        """
        for row, (state, outcome) in enumerate(zip(states, picks, strict=True)):
            if not isinstance(outcome, Exception):
                try:
                    state.observe(outcome)
                except FreeholdError as failure:
                    picks[row] = failure
        logprobs = self._logprobs(logits_RV, states, picks)
        return [
            Sampled(-1, error=outcome) if isinstance(outcome, Exception) else Sampled(outcome, logprobs.get(row))
            for row, outcome in enumerate(picks)
        ]

    def score(self, logits_PV: Tensor, next_token_ids: Tensor, top: int) -> list[TokenLogprobs]:
        """The raw logprob of a given token after each position.

        logits_PV: [P, V], any float dtype; next_token_ids: [P] integers; top: how many of the most likely tokens to
        list (0: none). rank counts the strictly more likely tokens, plus 1. Works on slices of rows, so that float32
        copies of [P, V] never exist. Raises EngineError for NaN or infinite logits.
        """
        scores: list[TokenLogprobs] = []
        step = max(1, _SLICE_ELEMENTS // logits_PV.shape[-1])
        for start in range(0, len(logits_PV), step):
            logprobs_PV = torch.log_softmax(logits_PV[start : start + step], dim=-1, dtype=torch.float32)
            ids_P1 = next_token_ids[start : start + step].to(device=logprobs_PV.device, dtype=torch.int64)[:, None]
            chosen_P1 = logprobs_PV.gather(1, ids_P1)
            ranks_P = (logprobs_PV > chosen_P1).sum(dim=-1) + 1
            values_PK, top_PK = top_ranked(logprobs_PV, min(top, self._vocab_size))
            columns = (ids_P1[:, 0], chosen_P1[:, 0], ranks_P, top_PK, values_PK)
            for token, logprob, rank, best, values in zip(*(column.tolist() for column in columns), strict=True):
                if math.isnan(logprob):
                    raise EngineError(
                        f"the model's logits at position {len(scores)} of {len(logits_PV)} are not finite"
                    )
                scores.append(TokenLogprobs(token, logprob, rank, tuple(zip(best, values, strict=True))))
        return scores

    def likeliest(self, logits_RV: Tensor) -> tuple[list[int], list[float]]:
        """The largest logit of each row: its id, the lowest among equals, and its value (NaN where the row has one)."""
        # amax over short blocks is vectorised and many times faster than max with indices over a row. Both give the
        # first of equal maxima, and both let NaN through as the maximum.
        num_rows, vocab_size = logits_RV.shape
        if vocab_size == self._block or logits_RV.numel() <= 1 << 15:
            best_R, ids_R = logits_RV.max(dim=-1)
        else:
            blocks_RBb = logits_RV.reshape(num_rows, -1, self._block)
            best_R, block_R = blocks_RBb.amax(dim=-1).max(dim=-1)
            within_R = blocks_RBb[torch.arange(num_rows, device=logits_RV.device), block_R].argmax(dim=-1)
            ids_R = block_R * self._block + within_R
        return ids_R.tolist(), best_R.tolist()

    def _greedy(self, logits_RV: Tensor, states: list[RequestState]) -> list[int | Exception]:
        ids, best = self.likeliest(logits_RV)
        return [
            token if math.isfinite(value) else broken_logits(state.request_id)
            for token, value, state in zip(ids, best, states, strict=True)
        ]

    def _plain(self, logits_RV: Tensor, states: list[RequestState]) -> list[int | Exception]:
        picks: list[int | Exception] = []
        step = max(1, _SLICE_ELEMENTS // logits_RV.shape[-1])
        for start in range(0, len(states), step):
            own = states[start : start + step]
            temperatures_R1 = torch.tensor([[state.params.temperature] for state in own], dtype=torch.float32)
            uniforms_R1 = torch.tensor([[state.uniform()] for state in own], dtype=torch.float64)
            # bf16 / float32 is float32
            scaled_RV = torch.div(logits_RV[start : start + step], temperatures_R1.to(logits_RV.device))
            ids_R, totals_R = self._draw(torch.softmax(scaled_RV, dim=-1), uniforms_R1.to(logits_RV.device))
            for token, total, state in zip(ids_R.tolist(), totals_R.tolist(), own, strict=True):
                picks.append(token if math.isfinite(total) else broken_logits(state.request_id))
        return picks

    def _draw(self, weights_RV: Tensor, uniforms_R1: Tensor) -> tuple[Tensor, Tensor]:
        """Invert the cumulated distribution of each row at its uniform: ids [R], and the totals [R] to check.

        First the block, then the token within it: a running float64 sum over the whole row would cost more than the
        softmax. Per row the same arithmetic in any batch, so that a seed decides the token.
        """
        rows_R = torch.arange(len(weights_RV), device=weights_RV.device)
        blocks_RBb = weights_RV.view(len(weights_RV), -1, self._block)
        sums_RB = blocks_RBb.sum(dim=-1).double()
        ends_RB = sums_RB.cumsum(dim=-1)
        totals_R = ends_RB[:, -1]
        block_R1 = _first_above(ends_RB, uniforms_R1)
        starts_R1 = ends_RB.gather(1, block_R1) - sums_RB.gather(1, block_R1)
        # What is left of the uniform within the block; rounding must not push it to an end that has no weight.
        rest_R1 = (uniforms_R1 * totals_R[:, None] - starts_R1) / sums_RB.gather(1, block_R1)
        within_Rb = blocks_RBb[rows_R, block_R1[:, 0]].double().cumsum(dim=-1)
        within_R1 = _first_above(within_Rb, rest_R1.clamp(0.0, 1.0 - 1e-12))
        return (block_R1 * self._block + within_R1)[:, 0], totals_R

    def _row_by_row(self, logits_RV: Tensor, states: list[RequestState]) -> list[int | Exception]:
        picks: list[int | Exception] = []
        for logits_V, state in zip(logits_RV, states, strict=True):
            row_V = logits_V.to(device="cpu", dtype=torch.float32, copy=True).numpy()
            try:
                state.edit(row_V)
                picks.append(choose(row_V, state))
            except FreeholdError as failure:
                picks.append(failure)
            except Exception as failure:  # a defect here must not end every other request
                picks.append(sampling_failed(state.request_id, failure))
        return picks

    def _logprobs(
        self, logits_RV: Tensor, states: Sequence[RequestState], picks: list[int | Exception]
    ) -> dict[int, TokenLogprobs]:
        wanted = {
            row: (state.params.logprobs, token)
            for row, (state, token) in enumerate(zip(states, picks, strict=True))
            if state.params.logprobs is not None and not isinstance(token, Exception)
        }
        if not wanted:
            return {}
        most = max(top for top, _ in wanted.values())
        ids = torch.tensor([token for _, token in wanted.values()])
        scores = self.score(logits_RV[list(wanted)], ids, most)
        return {
            row: TokenLogprobs(score.token_id, score.logprob, score.rank, score.top[:top])
            for (row, (top, _)), score in zip(wanted.items(), scores, strict=True)
        }


def distribution(logits_V: Tensor, state: RequestState) -> Tensor:
    """The exact distribution that `sample` draws a request's next token from: [V] float32, summing to 1.

    logits_V: [V] raw logits, left as they are. Greedy is all on one token. Raises as `RequestState.edit`.
    This is the target distribution that speculative verification accepts drafts against; call `state.observe` with
    each accepted token before asking for the next one's.
    """
    row_V = logits_V.to(device="cpu", dtype=torch.float32, copy=True).numpy()
    state.edit(row_V)
    return torch.from_numpy(probabilities(row_V, state)).to(logits_V.device)


def top_ranked(values_RV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row, largest first and lowest index first among equals: values and ids [R, count].

    `torch.topk` leaves the order of equals open, and which of them make the cut; bfloat16 logits have many.
    """
    width = values_RV.shape[-1]
    values_RK, ids_RK = values_RV.topk(min(count + 1, width), dim=-1)
    ids_RK, by_id = ids_RK.sort(dim=-1)
    values_RK, by_value = values_RK.gather(1, by_id).sort(dim=-1, descending=True, stable=True)
    ids_RK = ids_RK.gather(1, by_value)
    if 0 < count < width:
        for row in (values_RK[:, count - 1] == values_RK[:, count]).nonzero()[:, 0].tolist():
            last = values_RK[row, count - 1]
            above = int((values_RK[row] > last).sum())
            ids_RK[row, above:count] = (values_RV[row] == last).nonzero()[: count - above, 0]
    return values_RK[:, :count], ids_RK[:, :count]


def _first_above(ends_RN: Tensor, fractions_R1: Tensor) -> Tensor:
    """[R, 1] index of the first cumulated weight above a fraction of the row's total (clamped, for rows of NaN)."""
    indices_R1 = torch.searchsorted(ends_RN, fractions_R1 * ends_RN[:, -1:], right=True)
    return indices_R1.clamp(max=ends_RN.shape[-1] - 1)


def _block_size(vocab_size: int) -> int:
    """The largest power of two up to 512 that divides the vocabulary, or all of it where that would be tiny."""
    block = math.gcd(vocab_size, _LARGEST_BLOCK)
    return block if block >= 32 else vocab_size


def sampling_failed(request_id: str, failure: Exception) -> EngineError:
    """What a request ends with when its sampling raised what it should not have. Logs the failure."""
    logger.error("sampling for request %s failed", request_id, exc_info=failure)
    return EngineError(f"request {request_id}: sampling failed ({type(failure).__name__})")
