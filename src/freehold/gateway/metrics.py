"""What a gateway tells Prometheus, from the rows of its ledger: counts, tokens, money, latencies.

Recording is a few additions on our own objects, kept per combination of labels, because it happens in the middle of
every call; `prometheus_client` comes in only when somebody scrapes. All on the event loop, so there is no lock.

Labels are what the configuration names: aliases, upstreams, models, experiments, arms, and the fixed words of the
ledger. What a client may invent (a model that does not exist, a prompt's name, a user) is never a label: it would be
somebody's text, and without bound. Nor is a key.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from freehold.gateway.parts import Answer, Asked
from freehold.ledger import Row

# Seconds. TTFT and duration share bounds with the engine's metrics as far as they go.
TTFT_BUCKETS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0)
TPOT_BUCKETS = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
DURATION_BUCKETS = (
    0.1,
    0.3,
    0.5,
    0.8,
    1.0,
    1.5,
    2.0,
    2.5,
    5.0,
    10.0,
    15.0,
    20.0,
    30.0,
    60.0,
    120.0,
    240.0,
    480.0,
    960.0,
)

NAME = "freehold_gateway_"
WHERE = ("endpoint", "alias", "upstream", "model", "experiment", "arm", "shadow")
TOKENS = ("input", "cached", "output", "reasoning", "undelivered")


class Place(NamedTuple):
    """The values of `WHERE`."""

    endpoint: str
    alias: str
    upstream: str
    model: str
    experiment: str
    arm: str
    shadow: str


class _Histogram:
    """Counts by bucket, and a sum."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def cumulated(self) -> list[tuple[str, float]]:
        """(upper bound, how many are not above it), as Prometheus has it."""
        found, count = [], 0
        for bound, here in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            count += here
            found.append((bound, float(count)))
        return found


class _Child:
    """All numbers of one place. outcomes: attempts by (status, error class)."""

    __slots__ = (
        "cached",
        "cost",
        "duration",
        "input",
        "outcomes",
        "output",
        "reasoning",
        "tpot",
        "ttft",
        "undelivered",
    )

    def __init__(self) -> None:
        self.outcomes: dict[tuple[int, str], int] = {}
        self.input = self.cached = self.output = self.reasoning = self.undelivered = 0
        self.cost = 0  # micro-dollars
        self.ttft = _Histogram(TTFT_BUCKETS)
        self.tpot = _Histogram(TPOT_BUCKETS)
        self.duration = _Histogram(DURATION_BUCKETS)


class GatewayMetrics(Collector):
    """An `Observer` of rows, and the collector of a registry of its own.

    gauges: name (without the prefix) to (help, function that is called at a scrape).
    """

    def __init__(self, gauges: Mapping[str, tuple[str, Callable[[], float]]] | None = None) -> None:
        self._gauges = dict(gauges or {})
        self._children: dict[Place, _Child] = {}
        self._refused: dict[tuple[str, int], int] = {}
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def __call__(self, row: Row) -> None:
        self.observe(row)

    def observe(self, row: Row) -> None:
        """Count one row."""
        if not row.upstream:
            # No attempt was made, so nothing vouches for the alias: it may be any text of a client's.
            refused = (row.endpoint, row.status)
            self._refused[refused] = self._refused.get(refused, 0) + 1
            return
        shadow = "yes" if row.shadow_of else "no"
        place = Place(
            row.endpoint, row.alias, row.upstream, row.model_id, row.experiment, row.served_arm or row.arm, shadow
        )
        child = self._children.get(place)
        if child is None:
            child = self._children[place] = _Child()
        outcome = (row.status, row.error)
        child.outcomes[outcome] = child.outcomes.get(outcome, 0) + 1
        child.input += row.input_tokens or 0
        child.cached += row.cached_tokens or 0
        child.output += row.output_tokens or 0
        child.reasoning += row.reasoning_tokens or 0
        child.undelivered += row.undelivered_tokens
        child.cost += row.cost or 0
        child.duration.observe(row.duration)
        if row.ttft is not None:
            child.ttft.observe(row.ttft)
        if row.tpot is not None:
            child.tpot.observe(row.tpot)

    def collect(self) -> Iterable[Metric]:
        attempts = CounterMetricFamily(f"{NAME}attempts", "Attempts at upstreams.", labels=(*WHERE, "status", "error"))
        tokens = CounterMetricFamily(
            f"{NAME}tokens", "Tokens, by kind; reasoning is part of output.", labels=(*WHERE, "kind")
        )
        cost = CounterMetricFamily(f"{NAME}cost_dollars", "What attempts cost.", labels=WHERE)
        ttft = HistogramMetricFamily(
            f"{NAME}time_to_first_token_seconds", "To the first token of any kind.", labels=WHERE
        )
        tpot = HistogramMetricFamily(f"{NAME}time_per_output_token_seconds", "After the first token.", labels=WHERE)
        duration = HistogramMetricFamily(f"{NAME}attempt_duration_seconds", "Of whole attempts.", labels=WHERE)
        for place, child in self._children.items():
            for (status, error), count in child.outcomes.items():
                attempts.add_metric((*place, str(status), error), count)
            for kind in TOKENS:
                tokens.add_metric((*place, kind), getattr(child, kind))
            cost.add_metric(place, child.cost / 1e6)
            for family, histogram in ((ttft, child.ttft), (tpot, child.tpot), (duration, child.duration)):
                family.add_metric(place, histogram.cumulated(), histogram.total)
        refused = CounterMetricFamily(
            f"{NAME}refused", "Requests that limits or policy did not let through.", labels=("endpoint", "status")
        )
        for (endpoint, code), count in self._refused.items():
            refused.add_metric((endpoint, str(code)), count)
        yield from (attempts, tokens, cost, ttft, tpot, duration, refused)
        for name, (text, value) in self._gauges.items():
            yield GaugeMetricFamily(NAME + name, text, value=value())

    def text(self) -> bytes:
        """The exposition format, as a scrape gets it."""
        return generate_latest(self.registry)

    async def route(self, asked: Asked) -> Answer:
        """`GET /metrics`."""
        return Answer(self.text(), content_type=CONTENT_TYPE_LATEST)
