"""Sampling over random parameters: supports by definition, weights in proportion, and the same from every code path."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from freehold.engine.sampler import Sampler, distribution, top_ranked
from freehold.engine.step import NewRequest
from freehold.types import SamplingParams

EOS = (2,)


@st.composite
def rows(draw: st.DrawFn) -> np.ndarray[Any, Any]:
    """A row of logits: few distinct values (many ties), or as a model's, or nearly flat, or nearly one token."""
    size = draw(st.sampled_from([8, 33, 64, 257]))
    kind = draw(st.sampled_from(["tied", "normal", "flat", "peaked", "masked"]))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    if kind == "tied":
        return random.integers(-2, 3, size).astype(np.float32)
    row = random.normal(size=size).astype(np.float32) * {"flat": 1e-3, "peaked": 30.0}.get(kind, 3.0)
    if kind == "masked":
        row[random.random(size) < 0.5] = -np.inf
        row[int(random.integers(size))] = 0.0
    return row


def tokens(size: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, size - 1), max_size=12)


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray[Any, Any], SamplingParams, list[int], list[int]]:
    row = draw(rows())
    size = len(row)
    params = SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.1, 0.7, 1.0, 2.0])),
        top_p=draw(st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.1, 1e-6])),
        top_k=draw(st.sampled_from([-1, 0, 1, 2, 7, 50, 1000])),
        min_p=draw(st.sampled_from([0.0, 1e-4, 0.05, 0.5, 1.0])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.5, -2.0])),
        presence_penalty=draw(st.sampled_from([0.0, 1.0, -0.3])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3, 0.8])),
        logit_bias=draw(st.dictionaries(st.integers(0, size - 1), st.floats(-5, 5, width=32), max_size=4)),
        min_tokens=draw(st.sampled_from([0, 3])),
        stop_token_ids=tuple(draw(st.lists(st.integers(3, size - 1), max_size=2))),
        seed=draw(st.integers(-(2**63), 2**63 - 1)),
    )
    return row, params, draw(tokens(size)), draw(tokens(size))


def edited(row: np.ndarray[Any, Any], params: SamplingParams, prompt: list[int], output: list[int]) -> Any:
    x = row.astype(np.float64)
    if len(output) < params.min_tokens:
        x[[*EOS, *params.stop_token_ids]] = -np.inf
    for token, bias in params.logit_bias.items():
        x[token] += bias
    for token in {*prompt, *output}:
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    for token, count in Counter(output).items():
        x[token] -= params.frequency_penalty * count + params.presence_penalty
    return x


@given(cases())
@settings(deadline=None)
def test_the_support_is_a_prefix_of_the_ranking_and_as_long_as_it_must_be(case: Any) -> None:
    row, params, prompt, output = case
    x = edited(row, params, prompt, output)
    assume(np.isfinite(x.max()))
    sampler = Sampler(len(row), EOS, None)
    sampler.add(NewRequest("r", tuple(prompt), params))
    for token in output:
        sampler.state("r").observe(token)
    got = distribution(torch.from_numpy(row), sampler.state("r")).numpy().astype(np.float64)
    support = np.flatnonzero(got)
    assert abs(got.sum() - 1) < 1e-5
    if params.temperature == 0:
        assert len(support) == 1
        assert x[support[0]] >= x.max() - 1e-4
        return
    p = np.exp((x - x.max()) / params.temperature)
    p /= p.sum()
    slack = 1 + 2e-4  # float32 against float64, at the largest logits
    # A prefix of the ranking: nobody outside is clearly more likely than somebody inside.
    outside = np.setdiff1d(np.arange(len(p)), support)
    assert not len(outside) or p[outside].max() <= p[support].min() * slack
    # As short as asked.
    assert params.top_k <= 0 or len(support) <= params.top_k
    assert p[support].min() * slack >= params.min_p * p.max()
    # No shorter than asked: the next token would be refused by one of the filters.
    candidates = p >= params.min_p * p.max() * slack
    if params.top_k > 0:
        candidates &= p >= np.sort(p)[-min(params.top_k, len(p))] * slack
    whole = p[candidates].sum()
    assert p[support].sum() >= params.top_p * whole * (1 - 1e-4) - 1e-5
    if params.top_p == 1.0:
        missing = [token for token in np.flatnonzero(candidates) if token not in support and p[token] > 1e-38]
        assert missing == []
    else:
        last = p[support].min()
        assert p[support].sum() - last <= params.top_p * (p[support].sum() + p[outside].sum()) * (1 + 1e-4) + 1e-5
    # In proportion.
    np.testing.assert_allclose(got[support], p[support] / p[support].sum(), rtol=1e-3, atol=1e-6)


@given(cases(), st.integers(1, 6))
@settings(deadline=None)
def test_sampling_stays_in_the_support_and_does_not_depend_on_company(case: Any, company: int) -> None:
    row, params, prompt, output = case
    assume(np.isfinite(edited(row, params, prompt, output).max()))
    size = len(row)

    def sampler_with(extra: int) -> Sampler:
        sampler = Sampler(size, EOS, None)
        sampler.add(NewRequest("r", tuple(prompt), params))
        for token in output:
            sampler.state("r").observe(token)
        for number in range(extra):
            others = (
                SamplingParams(seed=number),
                SamplingParams(temperature=0.0),
                SamplingParams(top_k=3, seed=number),
            )
            sampler.add(NewRequest(str(number), (), others[number % 3]))
        return sampler

    alone = sampler_with(0)
    support = set(np.flatnonzero(distribution(torch.from_numpy(row), alone.state("r")).numpy()))
    (single,) = alone.sample(torch.from_numpy(row)[None], ["r"])
    assert single.error is None
    assert single.token_id in support
    ids = [*map(str, range(company // 2)), "r", *map(str, range(company // 2, company))]
    batch = torch.from_numpy(np.stack([row] * len(ids)))
    together = sampler_with(company).sample(batch, ids)[ids.index("r")]
    assert together == single


@given(rows(), st.integers(0, 300))
@settings(deadline=None)
def test_top_ranked_is_a_stable_sort(row: np.ndarray[Any, Any], count: int) -> None:
    values, ids = top_ranked(torch.from_numpy(np.stack([row, row[::-1].copy()])), min(count, len(row)))
    for own, found_values, found in zip((row, row[::-1]), values.tolist(), ids.tolist(), strict=True):
        ranking = sorted(range(len(own)), key=lambda token: (-own[token], token))[: len(found)]
        assert found == ranking
        assert found_values == [own[token] for token in ranking]
