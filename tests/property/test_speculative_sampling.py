"""Sampling with drafts gives what sampling without gives: the distribution of short continuations, by chi-square.

The model is a table: logits of the next token by the last one, and for drafts another table, related but wrong. So the
probability of every continuation is known, and a hundred thousand of them take seconds.
"""

from __future__ import annotations

import itertools
from collections import Counter
from functools import cache

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from freehold.engine.drafts import draw_draft
from freehold.engine.sampler import Sampler
from freehold.engine.speculate import Candidate, Draft, Rule, accept_or_resample, verify
from freehold.engine.step import NewRequest
from freehold.types import Guide, SamplingParams
from tests.faults.acceptance import WRONG_RULES

VOCABULARY, LENGTH, DRAFTS = 12, 3, 2
QUICK, ALL = 2_500, 100_000
START = 11  # the last token of the prompt; it leaves the most open
SETTINGS = {
    "cool, top-p": {"temperature": 0.7, "top_p": 0.9},
    "hot, top-p": {"temperature": 1.3, "top_p": 0.9},
    "hot": {"temperature": 1.3},
    "top-k and min-p": {"temperature": 1.0, "top_k": 6, "min_p": 0.05},
    "penalised": {"temperature": 1.0, "frequency_penalty": 1.2, "logit_bias": {4: 1.5}},
    "guided": {"temperature": 1.3, "top_p": 0.9, "guide": Guide("json_object")},  # in its place: EveryThird
}
# The chance that a right sampler fails; with so many samples, wrong ones fail by far more.
LEVEL = 1e-4


class EveryThird:
    """In the place of a compiled guide: forbids every third token, other ones after each token that it accepted."""

    def __init__(self) -> None:
        self.output: tuple[int, ...] = ()

    @staticmethod
    def allows(output: tuple[int, ...], token: int) -> bool:
        return (sum(output) + len(output) + token) % 3 > 0

    def fill_mask(self) -> NDArray[np.uint8]:
        allowed = [self.allows(self.output, token) for token in range(16)]
        return np.packbits(allowed, bitorder="little")

    def accept(self, token_id: int) -> None:
        assert self.allows(self.output, token_id)
        self.output += (token_id,)


class Compiler:
    def compile(self, guide: Guide) -> EveryThird:
        return EveryThird()


@cache
def tables() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of target and drafts, [last token, next token]."""
    generator = torch.Generator().manual_seed(11)
    target = torch.randn(VOCABULARY, VOCABULARY, generator=generator) * 1.5
    return target, target + torch.randn(VOCABULARY, VOCABULARY, generator=generator)


def next_probabilities(params: SamplingParams, output: tuple[int, ...]) -> NDArray[np.float64]:
    """Of the token after START and `output`, by definition, in float64."""
    row = tables()[0][output[-1] if output else START].double().numpy().copy()
    for token, bias in params.logit_bias.items():
        row[token] += bias
    for token, count in Counter(output).items():
        row[token] -= params.frequency_penalty * count
    if params.guide is not None:
        row[[token for token in range(VOCABULARY) if not EveryThird.allows(output, token)]] = -np.inf
    weights = np.exp((row - row.max()) / params.temperature)
    weights /= weights.sum()
    order = np.argsort(-weights, kind="stable")
    kept = [token for token in order if weights[token] >= params.min_p * weights.max()]
    kept = kept[: params.top_k or None]
    mass = weights[kept].cumsum() / weights[kept].sum()
    kept = kept[: int(np.searchsorted(mass, params.top_p - 1e-6)) + 1]
    found = np.zeros_like(weights)
    found[kept] = weights[kept] / weights[kept].sum()
    return found


def continuation_probabilities(params: SamplingParams) -> dict[tuple[int, ...], float]:
    found = {}
    for tokens in itertools.product(range(VOCABULARY), repeat=LENGTH):
        chance = 1.0
        for at in range(LENGTH):
            chance *= next_probabilities_cached(params_key(params), tokens[:at])[tokens[at]]
            if not chance:
                break
        found[tokens] = chance
    return found


def params_key(params: SamplingParams) -> str:
    _KEYS[repr(params)] = params
    return repr(params)


_KEYS: dict[str, SamplingParams] = {}


@cache
def next_probabilities_cached(key: str, output: tuple[int, ...]) -> NDArray[np.float64]:
    return next_probabilities(_KEYS[key], output)


def sample(params: SamplingParams, count: int, rule: Rule) -> tuple[Counter[tuple[int, ...]], float]:
    """Continuations of LENGTH tokens, and the share of drafts that were accepted."""
    target_VV, draft_VV = tables()
    sampler = Sampler(VOCABULARY, (), Compiler())  # type: ignore[arg-type]
    sampler._random.seed(12345)
    found: Counter[tuple[int, ...]] = Counter()
    proposed = accepted = 0
    for n in range(count):
        name = str(n)
        sampler.add(NewRequest(name, (START,), params))
        state = sampler.state(name)
        output: tuple[int, ...] = ()
        while len(output) < LENGTH:
            last = output[-1] if output else START
            tokens, drafts = [last], list[Draft]()
            for depth in range(min(DRAFTS, LENGTH - len(output) - 1)):
                drafts.append(draw_draft(draft_VV[tokens[-1]], state, depth))
                tokens.append(drafts[-1].token_id)
            (verified,) = verify(sampler, target_VV[tokens], [Candidate(name, 0, tuple(drafts))], rule)
            assert verified.error is None
            output += verified.token_ids
            proposed += len(drafts)
            accepted += verified.accepted
        found[output] += 1
        sampler.drop(name)
    return found, accepted / proposed


def chi_square_p(observed: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> float:
    """The chance of a statistic as large as this one; continuations that are expected fewer than 10 times are one cell.

    The tail of the chi-square distribution by Wilson and Hilferty's cube root, good to a few percent where it matters.
    """
    total = sum(observed.values())
    impossible = sum(count for tokens, count in observed.items() if expected.get(tokens, 0.0) == 0.0)
    if impossible:
        return 0.0
    cells: list[tuple[float, float]] = []
    rare_seen = rare_expected = 0.0
    for tokens, chance in expected.items():
        if chance * total < 10:
            rare_seen, rare_expected = rare_seen + observed[tokens], rare_expected + chance * total
        else:
            cells.append((observed[tokens], chance * total))
    if rare_expected >= 10:
        cells.append((rare_seen, rare_expected))
    statistic = sum((seen - wanted) ** 2 / wanted for seen, wanted in cells)
    freedom = len(cells) - 1
    assert freedom > 5
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5
    return float(0.5 * torch.special.erfc(torch.tensor(z / 2**0.5, dtype=torch.float64)))


def check(setting: str, count: int, rule: Rule = accept_or_resample) -> float:
    params = SamplingParams(max_tokens=LENGTH, ignore_eos=True, **SETTINGS[setting])  # type: ignore[arg-type]
    expected = continuation_probabilities(params)
    assert abs(sum(expected.values()) - 1) < 1e-9
    observed, rate = sample(params, count, rule)
    if rule is accept_or_resample:
        assert 0.2 < rate < 0.95, "all drafts fare alike: nothing is tested"
    return chi_square_p(observed, expected)


@pytest.mark.parametrize("setting", SETTINGS)
def test_continuations_are_distributed_as_without_drafts(setting: str) -> None:
    assert check(setting, QUICK) > LEVEL


@pytest.mark.parametrize("rule", WRONG_RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("setting", ["cool, top-p", "hot, top-p"])
def test_a_wrong_rule_is_seen(setting: str, rule: Rule) -> None:
    assert check(setting, QUICK, rule) < LEVEL


@pytest.mark.nightly
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_hundred_thousand_continuations(setting: str) -> None:
    assert check(setting, ALL) > LEVEL


@pytest.mark.nightly
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("rule", WRONG_RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("setting", ["cool, top-p", "hot, top-p"])
def test_a_hundred_thousand_continuations_by_a_wrong_rule(setting: str, rule: Rule) -> None:
    assert check(setting, ALL, rule) < LEVEL
