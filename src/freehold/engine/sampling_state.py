"""How one request turns a row of logits into a distribution over tokens. Torch-free: numpy, one row at a time.

The order of operations, which is vLLM's:
    guide mask → min_tokens → logit bias → repetition, frequency and presence penalties     (`RequestState.edit`)
    → temperature → min-p → top-k → top-p                                                   (`choose`)

The filters keep a prefix of the ranking "most likely first, lowest id first among equals", so that top_k=1 and
top_p→0 are exactly greedy decoding, and a tie never lets an extra token in:
    min-p   tokens with at least min_p times the probability of the most likely one;
    top-k   the first k of what is left;
    top-p   the shortest prefix of what is left that holds at least top_p of its probability.

`Sampler` has faster whole-batch code for requests that need none of this; the twin that checks both is in
tests/unit/engine/test_sampler.py.

Shapes: V vocabulary, C candidates (tokens that can be sampled), N tokens with a penalty.
"""

from __future__ import annotations

import random
from collections import deque
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from freehold.engine.guide import GuideState
from freehold.engine.step import NewRequest
from freehold.errors import EngineError, InvalidRequest
from freehold.types import SamplingParams

Row = NDArray[np.float32]
Ids = NDArray[np.int64]

GREEDY_BELOW = 1e-5  # a smaller temperature is 0: dividing by it would overflow (vLLM's bound)
_BLOCK = 1024
_MASS_SLACK = 1e-6  # float32 probabilities sum to 1 within this: top_p=0.5 of four equal tokens is two, never three

# What to add to eight logits for each value of a mask byte (bit 0 first): 0 where allowed, -inf where not.
_MASKS_OF_BYTE = np.where(
    np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), np.float32(0.0), -np.inf
).astype(np.float32)


class Lane(Enum):
    """The cheapest code that is right for a request."""

    GREEDY = "greedy"  # argmax of the logits as they are
    PLAIN = "plain"  # softmax(logits / temperature), nothing else
    ROW = "row"  # any mask, bias, penalty or filter: row by row, here


class RequestState:
    """What sampling remembers of one request between steps.

    uniform() draws from the request's own generator if it has a seed (so that its tokens do not depend on the
    batch it is in), else from the engine's; peek() looks at a later one. error is why the request cannot be sampled at
    all, if so. ending_ids: the tokens after which nothing follows.
    """

    def __init__(
        self,
        request: NewRequest,
        vocab_size: int,
        end_token_ids: tuple[int, ...],
        shared: random.Random,
        guide: GuideState | None = None,
        error: Exception | None = None,
    ) -> None:
        params = request.params
        self.request_id = request.request_id
        self.params = params
        self.error = error
        self.num_output = 0
        self._vocab_size = vocab_size
        self._guide = guide
        # As text: of a negative number Random would take the absolute value.
        self._random = shared if params.seed is None else random.Random(str(params.seed))
        self._peeked: deque[float] = deque()
        self.ending_ids = frozenset(params.stop_token_ids) | frozenset(() if params.ignore_eos else end_token_ids)
        self._banned_early = self._ids({*end_token_ids, *params.stop_token_ids})  # ignore_eos or not, as vLLM
        biased = {token: bias for token, bias in params.logit_bias.items() if 0 <= token < vocab_size}
        self._bias_ids = np.fromiter(biased, dtype=np.int64, count=len(biased))
        self._bias = np.fromiter(biased.values(), dtype=np.float32, count=len(biased))
        self._penalties: _Penalties | None = None
        if params.repetition_penalty != 1.0 or params.frequency_penalty != 0.0 or params.presence_penalty != 0.0:
            repeats = request.prompt_token_ids if params.repetition_penalty != 1.0 else ()
            self._penalties = _Penalties(params, [token for token in repeats if 0 <= token < vocab_size])
        edited = guide is not None or self._penalties is not None or self._bias_ids.size > 0 or error is not None
        if edited or (has_filter(params, vocab_size) and not self.is_greedy):
            self._settled_lane = Lane.ROW
        else:
            self._settled_lane = Lane.GREEDY if self.is_greedy else Lane.PLAIN

    @property
    def is_greedy(self) -> bool:
        return self.params.temperature < GREEDY_BELOW

    @property
    def lane(self) -> Lane:
        return Lane.ROW if self.num_output < self.params.min_tokens else self._settled_lane

    def uniform(self) -> float:
        """The next random number of this request, in [0, 1)."""
        return self._peeked.popleft() if self._peeked else self._random.random()

    def peek(self, ahead: int) -> float:
        """The random number that the call of `uniform` after `ahead` more will give."""
        while len(self._peeked) <= ahead:
            self._peeked.append(self._random.random())
        return self._peeked[ahead]

    def edit(self, row_V: Row) -> None:
        """Mask, bias and penalise a row of raw logits in place.

        Raises EngineError if the logits are NaN or infinite or the guide is at a dead end, and InvalidRequest if
        min_tokens and the guide contradict each other or the penalties overflow.
        """
        if not np.isfinite(row_V.max()):  # max propagates NaN; -inf for single tokens is a model's own mask
            raise broken_logits(self.request_id)
        if self.error is not None:
            raise self.error
        if self._guide is not None:
            row_V += _MASKS_OF_BYTE[self._guide.fill_mask()].reshape(-1)[: self._vocab_size]
            if row_V.max() == -np.inf:
                raise EngineError(f"request {self.request_id}: no token continues the requested structure")
        if self.num_output < self.params.min_tokens:
            row_V[self._banned_early] = -np.inf
            if row_V.max() == -np.inf:
                raise InvalidRequest(
                    f"min_tokens is {self.params.min_tokens}, but the output can only end after {self.num_output} "
                    "tokens; lower min_tokens",
                    param="min_tokens",
                )
        if self._bias_ids.size:
            row_V[self._bias_ids] += self._bias
        if self._penalties is not None:
            self._penalties.apply(row_V)
            if not np.isfinite(row_V.max()):
                raise InvalidRequest(
                    f"repetition_penalty {self.params.repetition_penalty:g} takes the logits out of float32's range; "
                    "use one nearer to 1",
                    param="repetition_penalty",
                )

    def observe(self, token_id: int) -> None:
        """Take note of a token that became part of the output. Raises EngineError if the guide does not allow it."""
        self.num_output += 1
        if self._penalties is not None:
            self._penalties.count(token_id)
        if self._guide is not None:
            self._guide.accept(token_id)

    def _ids(self, tokens: set[int]) -> Ids:
        return np.array(sorted(token for token in tokens if 0 <= token < self._vocab_size), dtype=np.int64)


class _Penalties:
    """The tokens seen so far and how often each was generated, in arrays that grow."""

    def __init__(self, params: SamplingParams, prompt_token_ids: list[int]) -> None:
        self._params = params
        seen = sorted(set(prompt_token_ids))
        self._slot = {token: slot for slot, token in enumerate(seen)}
        self._ids_N = np.zeros(max(64, 2 * len(seen)), dtype=np.int64)
        self._counts_N = np.zeros(len(self._ids_N), dtype=np.float32)
        self._ids_N[: len(seen)] = seen

    def count(self, token_id: int) -> None:
        slot = self._slot.setdefault(token_id, len(self._slot))
        if slot == len(self._ids_N):
            self._ids_N = np.concatenate((self._ids_N, np.zeros_like(self._ids_N)))
            self._counts_N = np.concatenate((self._counts_N, np.zeros_like(self._counts_N)))
        self._ids_N[slot] = token_id
        self._counts_N[slot] += 1

    def apply(self, row_V: Row) -> None:
        used = len(self._slot)
        ids_N, counts_N = self._ids_N[:used], self._counts_N[:used]
        logits_N = row_V[ids_N]
        if (penalty := self._params.repetition_penalty) != 1.0:
            with np.errstate(over="ignore", divide="ignore", invalid="ignore"):  # `edit` checks what comes out
                logits_N = np.where(logits_N > 0, logits_N / np.float32(penalty), logits_N * np.float32(penalty))
        logits_N -= np.float32(self._params.frequency_penalty) * counts_N
        logits_N -= np.float32(self._params.presence_penalty) * (counts_N > 0)
        row_V[ids_N] = logits_N


def broken_logits(request_id: str) -> EngineError:
    """NaN or infinite logits: a fault of the weights or of a kernel, never of the request."""
    return EngineError(
        f"request {request_id}: the model's logits are NaN or infinite, so no token can be chosen; "
        "check the checkpoint and its dtype (`freehold inspect`)"
    )


def has_filter(params: SamplingParams, vocab_size: int) -> bool:
    return 0 < params.top_k < vocab_size or params.top_p < 1.0 or params.min_p > 0.0


def choose(row_V: Row, state: RequestState) -> int:
    """Draw a token from an edited row, which is used as scratch."""
    if state.is_greedy:
        return int(row_V.argmax())
    ids_C, weights_C = _candidates(row_V, state.params)
    index = draw(weights_C, state.uniform())
    return index if ids_C is None else int(ids_C[index])


def probabilities(row_V: Row, state: RequestState) -> Row:
    """What `choose` draws from: [V], summing to 1 but for rounding. row_V is used as scratch."""
    probabilities_V = np.zeros_like(row_V)
    if state.is_greedy:
        probabilities_V[row_V.argmax()] = 1.0
        return probabilities_V
    ids_C, weights_C = _candidates(row_V, state.params)
    probabilities_V[slice(None) if ids_C is None else ids_C] = weights_C / weights_C.sum()
    return probabilities_V


def _candidates(row_V: Row, params: SamplingParams) -> tuple[Ids | None, Row]:
    """The tokens that can be sampled, by ascending id (None: all), and weights in proportion to their odds.

    Weights sum to at most 1 (and slack), and are positive wherever ids are given.
    """
    row_V -= row_V.max()
    row_V /= np.float32(params.temperature)
    weights_V = np.exp(row_V, out=row_V)
    weights_V /= weights_V.sum()
    if not has_filter(params, len(row_V)):
        return None, weights_V
    ids_C = np.flatnonzero(weights_V >= _floor(weights_V, params))
    weights_C = weights_V[ids_C]
    if 0 < params.top_k < len(ids_C):
        kept = _first(weights_C, params.top_k)
        ids_C, weights_C = ids_C[kept], weights_C[kept]
    if params.top_p < 1.0:
        # Without an earlier cut the floor has dropped only tokens outside the nucleus: the whole has weight 1.
        whole = float(weights_C.sum(dtype=np.float64)) if _cuts_before_top_p(params) else 1.0
        cumulated = np.sort(weights_C)[::-1].cumsum(dtype=np.float64)
        count = int(np.searchsorted(cumulated, whole * (params.top_p - _MASS_SLACK))) + 1
        if count < len(ids_C):
            kept = _first(weights_C, count)
            ids_C, weights_C = ids_C[kept], weights_C[kept]
    return ids_C, weights_C


def draw(weights_C: Row, uniform: float) -> int:
    """The index at which the cumulated weight first exceeds uniform (in [0, 1)) times the total.

    Two levels, blocks first: a running float64 sum over a whole vocabulary costs more than everything else here.
    """
    sums = np.add.reduceat(weights_C, np.arange(0, len(weights_C), _BLOCK), dtype=np.float64)
    ends = sums.cumsum()
    block = int(np.searchsorted(ends, uniform * ends[-1], side="right"))
    rest = (uniform * ends[-1] - (ends[block] - sums[block])) / sums[block]
    within = weights_C[block * _BLOCK : (block + 1) * _BLOCK].cumsum(dtype=np.float64)
    # Rounding must not push the rest to an end that has no weight.
    return block * _BLOCK + int(np.searchsorted(within, min(max(rest, 0.0), 1.0 - 1e-12) * within[-1], side="right"))


def _cuts_before_top_p(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.min_p > 0.0


def _floor(weights_V: Row, params: SamplingParams) -> np.float32:
    """A weight below which no token is kept: min-p's own bound, or one that makes top-p cheap.

    Tokens below (1 - top_p) / V together hold less than 1 - top_p, so the nucleus has none of them; half of that
    leaves room for rounding. On a peaked distribution it spares sorting the tail.
    """
    smallest = np.finfo(np.float32).smallest_subnormal  # a masked token's weight is 0 and never enough
    if _cuts_before_top_p(params):
        return max(np.float32(params.min_p) * weights_V.max(), smallest)
    return max(np.float32(0.5 * (1.0 - params.top_p) / len(weights_V)), smallest)


def _first(weights_C: Row, count: int) -> NDArray[np.bool_]:
    """Mask of the `count` first tokens of the ranking: by weight, lowest index first among equals."""
    last = np.partition(weights_C, len(weights_C) - count)[len(weights_C) - count]
    kept: NDArray[np.bool_] = weights_C > last
    equal = np.flatnonzero(weights_C == last)
    kept[equal[: count - np.count_nonzero(kept)]] = True
    return kept
