"""How fast candidates are under a workload: simulations, percentiles, intervals, and a quick bound. Torch-free.

    speeds = Speeds(workload, Slo(tpot=0.05))
    speeds.of(candidate)             # one replica under its share of the load
    speeds.closed(candidate, 64)     # one replica with 64 requests in flight
    speeds.bound(candidate)          # GPU seconds a request, if none waits for cache: for ranking

Each simulation plays the load through Freehold's scheduler with a roofline clock (`simulate`). What was simulated is
remembered: a search, a sweep and a sensitivity analysis ask for the same again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate

from freehold.plan.accuracy import Expected, expected
from freehold.plan.cost import Weights
from freehold.plan.drawing import Drawing, mean, percentile
from freehold.plan.kept import bundled
from freehold.plan.lengths import Call
from freehold.plan.precedents import Row, precedent, published
from freehold.plan.roofline import Chunk, Efficiencies, StepTimes, seconds
from freehold.plan.search import Candidate
from freehold.plan.simulate import EngineLimits, Loop, Run, simulate
from freehold.plan.types import Engine, Figure, Gpu, Layout, Measurement, Percentiles, Slo, Speed
from freehold.plan.workload import Workload

_FEWEST, _MOST = 32, 128  # calls of a closed loop that are measured: one round, within these
_COARSE = 0.25  # of them where many loads are compared
_MOST_RUNNING = EngineLimits(1, 1).sequences
_SEED = 7
_CHUNK = {"vllm": 8192, "sglang": 8192, "freehold": 2048}
_LARGE_CHUNK = 16384  # SGLang's on GPUs of more memory
_LARGE_MEMORY = 160e9


def prompt_chunk(engine: Engine, gpu: Gpu, layout: Layout) -> int:
    """Prompt tokens of a step: each engine's default, and 4,096 a group for SGLang's attention groups, as launched."""
    if engine == "sglang" and layout.dp > 1:
        return 4096 * layout.dp
    if engine == "sglang" and gpu.memory > _LARGE_MEMORY:
        return _LARGE_CHUNK
    return _CHUNK[engine]


class Speeds:
    """Speeds of candidates under one workload, with its SLOs."""

    def __init__(
        self, workload: Workload, slo: Slo, efficiencies: Efficiencies | None = None, own: Sequence[Row] = ()
    ) -> None:
        """own: measured runs of one's own, which go before the published ones."""
        self.workload, self.slo, self.own = workload, slo, own
        self.efficiencies = efficiencies or bundled()
        self.coarse = False
        self._times: dict[Candidate, StepTimes] = {}
        self._made: dict[tuple[Candidate, Workload], Speed] = {}

    def changed(self, workload: Workload) -> Speeds:
        """The same for another workload, from fewer calls: it is compared, not reported."""
        changed = Speeds(workload, self.slo, self.efficiencies, self.own)
        changed.coarse = True
        return changed

    def of(self, candidate: Candidate) -> Speed:
        """One replica under its share of the load."""
        return self._speed(candidate, self.workload.shared_by(candidate.replicas))

    def closed(self, candidate: Candidate, concurrency: int) -> Speed:
        """One replica with so many requests in flight."""
        return self._speed(candidate, self.workload.at(concurrency), coarse=True)

    def bound(self, candidate: Candidate) -> float:
        """GPU seconds a request, if none waits for cache; far more if promises cannot be kept."""
        load, tokens = self.workload.shared_by(candidate.replicas), self.workload.tokens
        concurrency = max(1, round(load.peak_concurrency))
        weights = self._weights(candidate, concurrency)
        prompts = weights.uncached * tokens.uncached + weights.cached * tokens.cached
        each = prompts + weights.output * tokens.output
        # While one answers, the prompts of all others are computed once.
        tpot = each * concurrency / tokens.output
        late = self.slo.ttft is not None and prompts > self.slo.ttft
        slow = self.slo.tpot is not None and tpot > self.slo.tpot and load.rate is None
        return each * candidate.layout.gpus * (1e3 if late or slow else 1.0)

    def weights(self, candidate: Candidate) -> Weights:
        """Replica seconds that tokens of each kind take, at this load."""
        return self._weights(candidate, max(1, round(self.of(candidate).concurrency)))

    # ── one replica ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _weights(self, candidate: Candidate, concurrency: int) -> Weights:
        times, tokens, factors = self._step_times(candidate), self.workload.tokens, self.efficiencies.factors

        def prompt(start: float, count: float) -> float:
            return seconds(times.prefill([Chunk(round(start), max(1, round(count)))], factors), factors)

        fresh = max(1.0, tokens.uncached)
        # What cached tokens cost is that later ones see them; where there are none, a tenth of the prompt says it.
        cached = tokens.cached or max(1.0, tokens.prompt / 10)
        alone = prompt(0, fresh)
        context = self.workload.mean_tokens
        running = min(concurrency, max(1.0, candidate.footprint.cache_tokens * candidate.layout.dp / context))
        step = times.decode(round(running), running * min(context, times.topk), running * context, factors)
        gain = self.workload.acceptance if candidate.mtp else 1.0
        return Weights(
            uncached=alone / fresh,
            cached=max(0.0, prompt(cached, fresh) - alone) / cached,
            output=seconds(step, factors) / round(running) / gain,
        )

    def _step_times(self, candidate: Candidate) -> StepTimes:
        key = _alike(candidate)
        if key not in self._times:
            drafts = self.workload.drafts if candidate.mtp else 0
            room = candidate.footprint
            self._times[key] = StepTimes(
                candidate.model, candidate.gpu, candidate.layout, candidate.engine, room.cache, drafts=drafts
            )
        return self._times[key]

    def _speed(self, candidate: Candidate, load: Workload, *, coarse: bool = False) -> Speed:
        key = (_alike(candidate), load)
        if key not in self._made:
            drafts = load.drafts if candidate.mtp else 0
            worth = expected(candidate.engine, candidate.gpu, candidate.model, candidate.layout, drafts=drafts)
            # Of more callers than can ever run, those beyond wait longer by the time that serving them takes.
            simulated = load if load.concurrency is None else load.at(min(load.concurrency, _enough(candidate, load)))
            run = self._run(candidate, simulated, _COARSE if coarse or self.coarse else 1.0)
            row = precedent((*self.own, *published()), candidate, load)
            predicted = self._reported(run, simulated, load, worth)
            self._made[key] = predicted if row is None else replace(predicted, measured=_measurement(row))
        return self._made[key]

    def _run(self, candidate: Candidate, load: Workload, share: float) -> Run:
        room, layout = candidate.footprint, candidate.layout
        chunk = prompt_chunk(candidate.engine, candidate.gpu, layout)
        limits = EngineLimits(chunk, room.cache_tokens * layout.dp)
        gain = load.acceptance if candidate.mtp else 1.0
        loop = _loop(load, gain, share, limits.cache_tokens)
        return simulate(self._step_times(candidate), self.efficiencies, loop, limits)

    def _reported(self, run: Run, simulated: Workload, load: Workload, worth: Expected) -> Speed:
        ttft = [one.ttft for one in run.served]
        tpot = [one.tpot for one in run.served if one.tpot is not None] or [0.0]
        whole = [one.last - one.sent for one in run.served]
        waiting = 0.0
        if load.rate is None:
            assert load.concurrency is not None
            assert simulated.concurrency is not None
            rate = simulated.concurrency / mean(whole)
            waiting = (load.concurrency - simulated.concurrency) / rate
            ttft, whole = ([time + waiting for time in times] for times in (ttft, whole))
        else:
            # As many end as come, unless the queue grows without end.
            rate = min(load.rate, run.finished / run.seconds)
        within = [self._within(one.ttft + waiting, one.tpot) for one in run.served]
        tokens = load.tokens
        rates = [worth.of_rate(rate * amount) for amount in (tokens.prompt, tokens.cached, tokens.output, 1.0)]
        return Speed(
            ttft=_percentiles(ttft, worth.of_ttft),
            tpot=_percentiles(tpot, worth.of_tpot),
            input_rate=rates[0],
            cached_rate=rates[1],
            output_rate=rates[2],
            request_rate=rates[3],
            goodput=worth.of_rate(rate * sum(within) / len(within)),
            concurrency=rate * mean(whole),
            starved=run.starved,
            meets_slo=100.0 * sum(within) / len(within) >= self.slo.percentile,
        )

    def _within(self, ttft: float, tpot: float | None) -> bool:
        late = self.slo.ttft is not None and ttft > self.slo.ttft
        slow = self.slo.tpot is not None and tpot is not None and tpot > self.slo.tpot
        return not (late or slow)


def _measurement(row: Row) -> Measurement:
    source = f"{row.source.where}, {row.source.date}"

    def figure(seconds_: float | None) -> Figure | None:
        return None if seconds_ is None else Figure(seconds_, seconds_, seconds_, "measured", source)

    return Measurement(str(row), row.source, figure(row.ttft), figure(row.tpot))


def _alike(candidate: Candidate) -> Candidate:
    """What all candidates share that no simulation tells apart: their number, and in one attention group how experts
    are spread over it, which moves the same bytes and FLOP.
    """
    layout, room = candidate.layout, candidate.footprint
    if layout.dp == 1 and layout.ep > 1:
        layout = replace(layout, ep=1)
        room = replace(room, layout=layout)
    return replace(candidate, replicas=1, layout=layout, footprint=room)


def _enough(candidate: Candidate, load: Workload) -> int:
    """Callers of whom some always wait: twice those that can run at once."""
    run = candidate.footprint.max_sequences(max(1, round(load.prompt + load.output)))
    return max(_FEWEST, 2 * min(run, _MOST_RUNNING))


def _loop(load: Workload, gain: float, share: float, room: int) -> Loop:
    """The calls of a simulation: in its stride if the loop is closed, Poisson arrivals if it is open."""
    if load.rate is not None:
        count = round(_MOST * share)
        arrivals = list(accumulate(Drawing(_SEED).exponential(1 / load.rate, count)))
        return Loop(load.draw(count, _SEED), arrivals=arrivals, acceptance=gain)
    assert load.concurrency is not None
    measured = round(min(max(_FEWEST, load.concurrency), _MOST) * share)
    # Others go on while the last of the measured ones finish, as they would.
    calls = load.draw(measured + 2 * load.concurrency, _SEED)
    return Loop(calls, load.concurrency, begun=_begun(load, room), measured=measured, acceptance=gain)


def _begun(load: Workload, room: int) -> Sequence[Call]:
    """Calls on their way: in the middle of their answers, with what they have said in the cache, as many as have room
    there (tokens); the others wait for it.
    """
    assert load.concurrency is not None
    drawing = Drawing(_SEED + 1)
    begun = []
    for call in load.draw(load.concurrency, _SEED + 1):
        done = min(call.output - 1, int(drawing.uniform(0, call.output)))
        room -= call.prompt + call.output
        if room < 0:
            begun.append(call)
            continue
        begun.append(Call(call.prompt + done, call.output - done, call.prompt + done))
    return begun


def _percentiles(values: Sequence[float], figure: Callable[[float], Figure]) -> Percentiles:
    ordered = sorted(values)
    p50, p90, p99 = (figure(percentile(ordered, percent)) for percent in (50, 90, 99))
    return Percentiles(p50, p90, p99, figure(mean(ordered)))
