"""Simulated canaries: traffic of two arms with known truth, fed to the gateway's own decision machine.

Requests come in blocks, one for each look: LOOK of the canary and as many of the control as its share says. Times,
costs and token counts are log-normal, widely spread as those of chats are; one in a hundred requests fails. A judge
scores one pair of answers for every second request of the canary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from freehold.gateway.canary.machine import LOOK, SETTLE_SECONDS, Canary
from freehold.gateway.canary.record import Record
from freehold.gateway.config import Experiment

Columns = dict[str, NDArray[np.float64]]

GUARDRAILS = ("error", "refusal", "ttft", "ttft_p50", "ttft_p95", "tpot", "cost", "output_tokens", "quality")
"""Watched together in every simulated canary."""
FAILING, REFUSING = 0.008, 0.002  # together the 1% that `error` counts
TTFT_SPREAD, TPOT_SPREAD, TOKENS_SPREAD = 0.6, 0.3, 0.9  # of the logarithm
SCORES = np.array([-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0])  # the judge's differences, and how often
SCORED = np.array([0.01, 0.07, 0.14, 0.56, 0.14, 0.07, 0.01])
CHUNK = 8  # looks whose requests are drawn together


@dataclass(frozen=True)
class Truth:
    """How the canary differs from the control. error: its rate of failures, of which the control has 0.01; times and
    tokens: factors; quality: what is added to the mean difference of scores. cluster: mean requests of a conversation,
    which share a part of their luck. drift: both arms get slower and fail more at some times of day.
    """

    name: str
    error: float = 0.01
    ttft: float = 1.0
    cost: float = 1.0
    quality: float = 0.0
    cluster: float = 1.0
    drift: bool = False


@dataclass(frozen=True)
class Outcome:
    state: str
    requests: int  # of the canary, when it was decided
    reason: str


def experiment(max_requests: int = 4000, **more: object) -> Experiment:
    """The default canary, with the guardrails of the simulation and their default margins."""
    return Experiment.model_validate(
        {
            "alias": "chat",
            "control": "old",
            "canary": "new",
            "guardrails": [{"metric": name} for name in GUARDRAILS],
            "warm_up_requests": 0,
            "max_requests": max_requests,
            **more,
        }
    )


def run(truth: Truth, seed: int, settings: Experiment) -> Outcome:
    """One canary, until it is decided."""
    generator = np.random.default_rng((seed, 20211))
    records: list[Record] = []
    canary = Canary("simulated", settings, 0.0, emit=records.append, explain=False)
    at = SETTLE_SECONDS
    while canary.state == "ramping":
        share = canary.plan.share
        others = round(LOOK * (1 - share) / share)
        for block in blocks(truth, generator, others, at):
            before = canary.step
            for arm, (columns, unit_R) in enumerate(block):
                canary.window.absorb(arm, columns, unit_R)
            at += 1.0
            canary.look(at)
            if canary.state != "ramping" or canary.step != before:
                break
    return Outcome(canary.state, canary.requests, records[-1].reason)


def blocks(
    truth: Truth, generator: np.random.Generator, others: int, at: float
) -> Iterator[tuple[tuple[Columns, NDArray[np.int64]], ...]]:
    """The requests between looks, of control and of canary: CHUNK times."""
    drawn = [
        _draw(truth if arm else _without(truth), generator, CHUNK * count) for arm, count in ((0, others), (1, LOOK))
    ]
    for index in range(CHUNK):
        hour = 1.0 + 0.5 * np.sin((at + index) / 6.0) if truth.drift else 1.0
        yield tuple(
            _slice(columns, unit_R, slice(index * count, (index + 1) * count), hour)
            for (columns, unit_R), count in zip(drawn, (others, LOOK), strict=True)
        )


def _without(truth: Truth) -> Truth:
    return Truth("control", cluster=truth.cluster, drift=truth.drift)


def _draw(truth: Truth, generator: np.random.Generator, count: int) -> tuple[Columns, NDArray[np.int64]]:
    """So many requests. A conversation's requests follow one another: the arms' comparison sees only their sums."""
    unit_R = np.cumsum(generator.random(count) < 1.0 / truth.cluster).astype(np.int64)
    luck = generator.normal(0.0, 1.0, unit_R[-1] + 1)[unit_R] if truth.cluster > 1 else np.zeros(count)
    own = np.sqrt(1.0 - 0.3 * (truth.cluster > 1))
    shared = np.sqrt(0.3) * luck

    def logs(spread: float) -> NDArray[np.float64]:
        values: NDArray[np.float64] = np.exp(spread * (shared + own * generator.standard_normal(count)))
        return values

    # exp(1.5 luck - 1.125) has mean 1: conversations differ much in how often they fail, the rate stays.
    odds = np.exp(1.5 * luck - 1.125) if truth.cluster > 1 else 1.0
    refused = generator.random(count) < REFUSING * odds
    failed = refused | (generator.random(count) < (truth.error - REFUSING) * odds)
    tokens = logs(TOKENS_SPREAD)
    ttft = 0.4 * truth.ttft * logs(TTFT_SPREAD)
    pairs = generator.choice(SCORES, count // 2, p=SCORED)
    lost = generator.random(count // 2) < 4 * abs(truth.quality)  # a quarter of a point less in so many of the pairs
    columns = {
        "error": failed.astype(np.float64),
        "refusal": refused.astype(np.float64),
        "ttft": ttft,
        "tpot": 0.02 * logs(TPOT_SPREAD),
        "cost": truth.cost * (300.0 + 900.0 * tokens),
        "output_tokens": 400.0 * tokens,
        "quality": np.clip(pairs - 0.25 * lost, -1.0, 1.0),
    }
    return columns, unit_R


def _slice(columns: Columns, unit_R: NDArray[np.int64], part: slice, hour: float) -> tuple[Columns, NDArray[np.int64]]:
    """A block; a conversation that goes on in the next one counts as two, which only makes more units of it."""
    cut = {name: values[part] for name, values in columns.items() if name != "quality"}
    failed = cut["error"] > 0
    ttft = np.where(failed, np.nan, cut.pop("ttft") * hour)
    half = slice(part.start // 2, part.stop // 2)
    cut |= {"ttft": ttft, "ttft_p50": ttft, "ttft_p95": ttft, "quality": columns["quality"][half]}
    cut["tpot"] = np.where(failed, np.nan, cut["tpot"] * hour)
    return cut, unit_R[part] - unit_R[part.start]
