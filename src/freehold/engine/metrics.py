"""What an engine tells Prometheus: each quantity is recorded once and exported under our name and vLLM's.

Gateways, autoscalers and dashboards know vLLM's names (`vllm:num_requests_waiting`, `vllm:kv_cache_usage_perc`, …), so
the ones below carry the same meaning here. Ours are the same with the prefix `freehold_`, and a few that vLLM lacks.

Recording happens on the engine's thread, up to hundreds of times a step, so it is plain arithmetic on our own objects;
`prometheus_client` comes in only when somebody scrapes. There is one writer and no lock: a scrape from another thread
may see the count of an observation before its sum. Torch-free.

Source of the names and buckets: vLLM `v1/metrics/loggers.py`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from freehold.timing import StreamClock
from freehold.types import FinishReason, TokenChunk

if TYPE_CHECKING:
    from freehold.model.pager import PagingStats

TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
    640.0, 2560.0,
)  # fmt: skip
ITL_BUCKETS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
E2E_BUCKETS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
STEP_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The state and the totals of an engine, at one moment.

    waiting: requests that hold no blocks (queued or preempted). kv_usage: fraction of the cache's blocks held.
    prefix_*: prompt tokens looked up, and found, in the prefix cache. draft_rounds: how often a step verified drafts of
    a request; draft_…_at: drafts by place, the first behind the last token at index 0. finished: requests by reason.
    paging: of routed experts that are read from disk; None if all are held.
    """

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    draft_rounds: int = 0
    draft_proposed: int = 0
    draft_accepted: int = 0
    draft_proposed_at: tuple[int, ...] = ()
    draft_accepted_at: tuple[int, ...] = ()
    prompt_tokens: int = 0
    generation_tokens: int = 0
    finished: Mapping[FinishReason, int] = field(default_factory=dict)
    paging: PagingStats | None = None

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted drafts over proposed ones; None before any was proposed."""
        return self.draft_accepted / self.draft_proposed if self.draft_proposed else None

    @property
    def acceptance_length(self) -> float | None:
        """Tokens per step that verified drafts, 1 to k+1; None before the first."""
        return 1 + self.draft_accepted / self.draft_rounds if self.draft_rounds else None


class Histogram:
    """Counts by bucket."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def family(self, name: str, text: str, model_name: str) -> HistogramMetricFamily:
        buckets: list[tuple[str, float]] = []
        count = 0
        for bound, here in zip((*map(str, self.bounds), "+Inf"), tuple(self.counts), strict=True):
            count += here
            buckets.append((bound, count))
        family = HistogramMetricFamily(name, text, labels=["model_name"])
        family.add_metric([model_name], buckets, self.total)
        return family


@dataclass(slots=True)
class AdapterTotals:
    """Of the requests of one adapter: how many ended, prompt tokens of those that produced something, and tokens
    generated."""

    finished: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0


class EngineMetrics(Collector):
    """The metrics of one engine, in a registry of their own. `registry` is what `/metrics` exposes."""

    def __init__(
        self,
        model_name: str,
        stats: Callable[[], EngineStats],
        cache: Mapping[str, int] | None = None,
        adapters: Iterable[str] = (),
    ) -> None:
        """cache: its `block_size` and `num_gpu_blocks`, exported as labels, for routers that match prefixes.
        adapters: names of those that have totals of their own, beside being in those of the model."""
        self.model_name = model_name
        self.registry = CollectorRegistry()
        self.finished = dict.fromkeys(FinishReason, 0)
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.steps = 0
        self._stats = stats
        self._cache = {key: str(value) for key, value in (cache or {}).items()}
        self.adapters = {name: AdapterTotals() for name in adapters}
        self._clocks: dict[str, StreamClock] = {}
        self._adapter_of: dict[str, AdapterTotals] = {}  # by request that is being measured
        self._ttft = Histogram(TTFT_BUCKETS)
        self._itl = Histogram(ITL_BUCKETS)
        self._tpot = Histogram(ITL_BUCKETS)
        self._e2e = Histogram(E2E_BUCKETS)
        self._step = Histogram(STEP_BUCKETS)
        self.registry.register(self)

    def begin(self, request_id: str, arrival: float, adapter: str | None = None) -> None:
        """Measure this request from its arrival on. Requests that were not begun are left out (a warm-up)."""
        self._clocks[request_id] = StreamClock(arrival)
        if adapter is not None:
            self._adapter_of[request_id] = self.adapters[adapter]

    def record(self, chunks: Iterable[TokenChunk], now: float, *, step_seconds: float | None = None) -> None:
        """Note one step and the chunks it made; step_seconds is None where there was nothing to compute."""
        if step_seconds is not None:
            self.steps += 1
            self._step.observe(step_seconds)
        for chunk in chunks:
            clock = self._clocks.get(chunk.request_id)
            if clock is not None:
                if (totals := self._adapter_of.get(chunk.request_id)) is not None:
                    self._record_adapter(chunk, clock, totals)
                self._record_chunk(chunk, clock, now)

    def _record_chunk(self, chunk: TokenChunk, clock: StreamClock, now: float) -> None:
        if chunk.token_ids:
            self.generation_tokens += len(chunk.token_ids)
            gap = clock.tick(now, len(chunk.token_ids))
            if gap is not None:
                self._itl.observe(gap)
            else:
                self._ttft.observe(now - clock.started)
                self.prompt_tokens += chunk.usage.prompt_tokens
        if chunk.finish_reason is None:
            return
        del self._clocks[chunk.request_id]
        self.finished[chunk.finish_reason] += 1
        if chunk.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            if clock.first is None:  # max_tokens = 0: the prompt was all there was
                self.prompt_tokens += chunk.usage.prompt_tokens
            self._e2e.observe(now - clock.started)
            if clock.tpot is not None:
                self._tpot.observe(clock.tpot)

    def _record_adapter(self, chunk: TokenChunk, clock: StreamClock, totals: AdapterTotals) -> None:
        """As `_record_chunk` counts, and before it."""
        totals.generation_tokens += len(chunk.token_ids)
        if clock.first is None and (chunk.token_ids or chunk.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)):
            totals.prompt_tokens += chunk.usage.prompt_tokens
        if chunk.finish_reason is not None:
            totals.finished += 1
            del self._adapter_of[chunk.request_id]

    def mean_e2e(self) -> float | None:
        """Mean end-to-end seconds of the requests that ended by themselves; None before the first."""
        count = sum(self._e2e.counts)
        return self._e2e.total / count if count else None

    # ── scraping ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def describe(self) -> Iterable[Metric]:
        return ()  # tells the registry not to collect once just to learn the names

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        yield from self._gauges(stats)
        yield from self._counters(stats)
        yield from self._histograms()

    def _gauges(self, stats: EngineStats) -> Iterator[Metric]:
        for name, text, value in (
            ("num_requests_running", "Requests that hold cache blocks and are being computed.", stats.running),
            ("num_requests_waiting", "Requests that are queued, preempted ones included.", stats.waiting),
            ("kv_cache_usage_perc", "Fraction of the cache blocks held by requests; 1 is full.", stats.kv_usage),
        ):
            ours = "kv_cache_usage_ratio" if name == "kv_cache_usage_perc" else name
            for full in (f"freehold_{ours}", f"vllm:{name}"):
                gauge = GaugeMetricFamily(full, text, labels=["model_name"])
                gauge.add_metric([self.model_name], value)
                yield gauge

        info = GaugeMetricFamily(
            "vllm:cache_config_info", "Facts about the cache.", labels=["model_name", *self._cache]
        )
        info.add_metric([self.model_name, *self._cache.values()], 1)
        yield info

    def _counters(self, stats: EngineStats) -> Iterator[Metric]:
        for name, text, value in (
            ("prompt_tokens", "Prompt tokens of requests that produced something.", stats.prompt_tokens),
            ("generation_tokens", "Tokens generated.", stats.generation_tokens),
            ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.prefix_queries),
            ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.prefix_hits),
            ("num_preemptions", "Times a request lost its blocks and had to be recomputed.", stats.preemptions),
            ("spec_decode_num_drafts", "Times that a step verified drafts of a request.", stats.draft_rounds),
            ("spec_decode_num_draft_tokens", "Draft tokens proposed.", stats.draft_proposed),
            ("spec_decode_num_accepted_tokens", "Draft tokens accepted.", stats.draft_accepted),
        ):
            for full in (f"freehold_{name}", f"vllm:{name}"):
                counter = CounterMetricFamily(full, text, labels=["model_name"])
                counter.add_metric([self.model_name], value)
                yield counter
        for name, text in (
            ("finished", "Requests that ended, by adapter."),
            ("prompt_tokens", "Prompt tokens of requests that produced something, by adapter."),
            ("generation_tokens", "Tokens generated, by adapter."),
        ):
            full = "freehold_adapter_" + ("requests_finished" if name == "finished" else name)
            counter = CounterMetricFamily(full, text, labels=["model_name", "adapter"])
            for adapter, totals in self.adapters.items():
                counter.add_metric([self.model_name, adapter], getattr(totals, name))
            yield counter
        steps = CounterMetricFamily("freehold_steps", "Engine steps.", labels=["model_name"])
        steps.add_metric([self.model_name], self.steps)
        yield steps
        yield from self._drafts_by_place(stats)
        yield from self._finished(stats)
        if stats.paging is not None:
            yield from self._paging(stats.paging)

    def _paging(self, paging: PagingStats) -> Iterator[Metric]:
        for name, text, value in (
            ("expert_reads", "Routed experts read from disk.", paging.reads),
            ("expert_read_bytes", "Bytes of routed experts read from disk.", paging.read_bytes),
            ("expert_reads_ahead", "Of these experts, those read before a step asked for them.", paging.ahead),
            ("expert_reads_wasted", "Of those read ahead, those that went again unused.", paging.wasted),
            ("expert_wait_seconds", "How long steps stood still for reads of experts.", paging.wait_seconds),
        ):
            counter = CounterMetricFamily(f"freehold_{name}", text, labels=["model_name"])
            counter.add_metric([self.model_name], value)
            yield counter

    def _drafts_by_place(self, stats: EngineStats) -> Iterator[Metric]:
        """The first draft behind the last token is at position 0, as vLLM counts."""
        proposed, accepted = stats.draft_proposed_at, stats.draft_accepted_at
        for full, text, counts in (
            ("freehold_spec_decode_num_draft_tokens_per_pos", "Draft tokens proposed, by place.", proposed),
            ("freehold_spec_decode_num_accepted_tokens_per_pos", "Draft tokens accepted, by place.", accepted),
            ("vllm:spec_decode_num_accepted_tokens_per_pos", "Draft tokens accepted, by place.", accepted),
        ):
            counter = CounterMetricFamily(full, text, labels=["model_name", "position"])
            for at, count in enumerate(counts):
                counter.add_metric([self.model_name, str(at)], count)
            yield counter

    def _finished(self, stats: EngineStats) -> Iterator[Metric]:
        text = "Requests that ended, by reason (abort and error included)."
        for full in ("freehold_requests_finished", "vllm:request_success"):
            counter = CounterMetricFamily(full, text, labels=["model_name", "finished_reason"])
            for reason, count in stats.finished.items():
                counter.add_metric([self.model_name, reason.value], count)
            yield counter

    def _histograms(self) -> Iterator[Metric]:
        for name, text, histogram in (
            ("time_to_first_token_seconds", "From arrival to the first token, reasoning included.", self._ttft),
            (
                "inter_token_latency_seconds",
                "Between two chunks of a stream, which may have several tokens.",
                self._itl,
            ),
            ("e2e_request_latency_seconds", "From arrival to the last token.", self._e2e),
            ("request_time_per_output_token_seconds", "(E2E - TTFT) / (tokens - 1) of a request.", self._tpot),
        ):
            yield histogram.family(f"freehold_{name}", text, self.model_name)
            yield histogram.family(f"vllm:{name}", text, self.model_name)
        yield self._step.family("freehold_step_seconds", "Duration of an engine step.", self.model_name)
