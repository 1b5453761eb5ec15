"""Random schedules with drafts on the real model, runner and caches: every request gets what it gets alone, without.

As `test_real_schedules`, on a model whose drafts are right about half the time, with requests of all kinds. Numbers of
drafts change all the time, resting included, so that the MTP layer's cache has gaps.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import settings

from freehold.engine.drafts import Drafter
from freehold.engine.engine import Engine
from freehold.engine.request import Request
from freehold.engine.runner import ModelRunner
from freehold.engine.speculate import Draft
from freehold.engine.step import StepInput
from freehold.types import FinishReason, SamplingParams, TokenChunk
from tests.drafting import WORDS, draftable, new_engine, run, tokens

SCHEDULES = 300 if settings().max_examples >= 1000 else 16
LONGEST = 24
KINDS = {
    "greedy": SamplingParams(temperature=0.0, ignore_eos=True),
    "logprobs": SamplingParams(temperature=0.0, logprobs=2, prompt_logprobs=0, ignore_eos=True),
    "penalised": SamplingParams(temperature=0.0, frequency_penalty=0.4, repetition_penalty=1.1, ignore_eos=True),
    "seeded": SamplingParams(temperature=1.0, seed=3, ignore_eos=True),
    "filtered": SamplingParams(temperature=0.9, seed=4, top_p=0.9, min_p=0.01, ignore_eos=True),
    "stops": SamplingParams(temperature=0.0, stop_token_ids=tuple(range(0, 512, 7)), ignore_eos=True),
}


class AnyNumber:
    """A policy that changes its mind in every step."""

    def __init__(self, seed: int, drafts: int) -> None:
        self.random, self.drafts = random.Random(seed), drafts
        self.resting = 0

    def plan(self, decoding: int, most: int) -> int | None:
        if self.resting:
            self.resting -= 1
            return None
        if self.random.random() < 0.08:
            self.resting = self.random.randint(1, 9)
        return self.random.randint(0, min(most, self.drafts))

    def note_verified(self, outcomes: Iterable[tuple[int, int]]) -> None:
        for proposed, accepted in outcomes:
            assert 0 <= accepted <= proposed

    def note_target(self, decoding: int, drafts: int, seconds: float) -> None:
        assert seconds > 0

    def note_drafting(self, decoding: int, drafts: int, seconds: float) -> None:
        assert seconds > 0


@cache
def prompts() -> tuple[tuple[int, ...], ...]:
    draw = random.Random(0)
    texts = [[draw.randrange(WORDS) for _ in range(60)] for _ in range(3)]
    return tuple(
        (*draw.choice(texts)[: draw.randint(16, 56)], *(draw.randrange(WORDS) for _ in range(4))) for _ in range(8)
    )


@cache
def alone(prompt: int, kind: str) -> tuple[tuple[int, ...], tuple[object, ...], FinishReason | None]:
    """Tokens, logprobs and end of a request on an engine that drafts nothing."""
    params = replace(KINDS[kind], max_tokens=LONGEST)
    chunks = run(new_engine(draftable(8.0), 0, budget=256), [Request("alone", prompts()[prompt], params)])["alone"]
    return tokens(chunks), scores(chunks), chunks[-1].finish_reason


def scores(chunks: Iterable[TokenChunk]) -> tuple[tuple[int, float, int], ...]:
    found = [score for chunk in chunks for score in (chunk.logprobs or ())]
    return tuple((score.token_id, round(score.logprob, 3), score.rank) for score in found)


def new_run(seed: int, draw: random.Random) -> Engine:
    size, drafts = draw.choice([4, 8]), draw.choice([1, 3, 6])
    return new_engine(
        draftable(8.0),
        drafts,
        blocks=-(-draw.randint(90, 150) // size),
        block_size=size,
        seqs=draw.randint(2, 4),
        budget=draw.randint(28, 80),
        policy=AnyNumber(seed, drafts),
    )


def play(seed: int, engine: Engine, draw: random.Random) -> None:
    asked: dict[str, tuple[int, str]] = {}
    found: dict[str, list[TokenChunk]] = {}
    waiting = [(draw.randrange(8), draw.choice(list(KINDS))) for _ in range(draw.randint(4, 6))]
    for _ in range(3000):
        if not (waiting or engine.has_work):
            break
        if waiting and (draw.random() < 0.4 or not engine.has_work):
            name, (prompt, kind) = f"r{len(asked)}", waiting.pop()
            asked[name], found[name] = (prompt, kind), []
            engine.add(Request(name, prompts()[prompt], replace(KINDS[kind], max_tokens=LONGEST)))
        happens = draw.random()
        if happens < 0.02:
            engine.abort(draw.choice(list(asked)))
        elif happens < 0.08:
            engine.scheduler.preempt_youngest()
        elif happens < 0.14:
            engine.scheduler.blocks.evict(draw.randint(1, 4))
        for chunk in engine.step():
            assert chunk.error is None, chunk.error
            found[chunk.request_id].append(chunk)
        engine.check_integrity()
    for name, (prompt, kind) in asked.items():
        expected, expected_scores, end = alone(prompt, kind)
        reason = found[name][-1].finish_reason
        assert reason is not None, "the schedule does not end"
        got = tokens(found[name])
        if reason is FinishReason.ABORT:
            expected, expected_scores, end = expected[: len(got)], expected_scores[: len(got)], reason
        assert (got, reason) == (expected, end), f"seed {seed}, {name}: {kind}"
        assert [s[::2] for s in scores(found[name])] == [s[::2] for s in expected_scores], f"seed {seed}, {name}"  # type: ignore[index]
        usage = found[name][-1].usage
        assert usage.completion_tokens == len(got)
    runner = engine.runner
    assert isinstance(runner, ModelRunner)
    assert runner.drafter is not None
    assert not runner.drafter._proposals
    assert not runner.drafter.coverage._runs, "the drafter was not told of every end"


def test_a_schedule_with_drafts_changes_nothing() -> None:
    preemptions = accepted = hits = 0
    for seed in range(SCHEDULES):
        draw = random.Random(seed)
        engine = new_run(seed, draw)
        play(seed, engine, draw)
        stats = engine.stats()
        preemptions += stats.preemptions
        accepted += stats.draft_accepted
        hits += stats.prefix_hits
        assert sum(stats.draft_accepted_at) == stats.draft_accepted
        assert sum(stats.draft_proposed_at) == stats.draft_proposed
    assert preemptions > SCHEDULES // 4
    assert accepted > SCHEDULES * 8
    assert hits > SCHEDULES * 10


class TrustsDrafts(Drafter):
    """Hands the runner drafts as if all were what the target will say: a wrong engine."""

    def take(self, step: StepInput) -> list[tuple[Draft, ...]]:
        taken = super().take(step)
        likeliest = self.sampler.likeliest
        expected = iter([draft.token_id for each in taken for draft in (*each, each[-1] if each else Draft(0))])

        def trusting(logits_RV: torch.Tensor) -> tuple[list[int], list[float]]:
            ids, best = likeliest(logits_RV)
            return [next(expected, token) if len(ids) > 1 else token for token in ids], best

        self.sampler.likeliest = trusting  # type: ignore[method-assign]
        return taken


def test_an_engine_that_trusts_its_drafts_is_seen() -> None:
    engine = new_engine(draftable(8.0), 3, seqs=1)
    runner = engine.runner
    assert isinstance(runner, ModelRunner)
    assert runner.drafter is not None
    runner.drafter = TrustsDrafts(runner.model, runner.cache, runner.sampler, runner.drafter.policy)
    chunks = run(engine, [Request("a", prompts()[0], replace(KINDS["greedy"], max_tokens=LONGEST))])["a"]
    assert tokens(chunks) != alone(0, "greedy")[0]


@pytest.mark.nightly
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("shares", [True, False], ids=["shared selection", "own index"])
@pytest.mark.parametrize("block_size", [4, 16])
@pytest.mark.parametrize("seqs", [1, 4, 8])
@pytest.mark.parametrize("drafts", [1, 3, 7])
def test_two_hundred_prompts(drafts: int, seqs: int, block_size: int, shares: bool) -> None:
    """Greedy, together, in a cache that is too small for all, so that some are preempted."""
    model, draw = draftable(8.0, shares=shares), random.Random(drafts * seqs)
    asked = [[draw.randrange(WORDS) for _ in range(draw.randint(4, 90))] for _ in range(200)]

    def requests() -> list[Request]:
        return [Request(str(n), prompt, replace(KINDS["greedy"], max_tokens=LONGEST)) for n, prompt in enumerate(asked)]

    plain = run(new_engine(model, 0, seqs=seqs, block_size=block_size, blocks=1600 // block_size), requests())
    engine = new_engine(
        model, drafts, seqs=seqs, block_size=block_size, blocks=(128 + 60 * (seqs - 1)) // block_size, budget=80
    )
    found = run(engine, requests())
    assert {name: tokens(chunks) for name, chunks in found.items()} == {
        name: tokens(chunks) for name, chunks in plain.items()
    }
    stats = engine.stats()
    assert stats.draft_accepted > 1000
    assert stats.preemptions > 0 or seqs == 1
