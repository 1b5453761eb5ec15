"""Drafting with the MTP layer never changes what greedy decoding gives, and does save steps."""

from __future__ import annotations

import random

import pytest

from tests.drafting import WORDS, draftable, greedy, new_engine, run, tokens

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
