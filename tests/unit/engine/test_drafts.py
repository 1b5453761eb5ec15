"""Drafting with the MTP layer never changes what greedy decoding gives, and does save steps."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from freehold.engine.coverage import Coverage
from freehold.engine.draft_policy import FixedDrafts
from freehold.engine.drafts import Drafter, most_drafts
from freehold.engine.engine import Engine
from freehold.engine.loading import EngineOptions, build_engine
from freehold.engine.request import Request
from freehold.engine.step import ScheduledSeq
from tests.drafting import WORDS, draftable, drafter_of, greedy, new_engine, run, tokens, write_draftable

DRAW = random.Random(1)
PROMPTS = [[DRAW.randrange(WORDS) for _ in range(DRAW.randint(3, 60))] for _ in range(4)]


@pytest.mark.parametrize("shares", [True, False], ids=["shared selection", "own index"])
@pytest.mark.parametrize("drafts", [1, 3, 6])
def test_greedy_tokens_are_the_same_with_and_without(shares: bool, drafts: int) -> None:
    model = draftable(8.0, shares=shares)
    plain, drafting = new_engine(model, 0), new_engine(model, drafts)
    asked = [greedy(f"r{i}", prompt) for i, prompt in enumerate(PROMPTS)]
    expected = run(plain, asked)
    found = run(drafting, [greedy(f"r{i}", prompt) for i, prompt in enumerate(PROMPTS)])
    assert {name: tokens(chunks) for name, chunks in found.items()} == {
        name: tokens(chunks) for name, chunks in expected.items()
    }
    stats = drafting.stats()
    assert stats.draft_accepted > 5
    assert stats.draft_accepted < stats.draft_proposed
    assert drafting.metrics.steps < plain.metrics.steps


def test_a_small_step_stays_small() -> None:
    """Up to 16 rows every row is summed in one order; drafts must not make a step larger than that."""
    for decoding in range(1, 30):
        assert decoding * (1 + most_drafts(decoding)) <= max(16, decoding)
        for rows in range(decoding, 40):
            drafts = most_drafts(decoding, rows)
            assert rows > 16 or rows + decoding * drafts <= 16
    assert [most_drafts(n) for n in (1, 2, 4, 5, 8, 9)] == [15, 7, 3, 2, 1, 0]
    assert most_drafts(1, 16) == 0
    assert most_drafts(1, 400) == 15, "beside a prompt no step is small"
    assert most_drafts(0) == 0


def proposals(engine: Engine, request: Request) -> dict[int, tuple[int, ...]]:
    """The drafts of a request that decodes alone, by the position of the last token."""
    drafter, found = drafter_of(engine), dict[int, tuple[int, ...]]()
    engine.add(request)
    while engine.has_work:
        engine.step()
        for proposal in drafter._proposals.values():
            found[proposal.position] = tuple(draft.token_id for draft in proposal.drafts)
    return found


@pytest.mark.parametrize("shares", [True, False], ids=["shared selection", "own index"])
def test_drafts_do_not_depend_on_chunks_or_a_prefix_that_was_cached(shares: bool) -> None:
    """The layer sees the whole prompt, however it was computed."""
    model, prompt = draftable(8.0, shares=shares), [DRAW.randrange(WORDS) for _ in range(61)]
    whole = proposals(new_engine(model, 3, budget=256), greedy("a", prompt))
    assert len(whole) > 8
    for budget in (8, 23):
        assert proposals(new_engine(model, 3, budget=budget), greedy("a", prompt)) == whole
    engine = new_engine(model, 3)
    run(engine, [greedy("first", prompt, 4)])
    again = proposals(engine, greedy("again", prompt))
    assert engine.stats().prefix_hits == 56
    assert again == whole
    preempted = new_engine(model, 3, prefix_cache=False)
    preempted.add(greedy("a", prompt))
    for _ in range(6):
        preempted.step()
    preempted.scheduler.preempt_youngest()
    later = proposals(preempted, greedy("b", prompt))
    assert set(later.items()) <= set(whole.items()) or later == whole


def test_what_others_left_in_a_block_is_never_seen() -> None:
    """Drafting begins in the middle of a prompt whose first part the layer did not compute: all that lies there is
    poison, and drafts come all the same."""
    model, prompt = draftable(8.0), [DRAW.randrange(WORDS) for _ in range(45)]
    engine = new_engine(model, 3, budget=13, policy=(policy := Switched()))
    drafter = drafter_of(engine)
    poison(drafter)
    engine.add(greedy("a", prompt))
    policy.drafts = None
    engine.step()
    engine.step()
    policy.drafts = 3
    found = dict[int, tuple[int, ...]]()
    while engine.has_work:
        engine.step()
        found |= {p.position: tuple(d.token_id for d in p.drafts) for p in drafter._proposals.values()}
    assert len(found) > 5
    assert all(found[position] for position in sorted(found)[:-1]), "a draft was made from poison"
    wrong = new_engine(model, 3, budget=13, policy=(policy := Switched()))
    drafter = drafter_of(wrong)
    drafter.coverage = SeesEverything(drafter.cache.num_blocks, drafter.cache.block_size)
    poison(drafter)
    wrong.add(greedy("a", prompt))
    policy.drafts = None
    wrong.step()
    policy.drafts = 3
    while wrong.has_work:
        wrong.step()
        assert not any(proposal.drafts for proposal in drafter._proposals.values())


def poison(drafter: Drafter) -> None:
    """Everything in the MTP layer's caches is NaN, which an indexer likes best."""
    for tensor in (drafter.cache.latent[-1], drafter.cache.index[-1]):
        assert isinstance(tensor, torch.Tensor)
        tensor.fill_(torch.nan)


class Switched(FixedDrafts):
    """Drafts as many as it is told, or rests."""

    drafts: int | None  # type: ignore[assignment]

    def __init__(self) -> None:
        self.drafts = None

    def plan(self, decoding: int, most: int) -> int | None:
        return None if self.drafts is None else min(self.drafts, most)


class SeesEverything(Coverage):
    """Believes that every position has an entry."""

    def base(self, seq: ScheduledSeq) -> tuple[int, int]:
        return 0, 0


def test_resting_computes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = draftable(8.0)
    engine = new_engine(model, 3, policy=Switched())
    calls: list[str] = []
    monkeypatch.setattr(model, "extend_mtp", lambda *args: calls.append("extend"))
    monkeypatch.setattr(model, "draft_mtp", lambda *args: calls.append("draft"))
    chunks = run(engine, [greedy("a", PROMPTS[0])])["a"]
    assert len(tokens(chunks)) == 24
    assert not calls


def test_drafts_stop_at_the_requests_limit() -> None:
    engine = new_engine(draftable(8.0), 6)
    chunks = run(engine, [greedy("a", PROMPTS[0], 5)])["a"]
    assert len(tokens(chunks)) == 5
    stats = engine.stats()
    assert stats.draft_proposed <= 4 + 3 + 2 + 1


def test_the_drafts_of_native_kernels_change_no_token(tmp_path: Path) -> None:
    """bf16 and quantised weights: several requests together, each at most 16 rows a step."""
    write_draftable(tmp_path)
    for quantize in (None, "int8"):
        found: list[list[tuple[int, ...]]] = []
        for drafts, seqs in ((0, 1), (3, 4), (7, 2), (1, 8)):
            options = EngineOptions(
                num_draft_tokens=drafts, quantize=quantize, cache_bytes=1 << 22, threads=1, max_num_seqs=seqs,
                max_num_batched_tokens=512,
            )  # fmt: skip
            engine, _ = build_engine(tmp_path, options)
            if drafts:
                drafter_of(engine).policy = FixedDrafts(drafts)
            chunks = run(engine, [greedy(f"r{i}", prompt, 40) for i, prompt in enumerate(PROMPTS)])
            found.append([tokens(each) for each in chunks.values()])
            assert (engine.stats().draft_accepted > 15) == (drafts > 0)
        assert all(other == found[0] for other in found[1:]), quantize
