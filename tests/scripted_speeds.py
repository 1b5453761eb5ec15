"""A speed model of three lines of arithmetic, for tests of what is built on speeds: search, cost, reports, charts."""

from __future__ import annotations

from freehold.plan.cost import Weights
from freehold.plan.search import Candidate
from freehold.plan.types import Figure, Percentiles, Slo, Speed
from freehold.plan.workload import Workload


class ScriptedSpeeds:
    """A step takes what reading a rank's weights does, and 10 ms; a prompt 1 ms for each 100 new tokens."""

    def __init__(self, workload: Workload, slo: Slo) -> None:
        self.workload, self.slo = workload, slo
        self.asked = 0

    def changed(self, workload: Workload) -> ScriptedSpeeds:
        return ScriptedSpeeds(workload, self.slo)

    def of(self, candidate: Candidate) -> Speed:
        load = self.workload.shared_by(candidate.replicas)
        return self.closed(candidate, max(1, round(load.peak_concurrency)))

    def closed(self, candidate: Candidate, concurrency: int) -> Speed:
        self.asked += 1
        tokens = self.workload.tokens
        step = candidate.footprint.weight_bytes / candidate.gpu.bandwidth + 0.010
        steps = step / (self.workload.acceptance if candidate.mtp else 1.0)
        prompt = tokens.uncached / 100_000
        tpot = steps + prompt * concurrency / tokens.output
        ttft = 0.05 + prompt
        rate = concurrency / (ttft + tpot * tokens.output)
        meets = (self.slo.ttft or ttft * 2) >= ttft * 1.2 and (self.slo.tpot or tpot * 2) >= tpot * 1.2
        return Speed(
            ttft=_spread(ttft),
            tpot=_spread(tpot),
            input_rate=_figure(rate * tokens.prompt),
            cached_rate=_figure(rate * tokens.cached),
            output_rate=_figure(rate * tokens.output),
            request_rate=_figure(rate),
            goodput=_figure(rate if meets else 0.0),
            concurrency=float(concurrency),
            starved=0.0,
            meets_slo=meets,
        )

    def bound(self, candidate: Candidate) -> float:
        return float(candidate.footprint.weight_bytes)

    def weights(self, candidate: Candidate) -> Weights:
        return Weights(uncached=1.0, cached=0.05, output=20.0)


def _figure(value: float) -> Figure:
    return Figure(value, value * 0.9, value * 1.1, "roofline", "scripted")


def _spread(value: float) -> Percentiles:
    return Percentiles(_figure(value), _figure(value * 1.2), _figure(value * 1.5), _figure(value))
