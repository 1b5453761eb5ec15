"""Spans made from rows: names old and new, traces, and what reaches a collector over a real socket."""

from __future__ import annotations

import http.server
import threading
import time
from typing import Any

import pytest

pytest.importorskip("opentelemetry.sdk", reason="the extra `otel` is not installed")

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from freehold.gateway.call import Caller, Decision, Request
from freehold.gateway.telemetry import Telemetry, exporting
from freehold.ledger import Row

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def row(**more: Any) -> Row:
    told: dict[str, Any] = {"row_id": "r1", "request_id": "q1", "at": time.time(), "endpoint": "chat", "alias": "glm"}
    told |= {"upstream": "engine", "model_id": "glm-5.2", "status": 200, "duration": 2.0} | more
    return Row(**told)


def spans(*rows: Row, traceparent: str = "") -> list[ReadableSpan]:
    exporter = InMemorySpanExporter()
    telemetry = exporting("", exporter)
    for one in rows:
        if traceparent:
            telemetry.arrived(one.request_id, traceparent)
        telemetry(one)
    telemetry._provider.force_flush()
    found = list(exporter.get_finished_spans())
    telemetry.close()
    return found


def test_a_span_has_old_and_new_names() -> None:
    (span,) = spans(
        row(
            input_tokens=9,
            output_tokens=5,
            cached_tokens=4,
            reasoning_tokens=2,
            prompt_name="summary",
            prompt_version="7",
            ttft=0.25,
            finish_reason="stop",
            effort="high",
            experiment="trial",
            arm="new",
            served_arm="old",
            unit="hash",
        )
    )
    found = dict(span.attributes or {})
    for names in (
        ("gen_ai.provider.name", "gen_ai.system"),
        ("gen_ai.usage.input_tokens", "gen_ai.usage.prompt_tokens"),
        ("gen_ai.usage.output_tokens", "gen_ai.usage.completion_tokens"),
    ):
        assert found[names[0]] == found[names[1]]
    assert found["gen_ai.usage.input_tokens"] == 9
    assert (found["gen_ai.prompt.name"], found["gen_ai.prompt.version"]) == ("summary", "7")
    assert found["gen_ai.response.finish_reasons"] == ("stop",)
    assert (found["freehold.experiment.arm"], found["freehold.experiment.served_arm"]) == ("new", "old")
    assert (span.name, span.kind) == ("chat glm-5.2", SpanKind.CLIENT)
    assert span.start_time is not None
    assert span.end_time is not None
    assert (span.end_time - span.start_time) / 1e9 == pytest.approx(2.0)
    assert span.status.is_ok or span.status.is_unset


def test_a_version_without_a_name_is_kept_under_our_own_name() -> None:
    (span,) = spans(row(prompt_version="7"))
    found = dict(span.attributes or {})
    assert "gen_ai.prompt.version" not in found
    assert found["freehold.prompt.version"] == "7"


def test_errors_and_refusals() -> None:
    failed, gone = spans(
        row(status=500, error="http"), row(error="client_gone"), row(upstream="", model_id="", error="refused_here")
    )
    assert not failed.status.is_ok
    assert dict(failed.attributes or {})["error.type"] == "500"
    assert gone.status.is_unset


def test_attempts_of_a_request_share_a_trace() -> None:
    first, second, other = spans(row(), row(row_id="r2", attempt=1), row(request_id="q2"))
    ids = [span.context.trace_id for span in (first, second, other) if span.context]
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize("flags", ["01", "00"])
def test_the_trace_of_the_client_goes_on(flags: str) -> None:
    found = spans(row(), traceparent=f"00-{TRACE}-{SPAN}-{flags}")
    if flags == "00":
        assert not found, "a trace that its beginner does not sample is not sampled here"
        return
    assert found[0].context is not None
    assert f"{found[0].context.trace_id:032x}" == TRACE
    assert found[0].parent is not None
    assert f"{found[0].parent.span_id:016x}" == SPAN


def test_the_header_is_read_where_a_call_is_about_to_be_made() -> None:
    exporter = InMemorySpanExporter()
    telemetry = exporting("", exporter)
    headers = {"traceparent": f"00-{TRACE}-{SPAN}-01"}
    request = Request("q1", 0.0, "chat", Caller("k"), "glm", b"{}", headers)
    assert not telemetry.wants(request, Decision(()))
    telemetry(row())
    telemetry.close()
    (span,) = exporter.get_finished_spans()
    assert span.context is not None
    assert f"{span.context.trace_id:032x}" == TRACE


@pytest.mark.parametrize("header", ["", "00-1-2-01", f"00-{'0' * 32}-{SPAN}-01", f"00-{TRACE}-{SPAN}-01\n", "x" * 9999])
def test_a_malformed_traceparent_is_none(header: str) -> None:
    (span,) = spans(row(), traceparent=header)
    assert span.context is not None
    assert f"{span.context.trace_id:032x}" != TRACE


def test_a_collector_gets_them_by_otlp() -> None:
    bodies: list[bytes] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        telemetry = exporting(f"http://127.0.0.1:{server.server_address[1]}/v1/traces")
        assert isinstance(telemetry, Telemetry)
        telemetry(row(prompt_name="summary"))
        telemetry.close()
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert b"gen_ai.prompt.name" in bodies[0]
    assert b"freehold-gateway" in bodies[0]
