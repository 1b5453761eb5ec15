"""OpenTelemetry spans of a gateway's calls, made from the rows of its ledger. The extra `otel` has what it needs.

Of each attempt there is a CLIENT span. Attempts of one request share a trace: the client's, if it sent `traceparent`,
else one that its request id gives. The conventions for generative AI are being renamed while they are used, so the
table below has both spellings of a name, and a span has both. They are those of OpenTelemetry's semantic conventions
1.41 (old) and of the repository semantic-conventions-genai in November 2026 (new); all of status Development.

What was said is not in a span, nor is a key. Spans leave the machine only to the address that the settings name.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from freehold.errors import ConfigError
from freehold.gateway.call import Decision, Request
from freehold.ledger import Row

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter


class Name(NamedTuple):
    """An attribute: its names, all of which a span gets, and its value. None and "" are left out."""

    names: tuple[str, ...]
    value: Callable[[Row], Any]


OPERATIONS: Final[Mapping[str, str]] = {
    "chat": "chat",
    "messages": "chat",
    "responses": "chat",
    "completions": "text_completion",
    "embeddings": "embeddings",
}

NAMES: Final = (
    Name(("gen_ai.operation.name",), lambda row: OPERATIONS[row.endpoint]),
    Name(("gen_ai.provider.name", "gen_ai.system"), lambda row: row.upstream),
    Name(("gen_ai.request.model",), lambda row: row.model_id),
    Name(("gen_ai.response.model",), lambda row: row.model_id if row.status == 200 else None),
    Name(("gen_ai.request.stream",), lambda row: row.streamed),
    Name(("gen_ai.request.reasoning.level",), lambda row: row.effort),
    Name(("gen_ai.conversation.id",), lambda row: row.conversation),  # a keyed hash
    Name(("gen_ai.prompt.name",), lambda row: row.prompt_name),
    Name(("gen_ai.prompt.version",), lambda row: row.prompt_version if row.prompt_name else None),
    Name(("gen_ai.response.finish_reasons",), lambda row: (row.finish_reason,) if row.finish_reason else None),
    Name(("gen_ai.response.time_to_first_chunk", "gen_ai.server.time_to_first_token"), lambda row: row.ttft),
    Name(("gen_ai.usage.input_tokens", "gen_ai.usage.prompt_tokens"), lambda row: row.input_tokens),
    Name(("gen_ai.usage.output_tokens", "gen_ai.usage.completion_tokens"), lambda row: row.output_tokens),
    Name(("gen_ai.usage.cache_read.input_tokens",), lambda row: row.cached_tokens),
    Name(("gen_ai.usage.reasoning.output_tokens",), lambda row: row.reasoning_tokens),
    Name(("error.type",), lambda row: row.error and (str(row.status) if row.error == "http" else row.error)),
    Name(("http.response.status_code",), lambda row: row.status or None),
    Name(("freehold.request.id",), lambda row: row.request_id),
    Name(("freehold.row.id",), lambda row: row.row_id),
    Name(("freehold.attempt",), lambda row: row.attempt),
    Name(("freehold.alias",), lambda row: row.alias),
    Name(("freehold.prompt.version",), lambda row: row.prompt_version),  # also where the prompt has no name
    Name(("freehold.experiment.id",), lambda row: row.experiment),
    Name(("freehold.experiment.arm",), lambda row: row.arm),
    Name(("freehold.experiment.served_arm",), lambda row: row.served_arm),
    Name(("freehold.experiment.unit_hash",), lambda row: row.unit if row.experiment else None),
    Name(("freehold.shadow_of",), lambda row: row.shadow_of),
    Name(("freehold.cost_microdollars",), lambda row: row.cost),
    Name(("freehold.tokens.undelivered",), lambda row: row.undelivered_tokens or None),
)

INSTALL: Final = "pip install 'freehold[otel]'"
_TRACEPARENT: Final = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})\Z")
_KEPT: Final = 10_000  # traceparents of requests that have no row yet


def attributes(row: Row) -> dict[str, Any]:
    """All of a row that a span tells, under old and new names."""
    found: dict[str, Any] = {}
    for names, value in NAMES:
        told = value(row)
        if told is not None and told != "":
            for name in names:
                found[name] = told
    return found


class Telemetry:
    """An `Observer` of rows, and a `Sampler` for the trace that a call belongs to. provider: see `exporting`."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("freehold.gateway")
        self._parents: OrderedDict[str, tuple[int, int, int]] = OrderedDict()

    def wants(self, request: Request, decision: Decision) -> bool:
        """As a `Sampler`, which is asked about each call before its first attempt: a look at its headers, no texts."""
        if traceparent := request.headers.get("traceparent"):
            self.arrived(request.request_id, traceparent)
        return False

    def take(self, request: Request, row: Row, answer: str) -> None:
        """Never called: no text is wanted."""

    def arrived(self, request_id: str, traceparent: str) -> None:
        """Note the header `traceparent` of a request; one that is malformed counts as none."""
        found = _TRACEPARENT.match(traceparent)
        if found is None or not int(found[1], 16) or not int(found[2], 16):
            return
        self._parents[request_id] = int(found[1], 16), int(found[2], 16), int(found[3], 16)
        if len(self._parents) > _KEPT:
            self._parents.popitem(last=False)

    def __call__(self, row: Row) -> None:
        """Make the span of an attempt; exporting it is another thread's work."""
        from opentelemetry import trace
        from opentelemetry.trace.status import Status, StatusCode

        if not row.upstream:
            return  # nobody was called
        trace_id, span_id, flags = self._parents.get(row.request_id) or _own(row.request_id)
        parent = trace.NonRecordingSpan(
            trace.SpanContext(trace_id, span_id, is_remote=True, trace_flags=trace.TraceFlags(flags))
        )
        end = time.time_ns()  # rows are shown to us as soon as their attempt is over
        span = self._tracer.start_span(
            f"{OPERATIONS[row.endpoint]} {row.model_id}",
            context=trace.set_span_in_context(parent),
            kind=trace.SpanKind.CLIENT,
            attributes=attributes(row),
            start_time=end - int(row.duration * 1e9),
        )
        if row.error and row.error != "client_gone":
            span.set_status(Status(StatusCode.ERROR, row.error))
        span.end(end_time=end)

    def close(self) -> None:
        """Export what is left."""
        self._provider.shutdown()


def _own(request_id: str) -> tuple[int, int, int]:
    """A trace for a request that belongs to none: its attempts find it again."""
    digest = hashlib.blake2b(request_id.encode(), digest_size=24).digest()
    return int.from_bytes(digest[:16], "big") or 1, int.from_bytes(digest[16:], "big") or 1, 1


def exporting(endpoint: str, exporter: SpanExporter | None = None) -> Telemetry:
    """Telemetry that exports in batches by OTLP over HTTP. endpoint: such as http://127.0.0.1:4318/v1/traces.

    exporter: instead, for tests. Raises ConfigError where the extra is missing, with the line that installs it.
    """
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        if exporter is None:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

            exporter = OTLPSpanExporter(endpoint=endpoint)
    except ImportError as error:
        raise ConfigError(f"telemetry.endpoint: {error.name} is not installed: {INSTALL}") from None
    resource = Resource.create({"service.name": "freehold-gateway", "service.version": version("freehold")})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return Telemetry(provider)
