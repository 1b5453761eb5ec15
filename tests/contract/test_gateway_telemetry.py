"""Spans of the real command, at a collector on a real socket: one call, its names old and new, and nobody's words."""

from __future__ import annotations

import gzip
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from _gateway import (
    ADMIN_KEY,
    KEY,
    UPSTREAM_KEY,
    Gateway,
    Upstream,
    alias_table,
    chat,
    key_table,
    upstream,
    upstream_table,
)

pytest.importorskip("opentelemetry.sdk", reason="the extra `otel` is not installed")
proto: Any = pytest.importorskip(
    "opentelemetry.proto.collector.trace.v1.trace_service_pb2", reason="the extra `otel` is not installed"
)

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SECRET = "the-words-of-a-client"
HEADERS = {
    "x-prompt-name": "summary",
    "x-prompt-version": "7",
    "x-user-id": "ann@example.org",
    "traceparent": f"00-{TRACE}-{SPAN}-01",
}


class Collector:
    """Takes OTLP over HTTP. bodies: as they came, unpacked."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.paths: list[str] = []
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.paths.append(self.path)
                collector.bodies.append(gzip.decompress(body) if self.headers["content-encoding"] == "gzip" else body)
                self.send_response(200)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/v1/traces"

    def spans(self) -> list[tuple[Any, dict[str, Any], dict[str, Any]]]:
        """Each span with its attributes and those of its resource."""
        found = []
        for body in self.bodies:
            for resource in proto.ExportTraceServiceRequest.FromString(body).resource_spans:
                about = read(resource.resource.attributes)
                found += [
                    (span, read(span.attributes), about) for scope in resource.scope_spans for span in scope.spans
                ]
        return found

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def read(attributes: Any) -> dict[str, Any]:
    """Attributes of the protocol as a dictionary."""

    def value(of: Any) -> Any:
        kind = of.WhichOneof("value")
        found = getattr(of, kind)
        return [value(each) for each in found.values] if kind == "array_value" else found

    return {each.key: value(each.value) for each in attributes}


@pytest.fixture
def collector() -> Iterator[Collector]:
    started = Collector()
    yield started
    started.stop()


@pytest.fixture
def up() -> Iterator[Upstream]:
    with upstream() as running:
        yield running


def test_a_call_of_a_running_gateway_becomes_a_span(collector: Collector, up: Upstream, tmp_path: Path) -> None:
    up.script("first", status=500, fault="status")
    text = upstream_table("first", up.base("first")) + upstream_table("second", up.base("second"))
    text += alias_table("other", "second") + alias_table("m", "first", fallback=("other",)) + key_table()
    text += f'[telemetry]\nendpoint = "{collector.url}"\n'
    with Gateway(tmp_path, text) as gateway:
        answer = gateway.ask(body=chat(SECRET, user="bob@example.org", max_tokens=20), headers=HEADERS)
        assert answer.status == 200, answer
    # It has ended, and has told all it had to tell.
    (failed, served) = sorted(collector.spans(), key=lambda each: each[1]["freehold.attempt"])
    told = served[1]
    for old, new in (
        ("gen_ai.system", "gen_ai.provider.name"),
        ("gen_ai.usage.prompt_tokens", "gen_ai.usage.input_tokens"),
        ("gen_ai.usage.completion_tokens", "gen_ai.usage.output_tokens"),
    ):
        assert told[old] == told[new], (old, new)
    (failed_row, row) = gateway.rows()
    assert told["gen_ai.provider.name"] == row["upstream"] == "second"
    assert (told["gen_ai.usage.input_tokens"], told["gen_ai.usage.output_tokens"]) == (
        row["input_tokens"],
        row["output_tokens"],
    )
    assert (told["gen_ai.prompt.name"], told["gen_ai.prompt.version"]) == ("summary", "7")
    assert (told["gen_ai.operation.name"], told["gen_ai.request.model"]) == ("chat", row["model_id"])
    assert (told["freehold.row.id"], told["freehold.request.id"]) == (row["row_id"], row["request_id"])
    assert row["row_id"] == answer.headers["x-freehold-row"]
    assert served[2]["service.name"] == "freehold-gateway"
    # Both attempts are of the client's trace, and the one that failed says so.
    for span, _, _ in (failed, served):
        assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, SPAN)
        assert span.kind == span.SPAN_KIND_CLIENT
        assert 0 < span.end_time_unix_nano - span.start_time_unix_nano < 60e9
    assert (failed[1]["error.type"], failed[1]["freehold.row.id"]) == ("500", failed_row["row_id"])
    assert failed[0].status.code == 2
    assert served[0].status.code != 2
    # Nobody's words, name or key has left the machine.
    sent = b"".join(collector.bodies)
    for secret in (SECRET, KEY, UPSTREAM_KEY, ADMIN_KEY, "ann@example.org", "bob@example.org", "tester"):
        assert secret.encode() not in sent, secret
    assert set(collector.paths) == {"/v1/traces"}


def test_a_collector_that_is_not_there_spoils_no_call(up: Upstream, tmp_path: Path) -> None:
    text = upstream_table("one", up.base("one")) + alias_table("m", "one") + key_table()
    text += '[telemetry]\nendpoint = "http://127.0.0.1:9/v1/traces"\n'
    with Gateway(tmp_path, text) as gateway:
        for _ in range(3):
            answer = gateway.ask(body=chat(max_tokens=5), headers=HEADERS)
            assert answer.status == 200
        assert gateway.admin("/metrics").status == 200
