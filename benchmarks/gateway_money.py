"""Is what `freehold gateway` records what the upstream generated and the client got, to the token, whatever happens?

    storm     concurrent calls, streamed and not, over two upstreams that fail before, in and after answers, with
              failovers, clients that break off, and clients that try again. The upstream counts what it generates, the
              client what it gets; each attempt's row is held against both:
                completed     tokens of the row = the upstream's own
                broken off    in a pause: tokens of the row = the client's, to the token. In full flow: not fewer than
                              the client read, and with the undelivered ones not more than the upstream sent
              and the budget's spend = the sum over the rows = those tokens at the price
    budget    calls that come at once, and cost most of a small budget each, never pass it by more than one
              reservation; the refusals say that trying again is of no use
    kill -9   the gateway is killed in the middle of traffic, 50 times (`--quick`: 3): every answer that a client had
              `FLUSH` before has its row, the database is sound, and spend is the sum of its rows. Rows are asked for
              only of a gateway that could run: one that waited for a core for long before it was killed is killed again

Prices are 1 and 2 dollars a million tokens, so one token is one or two micro-dollars and sums are exact.
"""

from __future__ import annotations

import asyncio
import random
import sqlite3
import sys
import tempfile
import time
from collections import Counter, defaultdict
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _common import Report, arguments
from _gateway import KEY, Gateway, Upstream, alias_table, chat, key_table, upstream, upstream_table
from _http import Answer, Client
from _processes import wait_until
from _starved import EVERY_SECONDS, Attention

FLUSH = 0.2  # seconds: what the settings allow at most
WATCHED = 0.3  # seconds before a kill, in which it is seen whether the gateway can run
PRICE = (1.0, 2.0)
WORKERS = 64
TIMEOUTS = """
[upstreams.{name}.timeouts]
connect = 1.0
first_byte = 2.0
between_chunks = 1.0
[upstreams.{name}.breaker]
failures = 1000000
"""
STORM: list[dict[str, Any]] = [
    {"fault": "status", "status": 500, "share": 0.05},
    {"fault": "status", "status": 429, "share": 0.03},
    {"fault": "close", "share": 0.03},
    {"fault": "reset", "share": 0.03},
    {"fault": "reset", "after": 3, "share": 0.03},
    {"fault": "cut", "after": 4, "share": 0.03},
    {"fault": "eof", "after": 5, "share": 0.03},
    {"fault": "error_event", "after": 2, "share": 0.02},
    {"fault": "slow_chunks", "seconds": 0.01, "share": 0.05},
]
PAUSE_AFTER = 4  # tokens, of the upstream "pauses"


def settings(up: Upstream, budget: float) -> str:
    text = ""
    for name in ("first", "second", "pauses"):
        text += upstream_table(name, up.base(name), price=PRICE) + TIMEOUTS.format(name=name)
    text += (
        alias_table("second", "second") + alias_table("m", "first", fallback=("second",)) + alias_table("p", "pauses")
    )
    return text + key_table(budget_per_day=budget)


@dataclass
class Sent:
    """One call of a client's. paused: it broke off while the upstream was silent, so both know what was delivered."""

    answer: Answer
    stream: bool
    aborted: bool
    paused: bool

    @property
    def request_id(self) -> str:
        return self.answer.headers.get("x-request-id", "")


class Storm:
    def __init__(self, url: str, seed: int = 0) -> None:
        self.client = Client(url)
        self.random = random.Random(seed)
        self.sent: list[Sent] = []

    async def one(self) -> None:
        draw = self.random
        stream, paused = draw.random() < 0.7, draw.random() < 0.15
        abort = None
        if paused:
            stream, abort = True, PAUSE_AFTER
        elif stream and draw.random() < 0.25:
            abort = draw.randrange(1, 12)
        body = chat(
            "word " * draw.randrange(1, 60), "p" if paused else "m", stream=stream, max_tokens=draw.randrange(8, 24)
        )
        if draw.random() < 0.3:
            body["stream_options"] = {"include_usage": True}
        for _ in range(2):  # as clients do, which try again at once
            headers = {"authorization": f"Bearer {KEY}"}
            answer = await self.client.call("/v1/chat/completions", body, headers, abort_after=abort, limit=30)
            aborted = answer.error == "aborted by us"
            self.sent.append(Sent(answer, stream, aborted, paused and aborted))
            if answer.status < 500 and answer.status != 429:
                return

    async def run(self, count: int) -> None:
        numbers = iter(range(count))

        async def worker() -> None:
            for _ in numbers:
                await self.one()

        await asyncio.gather(*(worker() for _ in range(WORKERS)))
        self.client.close()


def spend_of(gateway: Gateway) -> int:
    """What the database has for the key: micro-dollars, of all days."""
    with closing(sqlite3.connect(f"file:{gateway.database}?mode=ro", uri=True)) as database:
        row = database.execute("select coalesce(sum(spent), 0) from spend where scope = 'key:tester'").fetchone()
    return int(row[0])


def price(tokens_in: int, tokens_out: int) -> int:
    return round(tokens_in * PRICE[0] + tokens_out * PRICE[1])


def compare(
    calls: list[dict[str, Any]], rows: list[dict[str, Any]], sent: list[Sent]
) -> tuple[Counter[str], list[str]]:
    """How many attempts of each kind agree, and what does not."""
    by_request = defaultdict(list)
    for row in rows:
        by_request[row["request_id"], row["upstream"]].append(row)
    clients = {one.request_id: one for one in sent if one.request_id}
    kinds: Counter[str] = Counter()
    wrong: list[str] = []
    for call in calls:
        found = by_request[call["headers"]["x-request-id"], call["name"]]
        # An upstream that lost its connection before a byte may be tried once more: the rows are as many as the calls.
        row = found.pop(0) if found else None
        if row is None:
            wrong.append(f"no row for {call}")
            continue
        client = clients.get(row["request_id"])
        aborted = client is not None and client.aborted and row["error"] == "client_gone"
        got, undelivered = row["output_tokens"] or 0, row["undelivered_tokens"]
        if call["ended"] == "whole" and not aborted:
            kind = "completed"
            good = got == call["completion_tokens"] and row["input_tokens"] == call["prompt_tokens"] and not undelivered
            good = good and row["cost"] == price(call["prompt_tokens"], call["completion_tokens"])
        elif aborted and client is not None and client.paused:
            kind = "broken off in a pause"
            good = got == client.answer.tokens
        elif aborted and client is not None:
            kind = "broken off in full flow"
            good = client.answer.tokens <= got and got + undelivered <= max(call["completion_tokens"], got)
            good = good and got <= call["completion_tokens"]
        elif call["completion_tokens"] and row["streamed"]:
            kind = "failed in the stream"
            # If the failure came with the first tokens, none of them went out, and another upstream was asked.
            good = call["completion_tokens"] in (got, undelivered) and not (got and undelivered)
        else:
            kind = "failed before a byte"
            good = not got and not row["cost"]
        kinds[kind] += 1
        if not good:
            told = {
                name: row[name] for name in ("error", "output_tokens", "undelivered_tokens", "input_tokens", "cost")
            }
            wrong.append(f"{kind}: {told} of {call} and a client with {client.answer.tokens if client else None}")
    wrong += [f"a row of no call: {row}" for rest in by_request.values() for row in rest if row["status"]]
    return kinds, wrong


async def storm(report: Report, gateway: Gateway, up: Upstream, count: int) -> None:
    up.script("first", *({"tokens": 20, "chunk_seconds": 0.004} | one for one in STORM))
    up.script("second", *({"tokens": 20, "chunk_seconds": 0.004} | one for one in STORM[:2]))
    up.script("pauses", fault="stall", after=PAUSE_AFTER, seconds=20, tokens=20)
    running = Storm(gateway.url)
    start = time.monotonic()
    await running.run(count)
    seconds = time.monotonic() - start
    await asyncio.sleep(0.5)
    calls = [call for call in up.calls() if call["ended"] != "running"]
    await asyncio.to_thread(wait_until, lambda: len(gateway.rows()) >= len(calls), 10, "rows are missing", 0.3)
    await asyncio.sleep(FLUSH)
    rows = gateway.rows()
    kinds, wrong = compare(calls, rows, running.sent)
    statuses = Counter(one.answer.status for one in running.sent)
    print(
        f"storm: {len(running.sent)} calls in {seconds:.1f} s, {len(calls)} attempts; {dict(kinds)}; {dict(statuses)}"
    )
    for one in wrong[:5]:
        print("wrong:", one)
    total = sum(row["cost"] or 0 for row in rows)
    report.samples["storm"] = {"kinds": kinds, "wrong": wrong[:50], "spent": total, "statuses": statuses}
    report.bar("attempts whose tokens are not the upstream's or the client's", len(wrong), "==", 0)
    for kind in ("completed", "broken off in a pause", "broken off in full flow", "failed in the stream"):
        report.bar(f"attempts: {kind}", kinds[kind], ">", 0)
    report.bar("failovers", sum(row["attempt"] > 0 and not row["error"] for row in rows), ">", 0)
    report.bar("spend in the budget less the sum of the rows, micro-dollars", spend_of(gateway) - total, "==", 0)


async def small_budget(report: Report, gateway: Gateway, up: Upstream, budget: int) -> None:
    """budget: micro-dollars. Each call costs a seventh of it at most, and about half of that in fact."""
    up.script("first", tokens=100, chunk_seconds=0.002)
    output = budget // 7 // 2
    client = Client(gateway.url)
    body = chat(model="m", stream=True, max_tokens=output)
    reservation = len(client.request("", body)) + 2 * output
    headers = {"authorization": f"Bearer {KEY}"}

    async def ask() -> Answer:
        return await client.call("/v1/chat/completions", body, headers, limit=30)

    answers: list[Answer] = []
    for _ in range(100):
        some = await asyncio.gather(*(ask() for _ in range(40)))
        answers += some
        if not any(answer.ok for answer in some):
            break
    client.close()
    await asyncio.sleep(2 * FLUSH)
    spent = spend_of(gateway)
    refused = [answer for answer in answers if answer.status == 429]
    hopeless = [answer for answer in refused if answer.headers.get("x-should-retry") == "false"]
    good = sum(answer.ok for answer in answers)
    print(f"budget: {spent} of {budget} micro-dollars spent, {good} calls answered, {len(refused)} refused")
    report.samples["budget"] = {"spent": spent, "budget": budget, "answered": good, "refused": len(refused)}
    report.bar("micro-dollars over the budget, less one reservation", spent - budget - reservation, "<=", 0)
    report.bar("part of the budget that could be used", spent / budget, ">=", 0.8)
    report.bar("calls that the budget refused", len(refused), ">", 0)
    report.bar("answers that were neither good nor refused", len(answers) - good - len(refused), "==", 0)
    report.bar("refusals that say when not to try again", len(hopeless), ">", 0)


async def traffic_until(client: Client, stop: asyncio.Event) -> list[tuple[float, str]]:
    """(when the last byte came, request id) of each whole answer."""
    found: list[tuple[float, str]] = []
    headers = {"authorization": f"Bearer {KEY}"}

    async def worker(number: int) -> None:
        while not stop.is_set():
            body = chat(model="m", stream=bool(number % 2), max_tokens=4)
            answer = await client.call("/v1/chat/completions", body, headers, limit=5)
            if answer.ok:
                found.append((answer.ended, answer.headers["x-request-id"]))
            else:
                await asyncio.sleep(0.01)

    await asyncio.gather(*(worker(number) for number in range(16)))
    return found


def sound(database: Path) -> tuple[str, int, int, set[str]]:
    """(SQLite's own verdict, spend of the key, cost of its rows, their request ids)."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as opened:
        verdict = str(opened.execute("pragma integrity_check").fetchone()[0])
        spent = opened.execute("select coalesce(sum(spent), 0) from spend where scope = 'key:tester'").fetchone()[0]
        cost = opened.execute("select coalesce(sum(cost), 0) from calls where key_id = 'tester'").fetchone()[0]
        ids = {row[0] for row in opened.execute("select request_id from calls")}
    return verdict, int(spent), int(cost), ids


async def one_kill(gateway: Gateway, draw: random.Random) -> tuple[int, int, float, bool]:
    """Traffic, and a kill in the middle of it: (answers that a row was owed for, of these missing, seconds that the
    oldest missing row was answered before the kill, whether the gateway was kept from running before it)."""
    client = Client(gateway.url)
    stop = asyncio.Event()
    traffic = asyncio.create_task(traffic_until(client, stop))
    end = time.monotonic() + draw.uniform(0.3, 1.5)
    await asyncio.sleep(end - time.monotonic() - WATCHED)
    attention = Attention(gateway.process.pid, watcher=False)  # we share our thread with the traffic, and are late
    while time.monotonic() < end:
        attention.look()
        await asyncio.sleep(EVERY_SECONDS)
    killed = time.monotonic()
    attention.look()
    gateway.kill()
    stop.set()
    answered = await traffic
    client.close()
    return_ids = sound(gateway.database)[3]
    missing = [killed - ended for ended, request_id in answered if request_id not in return_ids]
    owed = sum(killed - ended > FLUSH for ended, _ in answered)
    return owed, sum(age > FLUSH for age in missing), max(missing, default=0.0), attention.starved


def kills(report: Report, directory: Path, up: Upstream, count: int) -> None:
    up.reset()
    up.script("first", tokens=4)
    draw = random.Random(1)
    owed = lost = unsound = uneven = counted = starved = 0
    oldest = 0.0
    while counted < count and counted + starved < 3 * count:
        with Gateway(directory, settings(up, 1000.0)) as gateway:
            verdict, spent, cost, _ = sound(gateway.database)  # as it is after recovery
            unsound += verdict != "ok"
            uneven += spent != cost
            more, missing, age, kept = asyncio.run(one_kill(gateway, draw))
            if kept and missing:  # not for its own fault; what it did write must be sound all the same
                starved += 1
                continue
            counted += 1
            owed, lost, oldest = owed + more, lost + missing, max(oldest, age)
    verdict, spent, cost, ids = sound(gateway.database)
    unsound, uneven = unsound + (verdict != "ok"), uneven + (spent != cost)
    print(
        f"kill -9: {counted} times, {len(ids)} calls in the ledger; the oldest row lost was {1e3 * oldest:.0f} ms old"
    )
    print(f"         and {starved} times more, when the machine had kept the gateway from running")
    report.samples["kills"] = {
        "count": counted,
        "starved": starved,
        "owed": owed,
        "lost": lost,
        "oldest_lost_s": oldest,
    }
    report.bar("kills of a gateway that could run", counted, "==", count)
    report.bar("answers older than the flush window when the gateway was killed", owed, ">", 0)
    report.bar("of these, without a row", lost, "==", 0)
    report.bar("times the database was not sound", unsound, "==", 0)
    report.bar("times the budget's spend was not that of the rows", uneven, "==", 0)


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--only", choices=("storm", "budget", "kill"), help="one part of it")
    args = parser.parse_args()
    report = Report("gateway_money", args.quick)
    parts = (args.only,) if args.only else ("storm", "budget", "kill")
    with tempfile.TemporaryDirectory() as name, upstream(keep_headers=True) as up:
        directory = Path(name)
        if "storm" in parts:
            with Gateway(directory / "storm", settings(up, 1000.0)) as gateway:
                asyncio.run(storm(report, gateway, up, 400 if args.quick else 10_000))
        if "budget" in parts:
            up.reset()
            with Gateway(directory / "budget", settings(up, 0.02)) as gateway:
                asyncio.run(small_budget(report, gateway, up, 20_000))
        if "kill" in parts:
            kills(report, directory / "kill", up, 3 if args.quick else 50)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
