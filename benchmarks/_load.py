"""A load generator in a process of its own: a line of JSON in for each job, a line of JSON out.

    {"url", "path", "headers", "bodies": [JSON text, used in turn], "mode": "closed" | "open",
     "count", "connections": of a closed loop, "rate": a second, of an open one, "seed"}

An open loop sends at the moments of a Poisson process, whatever became of earlier requests, and counts latency from
when a request was due: a server that stalls cannot hide it. Answers: {"seconds", "ok", "errors": {what: how many},
"latencies": [s, of whole answers], "first": [s, to the first byte of the body], "delays": [s, of stamped chunks],
"tokens"}.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections import Counter
from typing import Any

from _http import Answer, Client


async def closed(client: Client, requests: list[bytes], count: int, connections: int) -> list[tuple[float, Answer]]:
    done: list[tuple[float, Answer]] = []
    numbers = iter(range(count))

    async def worker() -> None:
        for number in numbers:
            answer = await client.send(requests[number % len(requests)])
            done.append((answer.started, answer))

    await asyncio.gather(*(worker() for _ in range(connections)))
    return done


async def opened(
    client: Client, requests: list[bytes], count: int, rate: float, seed: int
) -> list[tuple[float, Answer]]:
    draw = random.Random(seed)
    done: list[tuple[float, Answer]] = []

    async def one(due: float, request: bytes) -> None:
        done.append((due, await client.send(request)))

    tasks = []
    due = time.monotonic() + 0.01
    for number in range(count):
        due += draw.expovariate(rate)
        wait = due - time.monotonic()
        if wait > 0:
            await asyncio.sleep(wait)
            due = max(due, time.monotonic())  # a late alarm of our own is not the server's
        tasks.append(asyncio.create_task(one(due, requests[number % len(requests)])))
    await asyncio.gather(*tasks)
    return done


async def run(job: dict[str, Any]) -> dict[str, Any]:
    client = Client(job["url"])
    headers = job.get("headers") or {}
    requests = [client.request(job["path"], body.encode(), headers) for body in job["bodies"]]
    start = time.monotonic()
    if job["mode"] == "closed":
        done = await closed(client, requests, job["count"], job["connections"])
    else:
        done = await opened(client, requests, job["count"], job["rate"], job.get("seed", 0))
    seconds = time.monotonic() - start
    client.close()
    good = [(due, answer) for due, answer in done if answer.ok]
    bad = Counter(
        f"{answer.status} {answer.error or bytes(answer.body[:200])!r}" for _, answer in done if not answer.ok
    )
    return {
        "seconds": seconds,
        "ok": len(good),
        "errors": dict(bad.most_common(5)),
        "latencies": [answer.ended - due for due, answer in good],
        "first": [answer.first - due for due, answer in good if answer.first is not None],
        "delays": [delay for _, answer in good for delay in answer.delays],
        "tokens": sum(answer.tokens for _, answer in good),
    }


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(asyncio.run(run(json.loads(line)))), flush=True)
