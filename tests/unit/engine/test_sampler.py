"""The sampler against a plain twin that follows the definitions, one sorted row at a time in float64."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from freehold.engine.guide import GuideCompiler
from freehold.engine.sampler import Sampled, Sampler, distribution, top_ranked
from freehold.engine.step import NewRequest
from freehold.errors import EngineError, InvalidRequest, MissingExtra
from freehold.model.tokenizer import Tokenizer
from freehold.types import Guide, SamplingParams

VOCAB = 320
EOS = (7,)


def make(params: SamplingParams, *others: SamplingParams, vocab: int = VOCAB, prompt: tuple[int, ...] = ()) -> Sampler:
    """A sampler with requests "0", "1", ..."""
    sampler = Sampler(vocab, EOS, None)
    for number, given in enumerate((params, *others)):
        sampler.add(NewRequest(str(number), prompt, given))
    return sampler


def reference(
    logits: Any, params: SamplingParams, prompt: tuple[int, ...] = (), output: tuple[int, ...] = ()
) -> np.ndarray[Any, Any]:
    """The definition of the sampled distribution, in float64 and without any shortcut."""
    x = np.asarray(logits, dtype=np.float64).copy()
    if len(output) < params.min_tokens:
        for token in {*EOS, *params.stop_token_ids}:
            x[token] = -np.inf
    for token, bias in params.logit_bias.items():
        x[token] += bias
    for token in {*prompt, *output}:
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    for token, count in Counter(output).items():
        x[token] -= params.frequency_penalty * count + params.presence_penalty
    ranking = sorted(range(len(x)), key=lambda token: (-x[token], token))
    if params.temperature == 0:
        return np.eye(len(x))[ranking[0]]
    p = np.exp((x - x.max()) / params.temperature)
    p /= p.sum()
    kept = [token for token in ranking if p[token] >= params.min_p * p.max() and p[token] > 0]
    if params.top_k > 0:
        kept = kept[: params.top_k]
    whole, mass, nucleus = sum(p[token] for token in kept), 0.0, []
    for token in kept:
        if params.top_p < 1 and mass >= (params.top_p - 1e-6) * whole:
            break
        nucleus.append(token)
        mass += p[token]
    result = np.zeros_like(p)
    result[nucleus] = p[nucleus] / mass
    return result


def logits_like_a_model(rows: int, vocab: int = VOCAB, seed: int = 0) -> torch.Tensor:
    """Peaked rows with many exact ties, as bfloat16 makes them."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, vocab, generator=generator) * 3).bfloat16()


FILTERS = [
    SamplingParams(),
    SamplingParams(temperature=0.6),
    SamplingParams(temperature=1.7, top_k=5),
    SamplingParams(top_k=VOCAB),
    SamplingParams(top_p=0.9),
    SamplingParams(temperature=5.0, top_p=0.95),
    SamplingParams(top_p=0.95, top_k=40),
    SamplingParams(min_p=0.1),
    SamplingParams(min_p=0.02, top_k=20, top_p=0.8, temperature=1.3),
    SamplingParams(logit_bias={3: 4.0, 5: -100.0}, top_p=0.99),
    SamplingParams(repetition_penalty=1.4, frequency_penalty=0.3, presence_penalty=-0.5),
    SamplingParams(min_tokens=3, stop_token_ids=(11,)),
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.0, repetition_penalty=3.0),
]


@pytest.mark.parametrize("params", FILTERS, ids=repr)
def test_distribution_is_the_definition(params: SamplingParams) -> None:
    prompt, output = (1, 2, 3, 1), (4, 5, 4, 2)
    for logits in logits_like_a_model(8):
        sampler = make(params, prompt=prompt)
        for token in output:
            sampler.state("0").observe(token)
        expected = reference(logits.float(), params, prompt, output)
        got = distribution(logits, sampler.state("0")).numpy()
        assert set(np.flatnonzero(got)) == set(np.flatnonzero(expected))
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("which", range(9))
def test_samples_follow_the_distribution(which: int) -> None:
    draws, vocab = 20_000, 320  # five blocks of the two-level draw
    seed = 1234 if which % 2 else None
    params = replace(FILTERS[which], seed=seed, top_k=min(FILTERS[which].top_k, 8))
    sampler = make(params, vocab=vocab)
    sampler._random.seed(99)  # unseeded requests draw from the system's entropy: a test must not
    logits = logits_like_a_model(1, vocab, seed=5)
    batch = logits.expand(200, vocab).contiguous()
    counts = np.zeros(vocab)
    for _ in range(draws // 200):
        for sampled in sampler.sample(batch, ["0"] * 200):
            counts[sampled.token_id] += 1
    expected = reference(logits[0].float(), params) * draws
    assert not counts[expected == 0].any()
    assert chi_square_is_plausible(counts, expected)


def test_the_chi_square_check_can_fail() -> None:
    expected = np.full(10, 2000.0)
    assert not chi_square_is_plausible(np.array([2300.0, 1700.0] + [2000.0] * 8), expected)


def chi_square_is_plausible(counts: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> bool:
    """Pearson's test at about one in a million (Wilson-Hilferty), rare tokens pooled."""
    common = expected >= 5
    observed = [*counts[common], counts[~common].sum()]
    wanted = [*expected[common], expected[~common].sum()]
    pairs = [(o, e) for o, e in zip(observed, wanted, strict=True) if e > 0]
    freedom = len(pairs) - 1
    if freedom == 0:
        return True
    statistic = sum((o - e) ** 2 / e for o, e in pairs)
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return z < 4.75


@pytest.mark.parametrize("vocab", [64, 320, 1000, 4099, 8192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_takes_the_lowest_id_of_equals(vocab: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randint(-3, 4, (40, vocab), generator=generator).to(dtype)  # ties everywhere
    sampler = make(*[SamplingParams(temperature=0.0)] * 40, vocab=vocab)
    ids = [str(row) for row in range(40)]
    expected = [row.index(max(row)) for row in logits.tolist()]
    assert [s.token_id for s in sampler.sample(logits, ids)] == expected
    assert [sampler.sample(logits[r : r + 1], [ids[r]])[0].token_id for r in range(40)] == expected


@pytest.mark.parametrize(
    "params", [SamplingParams(top_k=1), SamplingParams(top_p=1e-9), SamplingParams(temperature=1e-6)]
)
def test_degenerate_filters_are_greedy(params: SamplingParams) -> None:
    logits = torch.tensor([[1.0, 5.0, 5.0, 2.0] * 8])
    assert {make(params, vocab=32).sample(logits, ["0"])[0].token_id for _ in range(20)} == {1}


@pytest.mark.parametrize("vocab", [320, 4099, 8192])
@pytest.mark.parametrize(
    "params",
    [SamplingParams(seed=3), SamplingParams(seed=3, top_p=0.9), SamplingParams(seed=3, min_tokens=4)],
    ids=repr,
)
def test_a_seed_decides_in_any_batch(params: SamplingParams, vocab: int) -> None:
    logits = logits_like_a_model(33, vocab)

    def tokens(company: list[SamplingParams], row: int) -> list[int]:
        sampler = make(params, *company, vocab=vocab)
        order = [*range(1, row + 1), 0, *range(row + 1, len(company) + 1)]
        return [
            sampler.sample(logits[step : step + len(order)], [str(i) for i in order])[row].token_id
            for step in range(row, -1, -1)
        ]

    def alone(row: int) -> list[int]:
        sampler = make(params, vocab=vocab)
        return [sampler.sample(logits[step + row : step + row + 1], ["0"])[0].token_id for step in range(row, -1, -1)]

    company = [SamplingParams(seed=i) for i in range(9)] + [SamplingParams(), SamplingParams(temperature=0, logprobs=1)]
    for row in (0, 4, 11):
        assert tokens(company, row) == alone(row)


@pytest.mark.parametrize("vocab", [64, 320, 4099, 8192])
@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(logit_bias={0: 1.0})], ids=["plain", "row"])
@pytest.mark.parametrize(("uniform", "expected"), [(0.0, 0), (1 - 2**-53, 10)])
def test_the_ends_of_the_random_range_find_tokens_that_can_be(
    vocab: int, params: SamplingParams, uniform: float, expected: int
) -> None:
    class Constant(random.Random):
        def random(self) -> float:
            return uniform

    logits = torch.full((1, vocab), float("-inf"))
    middle = vocab // 2
    logits[0, middle : middle + 11] = torch.randn(11, generator=torch.Generator().manual_seed(0))
    sampler = Sampler(vocab, EOS, None)
    sampler._random = Constant()
    sampler.add(NewRequest("0", (), params))
    assert sampler.sample(logits, ["0"])[0].token_id == middle + expected


def test_seeds_differ_and_unseeded_requests_differ() -> None:
    logits = torch.zeros(64, VOCAB)
    seeded = make(*[SamplingParams(seed=seed) for seed in range(64)])
    unseeded = make(*[SamplingParams()] * 64)
    for sampler in (seeded, unseeded):
        assert len({s.token_id for s in sampler.sample(logits, [str(i) for i in range(64)])}) > 30


def test_logprobs_are_of_the_raw_distribution() -> None:
    logits = logits_like_a_model(3)
    asked = [
        SamplingParams(temperature=0.3, logprobs=2, logit_bias={9: 100.0}),
        SamplingParams(temperature=0.0, logprobs=0),
        SamplingParams(logprobs=5, top_k=3),
    ]
    raw = torch.log_softmax(logits.double(), dim=-1)
    for row, sampled in enumerate(make(*asked).sample(logits, ["0", "1", "2"])):
        found = sampled.logprobs
        assert found is not None
        assert found.token_id == sampled.token_id
        assert found.logprob == pytest.approx(raw[row, sampled.token_id].item(), abs=1e-5)
        assert found.rank == 1 + int((raw[row] > raw[row, sampled.token_id]).sum())
        ranking = sorted(range(VOCAB), key=lambda token: (-raw[row, token].item(), token))
        assert [token for token, _ in found.top] == ranking[: asked[row].logprobs or 0]
    assert make(*asked).sample(logits, ["0", "1", "2"])[0].token_id == 9  # the bias chose, and the logprob says how odd


@pytest.mark.parametrize("top", [0, 1, 7, 64])
def test_score_ranks_given_tokens(top: int) -> None:
    logits = torch.randint(-4, 4, (9, 64)).bfloat16()  # ties across every cut
    given = torch.arange(9) * 7
    scores = make(SamplingParams(), vocab=64).score(logits, given, top)
    raw = torch.log_softmax(logits.double(), dim=-1)
    for row, score in enumerate(scores):
        ranking = sorted(range(64), key=lambda token: (-raw[row, token].item(), token))
        assert score.token_id == row * 7
        assert score.logprob == pytest.approx(raw[row, row * 7].item(), abs=1e-5)
        assert score.rank == 1 + int((raw[row] > raw[row, row * 7]).sum())
        assert [token for token, _ in score.top] == ranking[:top]
        assert [logprob for _, logprob in score.top] == pytest.approx(
            [raw[row, t].item() for t in ranking[:top]], abs=1e-5
        )


def test_score_of_many_rows_equals_score_of_each() -> None:
    vocab = 8192
    sampler = make(SamplingParams(), vocab=vocab)
    logits, given = logits_like_a_model(70, vocab), torch.randint(0, vocab, (70,))
    together = sampler.score(logits, given, 3)
    assert together == [sampler.score(logits[i : i + 1], given[i : i + 1], 3)[0] for i in range(70)]


def test_top_ranked_orders_ties_by_id() -> None:
    values, ids = top_ranked(torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0], [0.0] * 5]), 2)
    assert ids.tolist() == [[1, 2], [0, 1]]
    assert values.tolist() == [[2.0, 2.0], [0.0, 0.0]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "params", [SamplingParams(temperature=0.0), SamplingParams(), SamplingParams(top_p=0.9, logprobs=1)], ids=repr
)
@pytest.mark.parametrize("vocab", [320, 8192])
def test_broken_logits_fail_their_request_only(bad: float, params: SamplingParams, vocab: int) -> None:
    logits = logits_like_a_model(5, vocab)
    logits[2, vocab - 3] = bad
    sampled = make(*[params] * 5, vocab=vocab).sample(logits, [str(i) for i in range(5)])
    assert isinstance(sampled[2].error, EngineError)
    assert "request 2" in str(sampled[2].error)
    assert sampled[2] == Sampled(-1, None, sampled[2].error)
    assert [s.error for i, s in enumerate(sampled) if i != 2] == [None] * 4


@pytest.mark.parametrize("penalty", [1e-39, 1e-300])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_penalty_that_overflows_fails_its_request_only(penalty: float, temperature: float) -> None:
    extreme = SamplingParams(repetition_penalty=penalty, temperature=temperature)
    sampler = make(extreme, SamplingParams(temperature=0.0), prompt=(1, 2, 3))
    logits = logits_like_a_model(2)
    logits[0, 1] = 3.0  # divided by the penalty, more than float32 holds
    failed, fine = sampler.sample(logits, ["0", "1"])
    assert isinstance(failed.error, InvalidRequest)
    assert failed.error.param == "repetition_penalty"
    assert fine.token_id == int(logits[1].float().argmax())


def test_a_defect_in_one_row_is_that_requests_error(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = make(SamplingParams(top_k=5), SamplingParams(temperature=0.0))

    def defective(row_V: Any) -> None:
        raise IndexError("not foreseen")

    monkeypatch.setattr(type(sampler.state("0")), "edit", lambda self, row_V: defective(row_V))
    failed, fine = sampler.sample(logits_like_a_model(2), ["0", "1"])
    assert isinstance(failed.error, EngineError)
    assert fine.error is None


def test_score_of_broken_logits_is_an_error() -> None:
    logits = torch.zeros(4, VOCAB)
    logits[3, 5] = float("nan")
    with pytest.raises(EngineError, match="position 3 of 4"):
        make(SamplingParams()).score(logits, torch.zeros(4, dtype=torch.int64), 0)


def test_a_masked_token_of_the_model_is_no_error() -> None:
    logits = torch.full((2, VOCAB), float("-inf"))
    logits[0, 3] = 0.0
    for params in (SamplingParams(temperature=0.0), SamplingParams(), SamplingParams(top_p=0.5)):
        only, none = make(params, params).sample(logits, ["0", "1"])
        assert only.token_id == 3
        assert isinstance(none.error, EngineError)


def test_min_tokens_bans_the_end_until_reached() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 7], logits[0, 11], logits[0, 5] = 9.0, 8.0, 7.0
    sampler = make(SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=(11,), ignore_eos=True))
    assert [sampler.sample(logits, ["0"])[0].token_id for _ in range(4)] == [5, 5, 7, 7]


def test_state_survives_until_dropped() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 5], logits[0, 6] = 2.0, 1.5
    sampler = make(SamplingParams(temperature=0.0, frequency_penalty=1.0))
    assert [sampler.sample(logits, ["0"])[0].token_id for _ in range(3)] == [5, 6, 5]
    sampler.drop("0")
    sampler.drop("0")
    with pytest.raises(KeyError):
        sampler.state("0")


def test_logits_are_left_as_they_are() -> None:
    logits = logits_like_a_model(4).float()
    before = logits.clone()
    make(*FILTERS[6:10]).sample(logits, ["0", "1", "2", "3"])
    assert torch.equal(logits, before)


def test_a_guide_masks_and_ends_the_text() -> None:
    tokenizer = Tokenizer.toy(VOCAB)
    eos = tuple(tokenizer.special_id(text) or 0 for text in ("<|endoftext|>", "<|user|>"))
    sampler = Sampler(VOCAB, eos, GuideCompiler(tokenizer, eos))
    schema = {"type": "array", "items": {"enum": ["ab", 1]}, "minItems": 2, "maxItems": 2}
    guide = Guide("json_schema", schema=schema)
    sampler.add(NewRequest("g", (), SamplingParams(guide=guide, temperature=0.0, logprobs=0)))
    sampler.add(NewRequest("free", (), SamplingParams(temperature=0.0)))
    logits = torch.zeros(2, VOCAB)
    (wanted,) = tokenizer.encode("z")
    logits[:, wanted] = 50.0  # what the model would rather say
    tokens = []
    while not tokens or tokens[-1] not in eos:
        guided, free = sampler.sample(logits, ["g", "free"])
        assert guided.error is None
        assert guided.logprobs is not None
        assert guided.logprobs.logprob < -40  # raw: the guide forced what the model finds odd
        assert free.token_id == wanted
        tokens.append(guided.token_id)
        assert len(tokens) < 100
    values = json.loads(tokenizer.decode(tokens[:-1]))
    assert len(values) == 2
    assert set(values) <= {"ab", 1}


def test_a_guide_that_cannot_be_met_fails_its_request_only() -> None:
    tokenizer = Tokenizer.toy(VOCAB)
    eos = (tokenizer.special_id("<|endoftext|>") or 0,)
    sampler = Sampler(VOCAB, eos, GuideCompiler(tokenizer, eos))
    sampler.add(NewRequest("bad", (), SamplingParams(guide=Guide("json_schema", schema={"type": "nonsense"}))))
    short = Guide("json_schema", schema={"const": 1})
    sampler.add(NewRequest("short", (), SamplingParams(guide=short, temperature=0.0, min_tokens=9)))
    sampler.add(NewRequest("free", (), SamplingParams(temperature=0.0)))
    ids = ["bad", "short", "free"]
    bad, first, free = sampler.sample(torch.zeros(3, VOCAB), ids)
    assert isinstance(bad.error, InvalidRequest)
    assert (first.token_id, first.error, free.error) == (tokenizer.encode("1")[0], None, None)
    _, second, free = sampler.sample(torch.zeros(3, VOCAB), ids)
    assert isinstance(second.error, InvalidRequest)
    assert second.error.param == "min_tokens"
    assert free.error is None


def test_a_guide_without_llguidance_says_what_to_install() -> None:
    sampler = make(SamplingParams(guide=Guide("json_object")))
    (sampled,) = sampler.sample(torch.zeros(1, VOCAB), ["0"])
    assert isinstance(sampled.error, MissingExtra)
