"""Verification of drafts: which of them the target accepts, and the token that follows them.

A step computes the target's logits behind the last token of a request and behind each of its drafts. Token by token, in
order, with the state of sampling (penalties, guide, min_tokens) as it is there:

    match   greedy requests, and those with a seed. The token is chosen as it would be without drafts; if it equals the
            draft, the next row is looked at. So drafts change nothing at all, not even what a seed gives.
    reject  the others. A draft y was drawn from a distribution q; the target's is p. It is accepted with probability
            min(1, p(y) / q(y)), else the token is drawn from max(p - q, 0), normalised. Tokens are then distributed
            exactly by p, whatever q is: Leviathan et al. 2023, Chen et al. 2023.

After the last accepted draft one more token comes from the target. p is what `Sampler.sample` draws from, so
temperature, filters, bias, penalties, masks all count; a draft that is rejected never touches any state.

Shapes: R rows of logits, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from freehold.engine.sampler import Sampled, Sampler, sampling_failed
from freehold.engine.sampling_state import Lane, RequestState, Row, broken_logits, draw, probabilities
from freehold.errors import FreeholdError
from freehold.types import TokenLogprobs

Rule = Callable[[Row, Row, int, Callable[[], float]], tuple[int, bool]]
"""(p_V, q_V, draft, source of uniforms) → the token, and whether it is the draft, accepted."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A proposed token. q_V: the distribution it was drawn from; None for a request whose drafts have to match."""

    token_id: int
    q_V: Row | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """A request in a step: its logits are in `row`, and behind its drafts in the rows after it."""

    request_id: str
    row: int
    drafts: tuple[Draft, ...] = ()


@dataclass(slots=True)
class Verified:
    """What a request got: the accepted drafts and one token more, unless one of them ends it.

    logprobs: the target's, one for each token, or () where none were asked for.
    """

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    accepted: int = 0
    ended: bool = False
    error: Exception | None = None


def must_match(state: RequestState) -> bool:
    """Whether this request's tokens are decided by its logits and its seed alone, so that a draft can only match."""
    return state.is_greedy or state.params.seed is not None


def accept_or_resample(p_V: Row, q_V: Row, draft: int, uniform: Callable[[], float]) -> tuple[int, bool]:
    """The rule of speculative sampling. p_V, q_V sum to 1 but for rounding, and q_V[draft] > 0."""
    if uniform() * q_V[draft] < p_V[draft]:
        return draft, True
    rest_V = np.maximum(p_V - q_V, 0.0)
    if not rest_V.any():  # p is q, and rounding alone rejected
        rest_V = p_V
    return draw(rest_V, uniform()), False


def verify(
    sampler: Sampler, logits_RV: Tensor, candidates: Sequence[Candidate], rule: Rule = accept_or_resample
) -> list[Verified]:
    """One or more tokens for each candidate. Never raises for one request's failure."""
    found = [Verified() for _ in candidates]
    drafted = any(candidate.drafts for candidate in candidates)
    greedy = [drafted and sampler.state(candidate.request_id).lane is Lane.GREEDY for candidate in candidates]
    if any(greedy):
        pairs = zip(candidates, found, greedy, strict=True)
        _verify_greedy(sampler, logits_RV, [(candidate, verified) for candidate, verified, own in pairs if own])
    alive = [i for i, done in enumerate(greedy) if not done]
    depth = 0
    while alive:
        going_on: list[int] = []
        sampled = _one_token(sampler, logits_RV, [candidates[i] for i in alive], depth, rule)
        for i, (token, is_draft) in zip(alive, sampled, strict=True):
            if _take(found[i], token, is_draft, sampler.state(candidates[i].request_id)):
                going_on.append(i)
        alive, depth = going_on, depth + 1
    return found


def _verify_greedy(sampler: Sampler, logits_RV: Tensor, pairs: Sequence[tuple[Candidate, Verified]]) -> None:
    """All rows of plain greedy requests at once: their tokens need nothing but the logits."""
    rows = [candidate.row + depth for candidate, _ in pairs for depth in range(len(candidate.drafts) + 1)]
    own_RV = logits_RV if rows == list(range(logits_RV.shape[0])) else logits_RV[rows]
    ids, best = sampler.likeliest(own_RV)
    kept: list[int] = []  # rows of own_RV that give a token, or are broken
    states: list[RequestState] = []
    counts: list[int] = []
    first = 0
    for candidate, _ in pairs:
        state, drafts = sampler.state(candidate.request_id), candidate.drafts
        room = min(len(drafts) + 1, max(1, state.params.max_tokens - state.num_output))
        count = 1
        while count < room:
            token = ids[first + count - 1]
            if token != drafts[count - 1].token_id or token in state.ending_ids:
                break
            if not math.isfinite(best[first + count]):
                break  # what was accepted is handed out first, and the next step meets the broken row again
            count += 1
        kept.extend(range(first, first + count))
        states.extend([state] * count)
        counts.append(count)
        first += len(drafts) + 1
    picks: list[int | Exception] = [
        ids[row] if math.isfinite(best[row]) else broken_logits(state.request_id)
        for row, state in zip(kept, states, strict=True)
    ]
    tokens = iter(sampler.settle(own_RV if len(kept) == len(rows) else own_RV[kept], states, picks))
    for (candidate, found), count in zip(pairs, counts, strict=True):
        own = [next(tokens) for _ in range(count)]
        state, last = sampler.state(candidate.request_id), own[-1]
        if last.error is not None:
            found.error = last.error
            continue
        found.token_ids = tuple(token.token_id for token in own)
        found.logprobs = tuple(token.logprobs for token in own if token.logprobs is not None)
        found.accepted = sum(
            token == draft.token_id for token, draft in zip(found.token_ids, candidate.drafts, strict=False)
        )
        found.ended = last.token_id in state.ending_ids or state.num_output >= state.params.max_tokens


def _take(found: Verified, token: Sampled, is_draft: bool, state: RequestState) -> bool:
    """Add a token; returns whether the row behind it counts."""
    if token.error is not None:
        if not found.token_ids:  # else they are handed out first, and the next step meets the error again
            found.error = token.error
        return False
    found.token_ids += (token.token_id,)
    if token.logprobs is not None:
        found.logprobs += (token.logprobs,)
    found.accepted += is_draft
    found.ended = token.token_id in state.ending_ids or state.num_output >= state.params.max_tokens
    return is_draft and not found.ended


def _one_token(
    sampler: Sampler, logits_RV: Tensor, candidates: Sequence[Candidate], depth: int, rule: Rule
) -> list[tuple[Sampled, bool]]:
    """The token of each candidate behind its first `depth` drafts, and whether it is the draft that was proposed."""
    rows = [candidate.row + depth for candidate in candidates]
    own_RV = logits_RV if rows == list(range(logits_RV.shape[0])) else logits_RV[rows]
    drafts = [candidate.drafts[depth] if depth < len(candidate.drafts) else None for candidate in candidates]
    judged = [n for n, draft in enumerate(drafts) if draft is not None and draft.q_V is not None]
    chosen = [n for n in range(len(candidates)) if n not in judged] if judged else list(range(len(candidates)))
    result: dict[int, tuple[Sampled, bool]] = {}
    if chosen:
        ids = [candidates[n].request_id for n in chosen]
        for n, token in zip(chosen, sampler.sample(own_RV[chosen] if judged else own_RV, ids), strict=True):
            draft = drafts[n]
            result[n] = (token, draft is not None and token.token_id == draft.token_id)
    if judged:
        states = [sampler.state(candidates[n].request_id) for n in judged]
        outcomes = [_judge(own_RV[n], state, drafts[n], rule) for n, state in zip(judged, states, strict=True)]
        tokens = sampler.settle(own_RV[judged], states, [outcome for outcome, _ in outcomes])
        for n, token, (_, accepted) in zip(judged, tokens, outcomes, strict=True):
            result[n] = (token, accepted)
    return [result[n] for n in range(len(candidates))]


def _judge(logits_V: Tensor, state: RequestState, draft: Draft | None, rule: Rule) -> tuple[int | Exception, bool]:
    assert draft is not None
    assert draft.q_V is not None
    row_V = logits_V.to(device="cpu", dtype=torch.float32, copy=True).numpy()
    try:
        state.edit(row_V)
        return rule(probabilities(row_V, state), draft.q_V, draft.token_id, state.uniform)
    except FreeholdError as failure:
        return failure, False
    except Exception as failure:  # a defect here must not end every other request
        return sampling_failed(state.request_id, failure), False
