"""Requests through the real scheduler, with a clock that is a roofline instead of a GPU. Torch-free.

    run = simulate(times, efficiencies, Loop(calls, concurrency=64), EngineLimits(chunk=8192, cache_tokens=300_000))

`engine.scheduler` and `engine.block_manager` decide what is computed when, as they do in `freehold serve`: admission
when there are blocks, chunks of prefill, preemption. Only a step's time is made up: a pass over its prompt chunks, then
one over its decodes (SGLang runs them one after the other; vLLM mixes them, which saves one reading of weights that is
not counted here). So too little cache shows as waiting, and prompts show in the pace of running streams.

The clock keeps apart what its time was spent on (`roofline.Work`), and so does every request's time to the first token
and per token. Both are sums of amounts times factors, which is what makes them easy to fit.

Equal decode steps are done many at once (`engine.leap`), with the same result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from freehold.engine.block_manager import BlockManager
from freehold.engine.leap import leap, steady_steps
from freehold.engine.request import Request
from freehold.engine.scheduler import Scheduler, SchedulerConfig
from freehold.engine.step import ScheduledSeq, SeqOutput, StepInput
from freehold.plan.lengths import Call
from freehold.plan.roofline import CAUSES, NOTHING, Chunk, Efficiencies, StepTimes, Work, add, seconds
from freehold.types import SamplingParams

_BLOCK = 64
_MOST_AT_ONCE = 2048  # decode steps whose contexts are taken as that of the middle one
_SOON = 1e-9
_REQUEST: Work = tuple(float(cause == "requests") for cause in CAUSES)


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """chunk: prompt tokens of a step. cache_tokens: of the whole replica. sequences: that run at once."""

    chunk: int
    cache_tokens: int
    sequences: int = 1024


@dataclass(frozen=True, slots=True)
class Loop:
    """The load. Closed: `concurrency` callers, each sends its next call when its last is answered. Open: `arrivals`,
    the seconds at which each call is sent.

    calls: in the order in which they are sent. begun: calls that are on their way when the clock starts, somewhere in
    the middle of their answers (their prompts are in the cache): a loop in its stride from the beginning. Without them
    a closed loop begins with a burst, as load generators do.
    measured: the first so many calls are reported, and the simulation ends with the last of them; None is all.
    """

    calls: Sequence[Call]
    concurrency: int | None = None
    arrivals: Sequence[float] = ()
    begun: Sequence[Call] = ()
    measured: int | None = None
    acceptance: float = 1.0


@dataclass(frozen=True, slots=True)
class Served:
    """One call. Seconds of the clock: sent, first token, last token. to_first, rest: what passed between, by cause."""

    call: Call
    sent: float
    first: float
    last: float
    to_first: Work
    rest: Work

    @property
    def ttft(self) -> float:
        return self.first - self.sent

    @property
    def tpot(self) -> float | None:
        """None for an answer of one token."""
        return (self.last - self.first) / (self.call.output - 1) if self.call.output > 1 else None


@dataclass(frozen=True, slots=True)
class Run:
    """What came of it. served: the measured calls, by the time they were sent. seconds: the clock at the end.

    starved: share of the time in which a call that came waited for cache or a place. busy: sequences that ran, mean.
    in_flight: calls on their way, mean. preemptions: sequences whose cache was taken.
    """

    served: tuple[Served, ...]
    seconds: float
    starved: float
    busy: float
    in_flight: float
    preemptions: int
    finished: int


def simulate(times: StepTimes, efficiencies: Efficiencies, loop: Loop, limits: EngineLimits) -> Run:
    """Run the loop to its end. Raises InsufficientMemory for a call that the cache can never hold."""
    return _Simulation(times, efficiencies, loop, limits).run()


class _WarmScheduler(Scheduler):
    """The scheduler, for a prefix cache that is said to hold the first tokens of prompts rather than found to.

    A conversation's history is its own, so blocks are taken for all of the prompt and only computing it is saved.
    """

    cached: dict[str, int]

    def _take_blocks(self, request: Request) -> bool:
        taken = super()._take_blocks(request)
        if taken:
            request.num_computed_tokens = min(self.cached[request.request_id], request.num_tokens - 1)
        return taken


@dataclass(slots=True)
class _Flight:
    """A call on its way. entered: the clock's work when it was queued. outputs: what steps may give it, by tokens."""

    call: Call
    sent: float
    number: int
    entered: Work = NOTHING
    first: float | None = None
    first_work: Work = NOTHING
    carry: float = 0.0  # of a token, from steps that give a fraction of one
    outputs: dict[int, SeqOutput] = field(default_factory=dict)


@dataclass(slots=True)
class _Totals:
    starved: float = 0.0
    sequence_seconds: float = 0.0
    flight_seconds: float = 0.0


@dataclass(slots=True)
class _Passed:
    """The last stretch of the clock: what a request that came within it still has to wait."""

    began: float = 0.0
    ended: float = 0.0
    work: Work = NOTHING


class _Simulation:
    def __init__(self, times: StepTimes, efficiencies: Efficiencies, loop: Loop, limits: EngineLimits) -> None:
        self.times, self.loop = times, loop
        self.factors = efficiencies.factors
        self.intake = efficiencies.requests
        sequences = limits.sequences if loop.concurrency is None else min(limits.sequences, loop.concurrency)
        drafts = times.drafts
        config = SchedulerConfig(
            max_model_len=2**40,  # what is too long is refused when the layout is chosen
            max_num_seqs=sequences,
            max_num_batched_tokens=limits.chunk + sequences * (1 + drafts),
            num_draft_tokens=drafts,
            cache_bytes_per_token=times.cache_bytes,
        )
        blocks = BlockManager(max(1, limits.cache_tokens // _BLOCK), _BLOCK, enable_prefix_cache=False)
        self.scheduler = _WarmScheduler(config, blocks)
        self.scheduler.cached = {}
        self.now, self.work = 0.0, NOTHING
        self.flights: dict[str, _Flight] = {}
        self.coming: list[tuple[float, int, _Flight]] = []  # by the time they are queued
        self.sent = self.finished = 0
        self.served: list[Served] = []
        self.totals = _Totals()
        self.passed = _Passed()
        self.measured = len(loop.calls) if loop.measured is None else min(loop.measured, len(loop.calls))

    # ── the loop ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def run(self) -> Run:
        for call in self.loop.begun:
            self._send(call, 0.0, counted=False)
        if self.loop.concurrency is None:
            for arrival in self.loop.arrivals:
                self._send_next(arrival)
        else:
            for _ in range(self.loop.concurrency - len(self.loop.begun)):
                self._send_next(0.0)
        while len(self.served) < self.measured and (self.coming or self.scheduler.has_work):
            self._take_in()
            self._step()
        seconds_ = max(self.now, _SOON)
        served = tuple(sorted(self.served, key=lambda one: one.sent))
        return Run(
            served,
            self.now,
            self.totals.starved / seconds_,
            self.totals.sequence_seconds / seconds_,
            self.totals.flight_seconds / seconds_,
            self.scheduler.counters.preemptions,
            self.finished,
        )

    def _send_next(self, at: float) -> None:
        if self.sent < len(self.loop.calls):
            self._send(self.loop.calls[self.sent], at, counted=True)

    def _send(self, call: Call, at: float, *, counted: bool) -> None:
        number = self.sent if counted else -1 - len(self.coming)
        self.sent += counted
        heappush(self.coming, (at + self.intake, number, _Flight(call, at, number)))

    def _take_in(self) -> None:
        """Queue what has come; if nothing runs, wait for the next to come."""
        if not self.scheduler.has_work and self.coming[0][0] > self.now:
            self.now = self.coming[0][0]
            self.passed = _Passed(self.now, self.now)
        while self.coming and self.coming[0][0] <= self.now + _SOON:
            due, number, flight = heappop(self.coming)
            name = str(number)
            self.flights[name] = flight
            self.scheduler.cached[name] = flight.call.cached
            params = SamplingParams(max_tokens=flight.call.output, ignore_eos=True)
            self.scheduler.add(Request(name, (0,) * flight.call.prompt, params))
            length = self.passed.ended - self.passed.began
            late = (self.now - due) / length if length > 0 else 0.0
            flight.entered = add(self.work, self.passed.work, -min(1.0, max(0.0, late)))

    # ── one step ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _step(self) -> None:
        scheduler = self.scheduler
        preempted = scheduler.counters.preemptions
        step = scheduler.schedule()
        if step is None:
            return
        decodes, chunks = self._sorted(step)
        began, before = self.now, self.work
        if chunks:
            self._pass(self.times.prefill(chunks, self.factors))
        prompts_done, prompts_work = self.now, self.work
        if decodes:
            seen = sum(min(seq.start + 1, self.times.topk) for seq in decodes)
            context = sum(seq.start + 1 for seq in decodes)
            self._pass(self.times.decode(len(decodes), seen, context, self.factors))
        self._count(self.now - began, len(step.seqs), bool(scheduler.waiting))
        self._update(step, {seq.request_id for seq in decodes}, prompts_done, prompts_work)
        self.passed = _Passed(began, self.now, add(self.work, before, -1.0))
        if preempted == scheduler.counters.preemptions:
            self._leap(step)

    def _sorted(self, step: StepInput) -> tuple[list[ScheduledSeq], list[Chunk]]:
        decodes, chunks = [], []
        for seq in step.seqs:
            if len(seq.token_ids) == 1 and seq.start >= self.flights[seq.request_id].call.prompt:
                decodes.append(seq)
            else:
                chunks.append(Chunk(seq.start, len(seq.token_ids)))
        return decodes, chunks

    def _pass(self, work: Work) -> None:
        self.work = add(self.work, work)
        self.now += seconds(work, self.factors)

    def _count(self, length: float, sequences: int, waiting: bool) -> None:
        self.totals.starved += length * waiting
        self.totals.sequence_seconds += length * sequences
        self.totals.flight_seconds += length * len(self.flights)

    def _update(self, step: StepInput, decoding: set[str], prompts_done: float, prompts_work: Work) -> None:
        outputs = []
        for seq in step.seqs:
            flight, count = self.flights[seq.request_id], 0
            if seq.samples:
                count = self._tokens(flight, 1) if seq.request_id in decoding else 1
            output = flight.outputs.get(count)
            if output is None:
                output = flight.outputs[count] = SeqOutput(seq.request_id, (0,) * count)
            outputs.append(output)
        for chunk in self.scheduler.update(step, outputs):
            flight = self.flights[chunk.request_id]
            if flight.first is None:
                flight.first, flight.first_work = prompts_done, prompts_work
            if chunk.finish_reason is not None:
                self._finish(chunk.request_id, flight)

    def _finish(self, name: str, flight: _Flight) -> None:
        del self.flights[name], self.scheduler.cached[name]
        self.finished += 1
        assert flight.first is not None
        if 0 <= flight.number < self.measured:
            # An answer of one token ends with the pass over its prompt.
            last, work = (self.now, self.work) if flight.call.output > 1 else (flight.first, flight.first_work)
            to_first = add(add(flight.first_work, flight.entered, -1.0), _REQUEST)
            rest = add(work, flight.first_work, -1.0)
            self.served.append(Served(flight.call, flight.sent, flight.first, last, to_first, rest))
        if self.loop.concurrency is not None:
            self._send_next(self.now)

    def _tokens(self, flight: _Flight, steps: int) -> int:
        """Tokens that a request gets in so many steps: `acceptance` each, the fractions carried."""
        wanted = flight.carry + steps * self.loop.acceptance
        count = int(wanted + _SOON)
        flight.carry = wanted - count
        return count

    # ── many steps ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _leap(self, step: StepInput) -> None:
        """The equal steps that follow, up to and with the one in which the next call comes."""
        running, gain = self.scheduler.running, self.loop.acceptance
        flights = [self.flights[request.request_id] for request in running]
        carried = [flight.carry for flight in flights]
        steps = min(steady_steps(self.scheduler, step, gain, carried), _MOST_AT_ONCE)
        if steps < 1:
            return
        contexts = [len(request.token_ids) for request in running]
        if self.coming:
            until = self.coming[0][0] - self.now
            if until <= _SOON:
                return
            one = seconds(self._decode_work(contexts, gain), self.factors)
            steps = min(steps, math.ceil(until / one))
        work = tuple(steps * amount for amount in self._decode_work(contexts, (steps - 1) / 2 * gain))
        began = self.now
        self._pass(work)
        self._count(self.now - began, len(running), bool(self.scheduler.waiting))
        self.passed = _Passed(began, self.now, work)
        leap(self.scheduler, [self._tokens(flight, steps) for flight in flights])

    def _decode_work(self, contexts: Sequence[int], more: float) -> Work:
        """A decode step of all, when each has `more` tokens more than now."""
        topk, count = self.times.topk, len(contexts)
        if min(contexts) + more >= topk:
            seen = float(count * topk)
        else:
            seen = sum(min(context + more, topk) for context in contexts)
        return self.times.decode(count, seen, sum(contexts) + count * more, self.factors)
