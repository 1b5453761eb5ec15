"""Loads a checkpoint into an engine, drives it step by step, and measures: decode at given contexts, and prefill.

Everything is the engine as it serves: scheduler, batch, layers, head, sampler, and the text work of a stream, all on
one thread here (a server does the text work on another). Three things are not as they would be:

- A decode starts from a cache that was filled with random values, not computed: a deep context would take minutes.
  Values do not change what is read, but random keys spread the selection evenly over the context, which is the least
  friendly order to read latents in.
- The token that a step is given is random and not the one that was sampled: a model with random weights soon repeats
  itself, and with it the choice of experts, which then come from the processor's cache.
- Sampling is greedy, and nothing is drafted: random tokens would never be the drafts.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from freehold.engine.bench.ceilings import measure_ceilings
from freehold.engine.bench.clock import check_sums
from freehold.engine.bench.profile import Profiler
from freehold.engine.bench.report import BenchReport, Scenario, scenario
from freehold.engine.bench.stored import processor, stored_formats
from freehold.engine.engine import Engine
from freehold.engine.loading import EngineOptions, Progress, build_engine
from freehold.engine.request import Request
from freehold.engine.runner import ModelRunner
from freehold.engine.step import NewRequest, SeqOutput, StepInput
from freehold.errors import EngineError, InvalidRequest
from freehold.model.cache import IndexCache, LatentCache, cache_bytes_per_token
from freehold.model.config import GlmConfig
from freehold.model.ops.native import DEFAULT_THREADS
from freehold.model.packing import Quantize
from freehold.model.tokenizer import Tokenizer
from freehold.model.traffic import (
    Ceilings,
    Formats,
    Part,
    Traffic,
    decode_step,
    prefill_steps,
    step_traffic,
    total,
)
from freehold.types import SamplingParams, TokenChunk

Detokenizer = Callable[[int], object]
"""Takes the tokens of one output, one at a time."""

_SERVED = EngineOptions()  # what a server has by default
_WARM_UP = 6  # steps before the first sample, half of them profiled
_FILLED = 1 << 16  # slots filled at a time
_SEED = 0


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """contexts × batches are decoded; each of prefills is a prompt. samples: steps of each kind, plain and profiled; a
    prompt is computed a tenth as often (at least 3 times). threads: default one a core. quantize: of the weights.
    index_cache, latent_cache: as `EngineOptions` has them."""

    contexts: Sequence[int] = (128, 4096)
    batches: Sequence[int] = (1,)
    prefills: Sequence[int] = (512,)
    samples: int = 30
    threads: int | None = None
    quantize: Quantize | None = None
    index_cache: IndexCache = "auto"
    latent_cache: LatentCache = "auto"

    @property
    def steps(self) -> int:
        """Steps of one decode: warm-up, plain and profiled."""
        return _WARM_UP + 2 * self.samples

    def check(self, config: GlmConfig) -> None:
        """Raise InvalidRequest for what this model cannot do."""
        for name, values, most in (
            ("context", self.contexts, config.max_position_embeddings - self.steps),
            ("batch", self.batches, _SERVED.max_num_batched_tokens // 2),  # room for prompts beside those that decode
            ("prefill", self.prefills, config.max_position_embeddings - 1),
        ):
            wrong = next((value for value in values if not 1 <= value <= most), None)
            if wrong is not None:
                raise InvalidRequest(f"--{name} {wrong}: must be 1 to {most:,} for this model")
        if not self.prefills and not (self.contexts and self.batches):
            raise InvalidRequest("nothing to measure: give --context and --batch, or --prefill")


def bench_engine(
    directory: str | Path,
    options: BenchOptions,
    detokenizer: Callable[[Tokenizer], Detokenizer],
    *,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> BenchReport:
    """Measure the machine, then the checkpoint's engine on it. say: told what is being measured.

    Raises what loading raises, and InvalidRequest or InsufficientMemory for sizes that do not fit.
    """
    directory = Path(directory)
    config = GlmConfig.from_file(directory)
    options.check(config)
    threads = options.threads or DEFAULT_THREADS
    say("measuring the machine")
    ceilings = measure_ceilings(threads, torch.float32 if config.dtype == "float32" else torch.bfloat16)
    say("loading")
    engine, tokenizer = build_engine(directory, _engine_options(config, options), progress)
    runner = engine.runner
    assert isinstance(runner, ModelRunner)
    try:
        bench = _Bench(engine, runner, tokenizer, detokenizer, options, ceilings)
        scenarios = []
        if options.contexts and options.batches:
            say("filling the cache with random values")
            bench.fill()
        for context in options.contexts:
            for batch in options.batches:
                say(f"decode at {context:,}, {batch} at a time")
                scenarios.append(bench.decode(context, batch))
        for tokens in options.prefills:
            say(f"prefill of {tokens:,}")
            scenarios.append(bench.prefill(tokens))
    finally:
        engine.close()
    ops = runner.model.ops
    return BenchReport(
        model=engine.config.model_name,
        dtype=str(runner.model.dtype).removeprefix("torch."),
        ops=ops.name,
        isa=getattr(ops, "isa", None),
        threads=threads,
        cpu=processor(),
        formats=bench.formats.weights,
        ceilings=ceilings,
        scenarios=tuple(scenarios),
        latent=bench.formats.latent,
        index=bench.formats.index,
    )


def _engine_options(config: GlmConfig, options: BenchOptions) -> EngineOptions:
    """As a server has it by default, with a cache that is just large enough."""
    size, batch = _SERVED.block_size, max(options.batches, default=1)
    deepest = max((context + options.steps for context in options.contexts), default=0)
    # One block to spare for each sequence: the scheduler keeps it free when it admits.
    blocks = max(batch * (-(-deepest // size) + 1), -(-max(options.prefills, default=1) // size) + 2)
    dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16
    per_token = cache_bytes_per_token(config, dtype, options.index_cache, options.latent_cache)
    return EngineOptions(
        cache_bytes=blocks * size * per_token,
        max_num_seqs=max(batch, _SERVED.max_num_seqs),
        block_size=size,
        threads=options.threads,
        quantize=options.quantize,
        num_draft_tokens=0,
        index_cache=options.index_cache,
        latent_cache=options.latent_cache,
    )


class _Feed:
    """A runner that stands before the real one: it skips prompts while `filling`, and feeds random tokens after."""

    def __init__(self, runner: ModelRunner, draw: Callable[[], int]) -> None:
        self._runner, self._draw = runner, draw
        self._new: tuple[NewRequest, ...] = ()  # not told to the real runner yet
        self.filling = False

    def execute(self, step: StepInput) -> list[SeqOutput]:
        if not self.filling:
            outputs = self._runner.execute(replace(step, new=(*self._new, *step.new)))
            self._new = ()
            return [replace(output, token_ids=tuple(self._draw() for _ in output.token_ids)) for output in outputs]
        self._new += step.new
        # A prompt's last chunk gets a token, so that it decodes from here on; who decodes already waits for the others.
        return [
            SeqOutput(seq.request_id, (self._draw(),) if seq.samples and len(seq.token_ids) > 1 else ())
            for seq in step.seqs
        ]

    def release(self, request_ids: tuple[str, ...]) -> None:
        self._runner.release(request_ids)

    def close(self) -> None:
        self._runner.close()


class _Bench:
    """One loaded engine, and what is measured on it."""

    def __init__(
        self,
        engine: Engine,
        runner: ModelRunner,
        tokenizer: Tokenizer,
        detokenizer: Callable[[Tokenizer], Detokenizer],
        options: BenchOptions,
        ceilings: Ceilings,
    ) -> None:
        self._engine, self._runner, self._tokenizer, self._detokenizer = engine, runner, tokenizer, detokenizer
        self._options, self._ceilings = options, ceilings
        self._random = random.Random(_SEED)
        self._ordinary = min(engine.config.eos_token_ids) or engine.config.vocab_size  # ids below are text
        self._profiler = Profiler(runner)
        self._feed = engine.runner = _Feed(runner, self._draw)
        self._requests = 0
        self.formats: Formats = stored_formats(runner)

    def _draw(self) -> int:
        return self._random.randrange(self._ordinary)

    def fill(self) -> None:
        """Standard normal latents, rope keys and index keys, in every slot: the first two are normed to about that."""
        generator = torch.Generator().manual_seed(_SEED)
        cache = self._runner.cache
        with torch.inference_mode():
            for held in (*cache.latent, *cache.index):
                if isinstance(held, torch.Tensor):
                    held.normal_(generator=generator)
                elif held is not None:
                    slots, width = held.shape
                    for slots_T in torch.split(torch.arange(slots), _FILLED):
                        held.write(slots_T, torch.randn(len(slots_T), width, generator=generator))

    # ── decode ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def decode(self, context: int, batch: int) -> Scenario:
        """Steps in which each of `batch` requests gets one token; the middle sample sees `context` positions, or as few
        as the steps before it leave room for."""
        samples = self._options.samples
        prompt = max(1, context - 1 - _WARM_UP - samples)
        streams = self._start(prompt, batch)
        before = self._engine.scheduler.counters.preemptions
        plain: list[float] = []
        profiled: list[tuple[float, Mapping[Part, float]]] = []
        for step in range(self._options.steps):
            # In turn, so that whatever else the machine does, and the growing context, meets both.
            if step % 2:
                outcome = self._profiled(lambda: self._decode_step(streams, batch))
                if step >= _WARM_UP:
                    profiled.append(outcome)
            else:
                seconds = _timed(lambda: self._decode_step(streams, batch))
                if step >= _WARM_UP:
                    plain.append(seconds)
        check_sums(profiled)
        if self._engine.scheduler.counters.preemptions != before:
            raise EngineError("a request was preempted while it was measured")
        for name in streams:
            self._engine.abort(name)
        self._engine.step()
        first = prompt + 1 + _WARM_UP
        seen = (first, first + 2 * samples - 1)
        middle = first + samples  # which is `context`, unless that is less than the steps before the middle
        traffic = step_traffic(self._runner.model.config, self.formats, decode_step(middle, batch))
        return scenario("decode", seen, batch, context, traffic, self._ceilings, plain, profiled)

    def _start(self, prompt: int, batch: int) -> dict[str, Detokenizer]:
        """Requests that are about to decode, as if their prompts had been computed."""
        streams = {}
        params = SamplingParams(max_tokens=self._options.steps + 2, temperature=0.0, ignore_eos=True)
        for _ in range(batch):
            request = self._request(prompt, params)
            self._engine.add(request)
            streams[request.request_id] = self._detokenizer(self._tokenizer)
        scheduler = self._engine.scheduler
        steps = batch * (prompt // (self._engine.config.max_num_batched_tokens // 2) + 2)  # more than it can take
        with self._filling():
            for _ in range(steps):
                if not scheduler.waiting and all(
                    request.num_computed_tokens == request.num_tokens - 1 for request in scheduler.running
                ):
                    return streams
                self._step()
        raise EngineError(f"{batch} requests of {prompt:,} tokens did not all start: the cache is too small for them")

    def _decode_step(self, streams: Mapping[str, Detokenizer], batch: int) -> None:
        chunks = self._step()
        produced = 0
        for chunk in chunks:
            produced += len(chunk.token_ids)
        if produced != batch:
            raise EngineError(f"a decode step of {batch} requests gave {produced} tokens")
        with self._profiler.charge("tokenizer"):
            for chunk in chunks:
                for token_id in chunk.token_ids:
                    streams[chunk.request_id](token_id)

    # ── prefill ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def prefill(self, tokens: int) -> Scenario:
        """Whole prompts, in chunks as a server computes them, up to the first token."""
        repeats = max(3, self._options.samples // 10)
        plain: list[float] = []
        profiled: list[tuple[float, Mapping[Part, float]]] = []
        self._prompt(tokens)()  # warm-up
        for _ in range(repeats):
            plain.append(_timed(self._prompt(tokens)))
            profiled.append(self._profiled(self._prompt(tokens)))
        check_sums(profiled)
        config = self._runner.model.config
        traffic: dict[Part, Traffic] = {}
        for step in prefill_steps(tokens, self._engine.config.max_num_batched_tokens):
            for part, moved in step_traffic(config, self.formats, step).items():
                traffic[part] = total((traffic.get(part, Traffic()), moved))
        return scenario("prefill", (tokens, tokens), 1, tokens, traffic, self._ceilings, plain, profiled)

    def _prompt(self, tokens: int) -> Callable[[], None]:
        """What computes one new prompt. Its text is made now; tokenising it again need not give the same tokens."""
        text = self._tokenizer.decode([self._draw() for _ in range(tokens)])
        request = self._request(tokens, SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True))

        def compute() -> None:
            with self._profiler.charge("tokenizer"):
                self._tokenizer.encode(text)
            self._engine.add(request)
            while self._engine.has_work:
                self._step()

        return compute

    # ── both ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _request(self, tokens: int, params: SamplingParams) -> Request:
        self._requests += 1
        return Request(f"bench-{self._requests}", [self._draw() for _ in range(tokens)], params)

    def _step(self) -> list[TokenChunk]:
        chunks = self._engine.step()
        failed = next((chunk.error for chunk in chunks if chunk.error is not None), None)
        if failed is not None:
            raise failed
        return chunks

    def _profiled(self, work: Callable[[], None]) -> tuple[float, Mapping[Part, float]]:
        """(seconds, by part) of work done with the profiler on."""
        self._profiler.start()
        try:
            seconds = _timed(work)
        finally:
            parts = self._profiler.stop()
        return seconds, parts

    @contextmanager
    def _filling(self) -> Iterator[None]:
        self._feed.filling = True
        try:
            yield
        finally:
            self._feed.filling = False


def _timed(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
