"""Verification: drafts never change what a request gets, whatever it asks for, and never more than it asked for."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from freehold.engine.guide import GuideCompiler
from freehold.engine.sampler import Sampled, Sampler
from freehold.engine.speculate import Candidate, Draft, Verified, verify
from freehold.engine.step import NewRequest
from freehold.model.tokenizer import Tokenizer
from freehold.types import Guide, SamplingParams

TOKENIZER = Tokenizer.toy(1024)
EOS = tuple(TOKENIZER.special_id(text) or 0 for text in ("<|endoftext|>", "<|user|>", "<|observation|>"))
VOCABULARY, COUNT = TOKENIZER.vocab_size, 30
STOP = 17

CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "greedy with logprobs": {"temperature": 0.0, "logprobs": 3},
    "greedy, penalised": {"temperature": 0.0, "frequency_penalty": 0.7, "repetition_penalty": 1.2},
    "greedy, biased": {"temperature": 0.0, "logit_bias": {5: 4.0}, "min_tokens": 9},
    "seeded": {"temperature": 1.0, "seed": 4},
    "seeded, filtered": {"temperature": 0.8, "seed": 5, "top_p": 0.9, "top_k": 40, "logprobs": 0},
    "seeded, penalised": {"temperature": 0.8, "seed": 6, "presence_penalty": 1.0, "min_p": 0.01},
    "stops": {"temperature": 0.0, "stop_token_ids": (STOP,)},
    "guided": {"temperature": 0.0, "guide": Guide("json_object"), "logprobs": 1},
    "guided, seeded": {"temperature": 1.0, "seed": 9, "guide": Guide("json_object")},
}


def logits(position: int) -> torch.Tensor:
    """Peaked, so that a draft has a chance; the end of a sequence comes up now and then."""
    row = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(position)) * 3
    row[list(EOS)] = -9.0
    row[EOS[0]] += 23.0 if position % 13 == 12 else 0.0
    row[STOP] += 14.0 if position % 11 == 10 else 0.0
    return row


def new_sampler(params: SamplingParams, name: str = "a") -> Sampler:
    sampler = Sampler(VOCABULARY, EOS, GuideCompiler(TOKENIZER, EOS))
    sampler.add(NewRequest(name, (1, 2, 3), params))
    return sampler


def one_by_one(params: SamplingParams) -> list[Sampled]:
    sampler, found = new_sampler(params), list[Sampled]()
    while len(found) < params.max_tokens:
        (sampled,) = sampler.sample(logits(len(found))[None], ["a"])
        assert sampled.error is None
        found.append(sampled)
        if sampled.token_id in sampler.state("a").ending_ids:
            break
    return found


def drafted(params: SamplingParams, expected: list[Sampled], draw: random.Random, right: float) -> list[Verified]:
    """The same by rounds of up to 4 drafts, each of which is right with that chance."""
    sampler, rounds, at = new_sampler(params), list[Verified](), 0
    while at < len(expected):
        drafts = []
        for n in range(draw.randint(0, 4)):
            is_right = at + n < len(expected) and draw.random() < right
            drafts.append(Draft(expected[at + n].token_id if is_right else draw.randrange(VOCABULARY)))
        rows = torch.stack([logits(at + n) for n in range(len(drafts) + 1)])
        (verified,) = verify(sampler, rows, [Candidate("a", 0, tuple(drafts))])
        assert verified.error is None
        assert len(verified.token_ids) in (verified.accepted, verified.accepted + 1)
        assert sampler.state("a").num_output == at + len(verified.token_ids)
        rounds.append(verified)
        at += len(verified.token_ids)
        assert verified.ended == (at == len(expected))
    return rounds


@pytest.mark.parametrize("right", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("case", CASES)
def test_tokens_and_logprobs_are_those_without_drafts(case: str, right: float) -> None:
    params = SamplingParams(max_tokens=COUNT, **CASES[case])
    expected = one_by_one(params)
    for seed in range(5):
        rounds = drafted(params, expected, random.Random(seed), right)
        assert [token for each in rounds for token in each.token_ids] == [each.token_id for each in expected]
        if params.logprobs is not None:
            assert [score for each in rounds for score in each.logprobs] == [each.logprobs for each in expected]
        else:
            assert not any(each.logprobs for each in rounds)
        if right == 1.0:
            assert sum(each.accepted for each in rounds) >= len(expected) // 3


def test_the_limit_holds_inside_accepted_drafts() -> None:
    for temperature in (0.0, 0.9):
        asked = SamplingParams(max_tokens=3, temperature=temperature, ignore_eos=True, seed=1)
        expected = one_by_one(replace(asked, max_tokens=8))
        drafts = tuple(Draft(each.token_id) for each in expected[:5])
        rows = torch.stack([logits(n) for n in range(6)])
        (verified,) = verify(new_sampler(asked), rows, [Candidate("a", 0, drafts)])
        assert verified.token_ids == tuple(each.token_id for each in expected[:3])
        assert (verified.accepted, verified.ended) == (3, True)


def test_a_broken_row_behind_good_ones_waits_for_its_own_step() -> None:
    for params in (SamplingParams(temperature=0.0), SamplingParams(temperature=0.0, frequency_penalty=0.1)):
        first = int(logits(0).argmax())
        rows = torch.stack([logits(0), torch.full((VOCABULARY,), torch.nan)])
        sampler = new_sampler(replace(params, max_tokens=9))
        (verified,) = verify(sampler, rows, [Candidate("a", 0, (Draft(first),))])
        assert (verified.token_ids, verified.accepted, verified.error) == ((first,), 1, None)
        (again,) = verify(sampler, rows[1:], [Candidate("a", 0)])
        assert "NaN" in str(again.error)
        assert again.token_ids == ()


def test_a_defect_while_a_draft_is_judged_ends_only_its_request(caplog: pytest.LogCaptureFixture) -> None:
    def broken(*_: object) -> tuple[int, bool]:
        raise ValueError("a defect")

    q_V = torch.softmax(logits(0), -1).numpy()
    best = int(q_V.argmax())
    sampler = new_sampler(SamplingParams(max_tokens=9, temperature=1.0))
    sampler.add(NewRequest("greedy", (1,), SamplingParams(max_tokens=9, temperature=0.0)))
    rows = torch.stack([logits(0), logits(1), logits(0), logits(1)])
    candidates = [Candidate("a", 0, (Draft(best, q_V),)), Candidate("greedy", 2, (Draft(best),))]
    failed, fine = verify(sampler, rows, candidates, broken)
    assert str(failed.error) == "request a: sampling failed (ValueError)"
    assert "a defect" in caplog.text
    assert fine.token_ids == (best, int(logits(1).argmax()))


def test_requests_of_all_kinds_are_verified_together() -> None:
    """Each gets what it gets alone, with its rows anywhere among the others'."""
    sampler = Sampler(VOCABULARY, EOS, GuideCompiler(TOKENIZER, EOS))
    candidates, rows, expected = [], [], {}
    for number, (name, case) in enumerate(CASES.items()):
        params = SamplingParams(max_tokens=COUNT, **case)
        sampler.add(NewRequest(name, (1, 2, 3), params))
        expected[name] = one_by_one(params)
        drafts = tuple(Draft(each.token_id) for each in expected[name][: number % 4])
        candidates.append(Candidate(name, len(rows), drafts))
        rows.extend(logits(n) for n in range(len(drafts) + 1))
    sampler.add(NewRequest("random", (1,), SamplingParams(max_tokens=COUNT)))
    q_V = torch.softmax(logits(0), -1).numpy()
    candidates.append(Candidate("random", len(rows), (Draft(int(q_V.argmax()), q_V),)))
    rows.extend([logits(0), logits(1)])
    found = verify(sampler, torch.stack(rows), candidates)
    assert found[-1].accepted == 1, "p is q: always accepted"
    for candidate, verified in zip(candidates[:-1], found, strict=False):
        length = len(verified.token_ids)
        assert length >= min(len(candidate.drafts) + 1, len(expected[candidate.request_id]))
        wanted = expected[candidate.request_id][:length]
        assert verified.token_ids == tuple(each.token_id for each in wanted), candidate.request_id
