"""What each fault of an upstream must become at the client, as a table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

CONNECT, FIRST_BYTE, BETWEEN, TOTAL = 0.5, 1.0, 1.0, 4.0
TIMEOUTS = f"""
[upstreams.{{name}}.timeouts]
connect = {CONNECT}
first_byte = {FIRST_BYTE}
between_chunks = {BETWEEN}
total = {TOTAL}
[upstreams.{{name}}.breaker]
failures = 100000
"""


@dataclass(frozen=True)
class Fault:
    """script: of the upstream. status: what may come where nothing else can answer. seconds: by when.

    before: the fault shows before the first byte, so another upstream can still answer.
    """

    name: str
    script: dict[str, Any]
    stream: bool
    status: tuple[int, ...]
    seconds: float = 1.0
    before: bool = True
    tokens: int = 0
    error: tuple[str, ...] = field(default=("http", "connect", "timeout", "cut", "invalid"))

    def __str__(self) -> str:
        return self.name


def _of(name: str, *, stream: bool, status: tuple[int, ...] = (502,), **more: Any) -> Fault:
    script = {"fault": name} | more.pop("script", {})
    return Fault(f"{more.pop('label', name)}-{'stream' if stream else 'whole'}", script, stream, status, **more)


def _before(stream: bool) -> list[Fault]:
    """Faults that show before anything has reached the client."""
    codes = [
        _of("status", label=str(code), stream=stream, status=(code,), script={"status": code}, error=("http",))
        for code in (429, 500, 503, 529)
    ]
    late = (504,)
    return [
        *codes,
        _of("close", stream=stream, error=("connect", "cut")),
        _of("reset", stream=stream, error=("connect", "cut")),
        _of("not_http", stream=stream, error=("invalid", "connect")),
        _of("redirect", stream=stream, script={"body": "http://127.0.0.1:9/v1"}, error=("http", "invalid")),
        _of("switch", stream=stream, error=("http", "invalid", "connect")),
        _of("garbage", stream=stream, error=("invalid",)),
        _of("giant_header", stream=stream, script={"size": 4 << 20}, error=("invalid", "connect")),
        _of(
            "slow_headers",
            stream=stream,
            status=late,
            seconds=FIRST_BYTE + 1,
            script={"seconds": 9},
            error=("timeout",),
        ),
        _of("drip", stream=stream, status=late, seconds=FIRST_BYTE + 1, script={"seconds": 0.2}, error=("timeout",)),
        _of(
            "stall",
            stream=stream,
            status=late,
            seconds=FIRST_BYTE + BETWEEN + 1,
            script={"seconds": 9},
            error=("timeout",),
        ),
    ]


def _in_body() -> list[Fault]:
    """Of answers that are not streamed: half of the body came."""
    cut = {"error": ("cut", "connect", "invalid")}
    return [
        _of("reset", label="reset-half", stream=False, script={"after": 1}, **cut),
        _of("cut", stream=False, **cut),
        _of("eof", stream=False, **cut),
        _of("half_closed", stream=False, script={"seconds": 9}, **cut),
    ]


def _in_stream() -> list[Fault]:
    """After two tokens, which the client has: all that is left is to say what happened."""
    cut: dict[str, Any] = {"stream": True, "status": (200,), "before": False, "tokens": 2, "error": ("cut", "connect")}
    two = {"after": 2, "tokens": 6}
    return [
        _of("reset", label="reset-after", script=two, **cut),
        _of("cut", script=two, **cut),
        _of("eof", script=two, **cut),
        _of("half_closed", script=two | {"seconds": 9}, **cut),
        _of("garbage_event", script=two, **cut | {"error": ("invalid", "cut")}),
        _of("error_event", script=two, **cut | {"error": ("http", "cut", "invalid")}),
        _of(
            "stall",
            label="stall-after",
            script=two | {"seconds": 9},
            seconds=BETWEEN + 1,
            **cut | {"error": ("timeout",)},
        ),
    ]


FAULTS = [*_before(False), *_before(True), *_in_body(), *_in_stream()]
