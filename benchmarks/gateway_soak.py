"""Does `freehold gateway` leak? Memory and sockets after many calls, most of them good and many of them not.

    soak        100,000 calls (`--quick`: 3,000), streamed or not, a part of them hit by every fault of
                `tests/faults/upstream.py`, a part aborted by the client: afterwards memory is what it was after the
                first tenth, sockets what they were before any call once the kept ones have idled out, every call has a
                row in the ledger, and no answer was unclear
    idle        10,000 connections that say nothing (`--quick`: 1,000): calls are answered beside them as before, and
                when they close everything is given back
    slow-loris  500 clients that send a byte a second of a request they never finish: calls are answered beside them,
                and the gateway lets them go (full runs only: it takes as long as its timeout)

Real sockets, the real command. Memory is the resident set of the gateway's processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from statistics import quantiles
from typing import Any

from _common import Report, arguments
from _gateway import KEY, Gateway, Upstream, alias_table, chat, key_table, upstream, upstream_table
from _http import Answer, Client
from _processes import wait_until

WORKERS = 48
TIMEOUTS = """
[upstreams.{name}.timeouts]
connect = 1.0
first_byte = 1.0
between_chunks = 0.5
total = 10.0
[upstreams.{name}.breaker]
failures = 1000000
"""
# Each has 1 % of the calls; the others are answered.
FAULTS: list[dict[str, Any]] = [
    {"fault": "status", "status": 500},
    {"fault": "status", "status": 429},
    {"fault": "close"},
    {"fault": "reset"},
    {"fault": "reset", "after": 2},
    {"fault": "cut", "after": 2},
    {"fault": "eof", "after": 2},
    {"fault": "half_closed", "after": 2, "seconds": 5},
    {"fault": "garbage"},
    {"fault": "garbage_event", "after": 2},
    {"fault": "error_event", "after": 2},
    {"fault": "not_http"},
    {"fault": "redirect", "body": "http://127.0.0.1:9/"},
    {"fault": "giant_header", "size": 1 << 20},
    {"fault": "gigantic", "size": 8 << 20},
    {"fault": "slow_headers", "seconds": 3},
    {"fault": "stall", "after": 2, "seconds": 3},
]
IDLE_SECONDS = 120.0  # by then the gateway has let go of a client that sends a byte a second


def settings(up: Upstream) -> str:
    text = upstream_table("bad", up.base("bad")) + TIMEOUTS.format(name="bad")
    text += upstream_table("good", up.base("good")) + TIMEOUTS.format(name="good")
    text += alias_table("alone", "bad") + alias_table("other", "good")
    return text + alias_table("safe", "bad", fallback=("other",)) + key_table()


def clear(answer: Answer, stream: bool) -> bool:
    """Whole, or broken off with an error that says so."""
    if answer.error:
        return answer.error == "aborted by us"
    if answer.status == 200 and stream:
        return b"data: [DONE]" in answer.body or b'"error"' in answer.body
    return answer.status == 200 or b'"error"' in answer.body


class Traffic:
    """Calls of all kinds from WORKERS connections."""

    def __init__(self, url: str) -> None:
        self.client = Client(url)
        self.random = random.Random(0)
        self.statuses: Counter[str] = Counter()
        self.unclear: list[str] = []
        self.sent = 0

    async def call(self) -> None:
        stream = self.random.random() < 0.4
        abort = self.random.randrange(1, 6) if stream and self.random.random() < 0.2 else None
        model = "safe" if self.random.random() < 0.5 else "alone"
        body = chat("word " * self.random.randrange(1, 200), model, stream=stream)
        self.sent += 1
        headers = {"authorization": f"Bearer {KEY}"}
        answer = await self.client.call("/v1/chat/completions", body, headers, abort_after=abort, limit=30)
        self.statuses[str(answer.status)] += 1
        if not clear(answer, stream):
            self.unclear.append(f"{answer.status} {answer.error} {bytes(answer.body[-200:])!r}")

    async def run(self, count: int) -> None:
        numbers = iter(range(count))

        async def worker() -> None:
            for _ in numbers:
                await self.call()

        await asyncio.gather(*(worker() for _ in range(WORKERS)))

    def close(self) -> None:
        self.client.close()


def settled(gateway: Gateway, up: Upstream, sockets: int) -> float:
    """Seconds until sockets are back to about `sockets`, and none at the upstream works for nobody; 60 at most."""
    start = time.monotonic()
    with contextlib.suppress(RuntimeError):  # then the bar says so
        wait_until(lambda: gateway.sockets() <= sockets + 4 and up.sockets() <= 4, 60, "sockets", pause=0.2)
    return time.monotonic() - start


async def soak(report: Report, gateway: Gateway, up: Upstream, count: int) -> None:
    up.script("bad", *({"share": 0.01, "tokens": 6} | fault for fault in FAULTS))
    up.script("good", tokens=6)
    idle = gateway.sockets()
    traffic = Traffic(gateway.url)
    await traffic.run(count // 10)
    await asyncio.sleep(1)
    before = gateway.rss()
    start = time.monotonic()
    await traffic.run(count - count // 10)
    seconds = time.monotonic() - start
    traffic.close()
    back = await asyncio.to_thread(settled, gateway, up, idle)
    after = gateway.rss()
    print(f"{traffic.sent} calls, {(count - count // 10) / seconds:.0f}/s: {dict(traffic.statuses)}")
    print(f"memory {before:.1f} -> {after:.1f} MB; sockets {idle} -> {gateway.sockets()} in {back:.1f} s")
    report.samples["soak"] = {
        "statuses": dict(traffic.statuses),
        "rss": [before, after],
        "unclear": traffic.unclear[:20],
    }
    for one in traffic.unclear[:5]:
        print("unclear:", one)
    report.bar("answers that were neither whole nor a clear error", len(traffic.unclear), "==", 0)
    report.bar("memory that the soak left behind, MB", after - before, "<=", 12)
    report.bar("sockets that the soak left behind", gateway.sockets() - idle, "<=", 4)
    made = sum(total["requests"] for total in up.totals().values())
    rows = 0

    def written() -> bool:
        nonlocal rows
        rows = sum(bool(row["upstream"]) for row in gateway.rows())
        return rows >= made

    with contextlib.suppress(RuntimeError):
        await asyncio.to_thread(wait_until, written, 5, "rows", 0.3)
    # Of an attempt that failed to connect, or whose client left before it was sent, the upstream knows nothing.
    report.bar("attempts that the upstream saw and the ledger has not", max(0, made - rows), "==", 0)


async def latencies(gateway: Gateway, count: int) -> float:
    """p99 of `count` calls, in seconds. Raises RuntimeError if one fails."""
    client = Client(gateway.url)
    found = []
    for _ in range(count):
        answer = await client.call(
            "/v1/chat/completions", chat(model="other"), {"authorization": f"Bearer {KEY}"}, limit=20
        )
        if not answer.ok:
            raise RuntimeError(f"{answer.status} {answer.error} {bytes(answer.body[:200])!r}")
        found.append(answer.seconds)
    client.close()
    return quantiles(found, n=100, method="inclusive")[98]


async def beside(
    report: Report, gateway: Gateway, what: str, count: int, open_one: Callable[[], Awaitable[asyncio.StreamWriter]]
) -> list[asyncio.StreamWriter]:
    """Opens connections and shows that calls are answered beside them."""
    alone = await latencies(gateway, 100)
    before, sockets = gateway.rss(), gateway.sockets()
    opened: list[asyncio.StreamWriter] = []
    while len(opened) < count:
        opened += await asyncio.gather(*(open_one() for _ in range(min(200, count - len(opened)))))
    await asyncio.to_thread(
        wait_until, lambda: gateway.sockets() >= sockets + count - 8, 30, f"{what}: not all are open"
    )
    crowded = await latencies(gateway, 100)
    held = gateway.rss()
    print(
        f"{what}: {count} open; p99 {1e3 * alone:.1f} -> {1e3 * crowded:.1f} ms, memory {before:.1f} -> {held:.1f} MB"
    )
    report.samples[what] = {"p99_alone": alone, "p99_beside": crowded, "rss": [before, held]}
    report.bar(f"{what}: kB of memory for each connection", 1000 * (held - before) / count, "<=", 40)
    report.bar(f"{what}: p99 of calls beside them, ms", 1e3 * crowded, "<=", max(250.0, 20e3 * alone))
    return opened


async def idle(report: Report, gateway: Gateway, count: int) -> None:
    host, port = gateway.url.removeprefix("http://").split(":")

    async def one() -> asyncio.StreamWriter:
        return (await asyncio.open_connection(host, int(port)))[1]

    sockets = gateway.sockets()
    writers = await beside(report, gateway, "idle connections", count, one)
    for writer in writers:
        writer.close()
    await asyncio.to_thread(wait_until, lambda: gateway.sockets() <= sockets + 4, 60, "idle connections are left over")
    report.bar("idle connections: sockets left over", gateway.sockets() - sockets, "<=", 4)


async def loris(report: Report, gateway: Gateway, count: int, to_the_end: bool) -> None:
    host, port = gateway.url.removeprefix("http://").split(":")
    readers: list[asyncio.StreamReader] = []

    async def one() -> asyncio.StreamWriter:
        reader, writer = await asyncio.open_connection(host, int(port))
        readers.append(reader)
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n")
        return writer

    sockets = gateway.sockets()
    writers = await beside(report, gateway, "slow-loris clients", count, one)
    start = time.monotonic()
    while to_the_end and time.monotonic() - start < IDLE_SECONDS and gateway.sockets() > sockets + 4:
        for writer in writers:
            with contextlib.suppress(ConnectionError):
                writer.write(b"x")
        await asyncio.sleep(1)
    if to_the_end:
        held = max(0, gateway.sockets() - sockets - 4)
        print(f"slow-loris clients: let go in {time.monotonic() - start:.0f} s")
        report.bar(f"slow-loris clients that are still there after {IDLE_SECONDS:g} s", held, "==", 0)
    for writer in writers:
        writer.close()
    await asyncio.to_thread(wait_until, lambda: gateway.sockets() <= sockets + 4, 60, "slow clients are left over")


async def run(report: Report, gateway: Gateway, up: Upstream, quick: bool) -> None:
    await soak(report, gateway, up, 3_000 if quick else 100_000)
    up.reset()
    await idle(report, gateway, 1_000 if quick else 10_000)
    await loris(report, gateway, 100 if quick else 500, to_the_end=not quick)
    text = gateway.log_text()
    report.bar("tracebacks in what the gateway wrote", text.count("Traceback"), "==", 0)
    report.samples["log"] = text[-3000:]


def main() -> int:
    args = arguments(__doc__).parse_args()
    report = Report("gateway_soak", args.quick)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65_536), hard))
    with (
        tempfile.TemporaryDirectory() as directory,
        upstream() as up,
        Gateway(Path(directory), settings(up)) as gateway,
    ):
        asyncio.run(run(report, gateway, up, args.quick))
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
