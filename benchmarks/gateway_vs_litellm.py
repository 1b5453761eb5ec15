"""What does a request cost in `freehold gateway`, in LiteLLM's proxy, and in nginx as a plain proxy?

One run, one machine, one upstream (`tests/faults/upstream.py`, which answers at once). Each server has a core of its
own; the upstream and the load generator share the other one. Everything that a call passes is on in ours: a key with
limits and a budget, a sticky canary of 5 %, usage read from the answer, a row in the ledger, metrics. LiteLLM does the
same job with less: a key and two weighted arms, without a database. The order of servers changes from round to round.

    requests    32 connections, closed loop, not streamed: CPU time of all the server's processes, from the kernel
    at 20/s     open loop, latency less the median without a server between; p99 is of all requests of a round
    half load   open loop at half of what the closed loop reached
    streams     10 new ones a second, 100 chunks each: CPU time of everything, over the chunks; each chunk's delay
    idle        resident memory after 20 requests; seconds from the start of the command until it answers ready

Medians of the rounds. Fails if any answer of ours is not the upstream's, or if a row is missing in the ledger.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any, TypeAlias

from _common import Report, arguments
from _gateway import KEY, Gateway, Upstream, environment, key_table, upstream, upstream_table
from _http import call
from _peers import LITELLM_VERSION, LiteLlm, Nginx, PeerFailed, litellm_environment, nginx_program
from _processes import Process, wait_until

PATH = "/v1/chat/completions"
CONNECTIONS = 32
STREAMS_A_SECOND, CHUNKS = 10, 100
USERS = 400


@dataclass(frozen=True)
class Sizes:
    """How much of each phase. Counts of requests; for LiteLLM a tenth of `closed`."""

    rounds: int
    closed: int
    steady: int
    half: float  # seconds
    streams: int


QUICK = Sizes(rounds=1, closed=1000, steady=60, half=1.5, streams=15)
FULL = Sizes(rounds=3, closed=12_000, steady=400, half=10.0, streams=100)


def settings(arms: tuple[str, str]) -> str:
    """Everything on."""
    limits = {"requests_per_minute": 10_000_000, "tokens_per_minute": 10**12, "max_concurrent": 10_000}
    return f"""
{upstream_table("stable", arms[0])}
{upstream_table("new", arms[1])}
[models.m]
arms = [
  {{ name = "stable", upstream = "stable", model = "model" }},
  {{ name = "new", upstream = "new", model = "model" }},
]
[experiments.trial]
alias = "m"
control = "stable"
canary = "new"
steps = [0.05]
max_requests = 1000000
guardrails = [
  {{ metric = "error", margin = 0.5 }},
  {{ metric = "ttft_p95", margin = 50.0 }},
  {{ metric = "cost", margin = 50.0 }},
]
[teams.all]
budget_per_day = 1000000.0
{key_table(team="all", budget_per_day=1000000.0, **limits)}
"""


def bodies(stream: bool) -> list[str]:
    """Requests of many users, about a kilobyte each."""
    words = "The quick brown fox jumps over the lazy dog. " * 18
    more: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    return [
        json.dumps(
            {
                "model": "m",
                "user": f"user-{number}",
                "messages": [
                    {"role": "system", "content": f"You are the assistant of user {number}."},
                    {"role": "user", "content": words},
                ],
                **more,
            }
        )
        for number in range(USERS)
    ]


class Load:
    """The load generator's process."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.plain, self.stream = bodies(False), bodies(True)

    def run(self, url: str, key: str, *, stream: bool = False, **job: Any) -> dict[str, Any]:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        headers |= {"x-prompt-name": "bench", "x-prompt-version": "1"}
        text = self.stream if stream else self.plain
        line = {"url": url, "path": PATH, "headers": headers, "bodies": text} | job
        pipe = self.process.process.stdin
        assert pipe is not None
        pipe.write(json.dumps(line).encode() + b"\n")
        pipe.flush()
        found: dict[str, Any] = json.loads(self.process.line(600))
        if found["errors"]:
            raise RuntimeError(f"{url}: {found['errors']}")
        return found


def p99(values: list[float]) -> float:
    return quantiles(values, n=100, method="inclusive")[98]


def measure(server: Process | None, url: str, key: str, load: Load, up: Upstream, sizes: Sizes, slow: bool) -> Any:
    """One round of one server; None as server is the upstream itself. Times in milliseconds."""
    plain = {"tokens": 20}
    for name in ("stable", "new"):
        up.script(name, **plain)
    load.run(url, key, mode="closed", count=20, connections=2)
    found: dict[str, float] = {}
    if server is not None:
        time.sleep(1.0)
        found["rss_mb"] = server.rss()
        found["ready_s"] = server.ready_seconds
    count = sizes.closed // 10 if slow else sizes.closed
    load.run(url, key, mode="closed", count=max(50, count // 10), connections=CONNECTIONS)
    cpu = server.cpu() if server else 0.0
    closed = load.run(url, key, mode="closed", count=count, connections=CONNECTIONS)
    rate = count / closed["seconds"]
    found |= {
        "rps": rate,
        "closed_p50": 1e3 * median(closed["latencies"]),
        "closed_p99": 1e3 * p99(closed["latencies"]),
    }
    if server is not None:
        found["cpu_request"] = 1e3 * (server.cpu() - cpu) / count
    steady = load.run(url, key, mode="open", count=sizes.steady, rate=20)
    found |= {"p50": 1e3 * median(steady["latencies"]), "p99": 1e3 * p99(steady["latencies"])}
    half = load.run(url, key, mode="open", count=max(20, int(rate / 2 * sizes.half)), rate=rate / 2)
    found |= {"half_p50": 1e3 * median(half["latencies"]), "half_p99": 1e3 * p99(half["latencies"])}
    for name in ("stable", "new"):
        up.script(name, tokens=CHUNKS, chunk_seconds=0.01, stamp=True)
    cpu = server.cpu() if server else 0.0
    streams = load.run(url, key, stream=True, mode="open", count=sizes.streams, rate=STREAMS_A_SECOND)
    if streams["tokens"] != CHUNKS * sizes.streams:
        raise RuntimeError(f"{url}: {streams['tokens']} chunks of {CHUNKS * sizes.streams} came")
    if server is not None:
        found["cpu_chunk"] = 1e3 * (server.cpu() - cpu) / streams["tokens"]
    found |= {"chunk_p50": 1e3 * median(streams["delays"]), "chunk_p99": 1e3 * p99(streams["delays"])}
    found |= {"ttft_p50": 1e3 * median(streams["first"]), "ttft_p99": 1e3 * p99(streams["first"])}
    return found


def requests_of(sizes: Sizes) -> Callable[[dict[str, float]], int]:
    """How many requests a round of ours was sent, as its rows must say."""
    fixed = 20 + sizes.closed // 10 + sizes.closed + sizes.steady + sizes.streams
    return lambda found: fixed + max(20, int(found["rps"] / 2 * sizes.half))


def check_answers(gateway: Gateway, up: Upstream) -> None:
    """The bytes of an answer are the upstream's own, but for its id."""
    up.script("stable", tokens=20)
    up.script("new", tokens=20)
    body = bodies(False)[0].encode()
    direct = call(up.base("stable"), "/chat/completions", body).json()
    ours = gateway.ask(PATH, body).json()
    for answer in (direct, ours):
        answer["id"] = answer["created"] = answer["model"] = ""
        answer["usage"]["prompt_tokens"] = answer["usage"]["total_tokens"] = 0
    if direct != ours:
        raise RuntimeError(f"{ours} is not {direct}")


def check_rows(gateway: Gateway, expected: int) -> dict[str, float]:
    """Every call has its row, with tokens, an arm and a prompt version; some are the canary's; metrics count."""
    wait_until(lambda: len(gateway.rows()) >= expected, 10, "rows are missing in the ledger", pause=0.2)
    rows = gateway.rows()
    whole = [row for row in rows if row["output_tokens"] and row["prompt_version"] == "1" and row["key_id"]]
    text = call(gateway.url, "/metrics", headers={"authorization": f"Bearer {KEY}"}).body.decode()
    metrics = sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(COUNTER))
    share = sum(row["arm"] == "new" for row in whole) / len(rows)
    return {"rows_missing": expected - len(whole), "canary_share": share, "not_in_metrics": expected - metrics}


Starter: TypeAlias = Callable[[Path, tuple[str, str], set[int]], Any]  # (directory, arms, cores) -> context manager


def starters(quick: bool, without: Sequence[str], report: Report) -> dict[str, Starter]:
    """How to start each server. What cannot be had is a bar that fails, unless it was left out on purpose."""
    found: dict[str, Starter] = {
        "freehold": lambda directory, arms, cores: Gateway(directory, settings(arms), cores=cores, env=environment())
    }
    if "nginx" not in without:
        if program := nginx_program():
            found["nginx"] = lambda directory, arms, cores: Nginx(program, directory, arms[0], cores)
        else:
            print("nginx is not to be had here: no floor is shown")
    if "litellm" not in without:
        try:
            place = litellm_environment()
        except PeerFailed as error:
            print(error)
            report.missing("LiteLLM")
            return found
        for kind in ("granian",) if quick else ("granian", "uvicorn"):
            found[f"LiteLLM {kind}"] = partial(_litellm, place, kind)
    return found


def _litellm(place: Path, kind: str, directory: Path, arms: tuple[str, str], cores: set[int]) -> LiteLlm:
    return LiteLlm(place, directory, arms, kind, cores)


def run_round(number: int, where: Path, up: Upstream, load: Load, sizes: Sizes, stacks: dict[str, Starter]) -> Any:
    """{server: its figures}. The order of the servers is another in each round."""
    cores = {min(os.sched_getaffinity(0))}
    arms = (up.base("stable"), up.base("new"))
    direct = measure(None, up.base("stable").removesuffix("/v1"), "", load, up, sizes, False)
    found = {"direct": direct}
    names = list(stacks)
    shift = number % len(names)
    for name in names[shift:] + names[:shift]:
        with stacks[name](where / f"{name.replace(' ', '-')}-{number}", arms, cores) as server:
            key = getattr(server, "key", KEY)
            figures = measure(server, server.url, key, load, up, sizes, name.startswith("LiteLLM"))
            if isinstance(server, Gateway):
                figures |= check_rows(server, requests_of(sizes)(figures))
                check_answers(server, up)
        figures |= {f"added_{name}": figures[name] - direct[base] for name, base in ADDED.items()}
        found[name] = figures
        print(
            f"round {number}, {name}: " + ", ".join(f"{key} {value:.3g}" for key, value in figures.items()), flush=True
        )
    return found


def conclude(report: Report, rounds: Sequence[dict[str, dict[str, float]]]) -> None:
    """Bars on the medians of the rounds."""
    report.samples["rounds"] = list(rounds)
    names = list(rounds[0])
    middle = {name: {key: median(one[name][key] for one in rounds) for key in rounds[0][name]} for name in names}
    report.samples["medians"] = middle
    columns = (
        "cpu_request",
        "cpu_chunk",
        "rps",
        "added_p50",
        "added_p99",
        "added_half_p99",
        "added_chunk_p50",
        "rss_mb",
    )
    print(f"\n{'':16}" + "".join(f"{column:>16}" for column in (*columns, "ready_s")))
    for name in names:
        print(
            f"{name:16}"
            + "".join(f"{middle[name].get(column, float('nan')):16.4g}" for column in (*columns, "ready_s"))
        )
    ours = middle["freehold"]
    report.bar(
        "requests without a whole row in the ledger", max(one["freehold"]["rows_missing"] for one in rounds), "==", 0
    )
    report.bar(
        "requests that the metrics did not count",
        max(abs(one["freehold"]["not_in_metrics"]) for one in rounds),
        "==",
        0,
    )
    report.bar("share of requests that went to the canary", ours["canary_share"], ">", 0.01)
    report.bar("CPU time of a request, ms", ours["cpu_request"], "<=", 0.30)
    report.bar("CPU time of a chunk, ms", ours["cpu_chunk"], "<=", 0.10)
    report.bar("latency added at 20 requests/s, p50, ms", ours["added_p50"], "<=", 1.5)
    report.bar("latency added at 20 requests/s, p99, ms", ours["added_p99"], "<=", 4.0)
    report.bar("latency added at half load, p99, ms", ours["added_half_p99"], "<=", 6.0)
    report.bar("resident memory when idle, MB", ours["rss_mb"], "<", 90.0)
    report.bar("seconds until ready", ours["ready_s"], "<", 1.5)
    peers = [name for name in names if name.startswith("LiteLLM")]
    if peers:
        best = min(middle[name]["cpu_request"] for name in peers)
        report.bar("CPU time of a request, the better LiteLLM over ours", best / ours["cpu_request"], ">=", 30)


COUNTER = "freehold_gateway_attempts_total{"
ADDED = {
    "p50": "p50",
    "p99": "p50",  # the machine's own jitter is charged to the server
    "half_p99": "half_p50",
    "chunk_p50": "chunk_p50",
    "chunk_p99": "chunk_p50",
    "ttft_p50": "ttft_p50",
    "ttft_p99": "ttft_p50",
}


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--without", action="append", default=[], choices=("litellm", "nginx"))
    args = parser.parse_args()
    report = Report("gateway_vs_litellm", args.quick)
    sizes = QUICK if args.quick else FULL
    stacks = starters(args.quick, args.without, report)
    if len(os.sched_getaffinity(0)) < 2:
        report.missing("two cores: one for the server, one for those who ask and answer")
        return report.finish()
    other = os.sched_getaffinity(0) - {min(os.sched_getaffinity(0))}
    script = str(Path(__file__).with_name("_load.py"))
    with (
        tempfile.TemporaryDirectory() as directory,
        upstream(cores=other) as up,
        Process([sys.executable, script], cores=other, stdin=True) as process,
    ):
        load = Load(process)
        rounds = [run_round(number, Path(directory), up, load, sizes, stacks) for number in range(sizes.rounds)]
    report.samples["litellm"] = LITELLM_VERSION
    conclude(report, rounds)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
