"""What a deployment has to serve: requests of these lengths, so many at a time or a second. Torch-free.

    Workload(lengths("8192"), lengths("1024"), concurrency=32)              closed loop: 32 callers, each waits
    Workload(lengths("1000-9000"), lengths("500"), rate=2.5)                open loop: 2.5 requests a second, Poisson
    from_calls(read_calls("calls.jsonl"), rate=0.8, drafts=5)               own requests, drawn again and again

Acceptance lengths are those of SPEED-Bench coding with thinking, as published for GLM-5.2 FP8 with 1 to 8 drafts
(https://github.com/SemiAnalysisAI/InferenceX, golden acceptance lengths, 2026). Random tokens give other ones, up to
the maximum or nearly none, so no run with drafts can be compared without knowing its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from freehold.errors import InvalidRequest
from freehold.plan.drawing import Drawing
from freehold.plan.lengths import Call, Lengths
from freehold.plan.prices import Tokens

GOLDEN_ACCEPTANCE = (1.0, 1.84, 2.50, 2.99, 3.33, 3.61, 3.78, 3.91, 4.06)
"""Tokens a step by number of drafts, from 0 on."""
Effort = Literal["max", "off"]
EFFORTS: tuple[Effort, ...] = get_args(Effort)
_THINKING = 37 / 43
"""Share of the output that was thinking, at the greatest effort: 37k of 43k tokens a task (Artificial Analysis
Intelligence Index 4.1 on GLM-5.2, 2026). Nobody has published the same for the effort "high"."""
_MEAN_SECONDS = 20.0  # that a request is in flight, for a first guess of the concurrency of an open loop
_MOST = 1_000_000


@dataclass(frozen=True)
class Workload:
    """The load of a deployment: exactly one of concurrency (requests in flight) and rate (arrivals a second).

    hit_rate: share of prompt tokens that the prefix cache answers. drafts: tokens that MTP drafts a step.
    acceptance: tokens that a step then gives, 1 to drafts + 1; None takes the published one. effort: "off" leaves the
    thinking away. calls: requests to draw from, instead of lengths; each has its own cached tokens then.
    """

    prompt_lengths: Lengths
    output_lengths: Lengths
    concurrency: int | None = None
    rate: float | None = None
    hit_rate: float = 0.0
    drafts: int = 0
    acceptance_length: float | None = None
    effort: Effort = "max"
    calls: tuple[Call, ...] = ()

    def __post_init__(self) -> None:
        if (self.concurrency is None) == (self.rate is None):
            raise InvalidRequest("a workload has a concurrency or a rate, one of them", param="rate")
        if self.concurrency is not None and not 1 <= self.concurrency <= _MOST:
            raise InvalidRequest(f"concurrency {self.concurrency}: from 1 to {_MOST:,}", param="concurrency")
        if self.rate is not None and not 0 < self.rate <= _MOST:
            raise InvalidRequest(f"rate {self.rate}: more than 0 and at most {_MOST:,} a second", param="rate")
        if not 0 <= self.hit_rate < 1:
            raise InvalidRequest(f"hit rate {self.hit_rate}: from 0 to less than 1", param="hit_rate")
        if not 0 <= self.drafts < len(GOLDEN_ACCEPTANCE):
            raise InvalidRequest(f"{self.drafts} drafts: from 0 to {len(GOLDEN_ACCEPTANCE) - 1}", param="drafts")
        if not 1 <= self.acceptance <= self.drafts + 1:
            raise InvalidRequest(
                f"acceptance length {self.acceptance} with {self.drafts} drafts: a step gives from 1 to "
                f"{self.drafts + 1} tokens",
                param="acceptance",
            )

    @property
    def open_loop(self) -> bool:
        return self.rate is not None

    @property
    def acceptance(self) -> float:
        """Tokens a step."""
        return GOLDEN_ACCEPTANCE[self.drafts] if self.acceptance_length is None else self.acceptance_length

    @property
    def prompt(self) -> float:
        """Mean prompt tokens."""
        return _mean([call.prompt for call in self.calls]) if self.calls else self.prompt_lengths.mean

    @property
    def output(self) -> float:
        """Mean output tokens."""
        given = _mean([call.output for call in self.calls]) if self.calls else self.output_lengths.mean
        return max(1.0, given * self._kept)

    @property
    def hits(self) -> float:
        """Share of the prompt tokens that the prefix cache answers."""
        if not self.calls:
            return self.hit_rate
        return sum(call.cached for call in self.calls) / sum(call.prompt for call in self.calls)

    @property
    def tokens(self) -> Tokens:
        """Of a mean request."""
        return Tokens(self.prompt, self.prompt * self.hits, self.output)

    @property
    def mean_tokens(self) -> float:
        """Tokens that a running request has in the cache, at a random moment of its decoding."""
        return self.prompt + self.output / 2

    @property
    def longest(self) -> int:
        """Tokens of the longest request."""
        if self.calls:
            return max(call.prompt + self._output(call.output) for call in self.calls)
        return self.prompt_lengths.high + self._output(self.output_lengths.high)

    @property
    def peak_concurrency(self) -> float:
        """Requests in flight; of an open loop a guess, for limits that only have to be high enough."""
        return float(self.concurrency) if self.concurrency is not None else self._rate * _MEAN_SECONDS

    @property
    def _rate(self) -> float:
        assert self.rate is not None
        return self.rate

    @property
    def _kept(self) -> float:
        return 1.0 if self.effort == "max" else 1 - _THINKING

    def _output(self, tokens: int) -> int:
        return max(1, round(tokens * self._kept))

    def tokens_in_flight(self, concurrency: float) -> float:
        return concurrency * self.mean_tokens

    def with_acceptance(self, value: float) -> Workload:
        return replace(self, acceptance_length=min(max(1.0, value), self.drafts + 1.0))

    def with_hit_rate(self, value: float) -> Workload:
        """As if the prefix cache answered this share of every prompt."""
        if not self.calls:
            return replace(self, hit_rate=value)
        calls = tuple(replace(call, cached=int(call.prompt * value)) for call in self.calls)
        return replace(self, calls=calls)

    def shared_by(self, replicas: int) -> Workload:
        """The share of one of `replicas` that divide the load evenly."""
        if self.concurrency is not None:
            return replace(self, concurrency=max(1, math.ceil(self.concurrency / replicas)))
        return replace(self, rate=self._rate / replicas)

    def at(self, concurrency: int) -> Workload:
        """The same requests, so many in flight."""
        return replace(self, concurrency=concurrency, rate=None)

    def draw(self, count: int, seed: int = 0) -> list[Call]:
        """`count` requests; the same seed gives the same ones."""
        drawing = Drawing(seed)
        if self.calls:
            chosen = [self.calls[at] for at in drawing.integers(0, len(self.calls) - 1, count)]
            return [replace(call, output=self._output(call.output)) for call in chosen]
        # All prompts first, then all outputs: the order in which vLLM's and InferenceX's load generators draw them.
        prompts = self.prompt_lengths.draw(drawing, count)
        outputs = self.output_lengths.draw(drawing, count)
        return [
            Call(prompt, self._output(output), int(prompt * self.hit_rate))
            for prompt, output in zip(prompts, outputs, strict=True)
        ]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: own calls are summed up."""
        return {
            "concurrency": self.concurrency,
            "rate": self.rate,
            "prompt_tokens": self.prompt,
            "output_tokens": self.output,
            "longest": self.longest,
            "hit_rate": self.hits,
            "drafts": self.drafts,
            "acceptance_length": self.acceptance,
            "effort": self.effort,
            "calls": len(self.calls),
        }

    def __str__(self) -> str:
        load = f"{self.concurrency:,} requests at a time" if self.rate is None else f"{self.rate:g} requests a second"
        if self.calls:
            mean = f"{self.prompt:,.0f} tokens in and {self.output:,.0f} out on average"
            mix = f"drawn from {len(self.calls):,} calls, {mean}"
        else:
            thinking = "" if self.effort == "max" else ", thinking left away"
            mix = f"{self.prompt_lengths} tokens in and {self.output_lengths} out{thinking}"
        hits = f", {self.hits:.0%} of prompts cached" if self.hits else ""
        drafts = f", {self.drafts} drafts giving {self.acceptance:g} tokens a step" if self.drafts else ""
        return f"{load}, {mix}{hits}{drafts}"


def from_calls(
    calls: tuple[Call, ...], *, concurrency: int | None = None, rate: float | None = None, **others: Any
) -> Workload:
    """Own calls. Without concurrency and rate, the rate at which they came, if they have times."""
    if not calls:
        raise InvalidRequest("no calls to draw requests from", param="calls")
    if concurrency is None and rate is None:
        times = [call.started for call in calls if call.started is not None]
        if len(times) < len(calls) or len(times) < 2 or max(times) <= min(times):
            raise InvalidRequest("the calls have no times that give a rate; give a rate or a concurrency", param="rate")
        rate = (len(times) - 1) / (max(times) - min(times))
    prompts, outputs = [call.prompt for call in calls], [call.output for call in calls]
    return Workload(
        Lengths(min(prompts), max(prompts)),
        Lengths(min(outputs), max(outputs)),
        concurrency,
        rate,
        calls=calls,
        **others,
    )


def _mean(values: list[int]) -> float:
    return sum(values) / len(values)
