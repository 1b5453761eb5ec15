"""What do HTTP, template, detokenising and server-sent events cost, as a part of the engine's step? At batch 8.

Model `small`, bf16. The server is a process of its own, as an operator starts it; eight clients in one other process
stream a chat each (`_streams.py`, which does as little as it can). The same eight prompts, rendered by the same
template, run on the engine alone in this process. Rounds alternate; both compute the same steps.

    overhead = (seconds a step with the server - seconds a step alone) / seconds a step alone

of the same round, from sending the eight requests to the last byte (alone: to the last token), over all steps, those of
the prompts too; the median of all rounds. It includes what the event loop costs the engine's thread by sharing a
process and its lock with it. Also reported, and free of the machine's noise: the CPU seconds of the event loop's thread
(from /proc) in each step, over the same seconds a step alone. Both have the same bar.

`--threads` is the compute threads of both engines. By default one core is left to the event loop and the clients:
what clients cost is not the server's overhead, but with no core to run on they would take one from the engine.
Every stream must have as many tokens as asked; tokens within FLUSH_SECONDS of each other travel in one event. Most
texts must be those of the engine alone; not all, for the eight requests do not arrive in the same step, and in bf16 a
prompt's values depend on its chunks.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

from _common import Report, arguments

from freehold.engine.async_engine import FLUSH_SECONDS
from freehold.engine.engine import Engine
from freehold.engine.loading import EngineOptions, build_engine
from freehold.engine.request import Request
from freehold.model.chat.template import ChatTemplate
from freehold.model.tiny import make_tiny
from freehold.model.tokenizer import Tokenizer
from freehold.serve.reader import TurnReader
from freehold.serve.turn import ContentDelta, ReasoningDelta
from freehold.types import SamplingParams

FREEHOLD = str(Path(sys.executable).with_name("freehold"))
STREAMS = 8
WORDS = "the of a cache block model step token request answer long short reads writes how why what is can does".split()


@dataclass
class Server:
    """A server process. host, port: where it serves."""

    process: subprocess.Popen[str]
    host: str
    port: int

    def steps(self) -> int:
        with urllib.request.urlopen(f"http://{self.host}:{self.port}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        return int(float(next(line.split()[-1] for line in lines if line.startswith("freehold_steps_total"))))

    def loop_seconds(self) -> float:
        """CPU seconds of its event loop so far, which runs on the main thread."""
        pid = self.process.pid
        return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0]) / 1e9


@contextmanager
def serving(directory: str, threads: int) -> Iterator[Server]:
    command = [FREEHOLD, "serve", directory, "--port", "0", "--threads", str(threads)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if url := next((word for word in line.split() if word.startswith("http://127.0.0.1:")), None):
                address = urlsplit(url)
                assert address.hostname is not None
                assert address.port is not None
                yield Server(process, address.hostname, address.port)
                return
        raise RuntimeError("the server ended without an address")
    finally:
        process.terminate()
        process.wait()


@contextmanager
def clients() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, str(Path(__file__).with_name("_streams.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def stream(server: Server, client: subprocess.Popen[str], bodies: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What `_streams.py` answers, with steps and loop_s: of the server, meanwhile."""
    job = {"host": server.host, "port": server.port, "path": "/v1/chat/completions"}
    assert client.stdin is not None
    assert client.stdout is not None
    steps, loop = server.steps(), server.loop_seconds()
    client.stdin.write(json.dumps({**job, "bodies": [json.dumps(body) for body in bodies]}) + "\n")
    client.stdin.flush()
    answer = client.stdout.readline()
    if not answer:
        raise RuntimeError("the clients failed")
    found: dict[str, Any] = json.loads(answer)
    found["loop_s"] = server.loop_seconds() - loop
    found["steps"] = server.steps() - steps
    return found


def alone(engine: Engine, tokenizer: Tokenizer, prompts: Sequence[tuple[tuple[int, ...], bool]], tokens: int) -> Any:
    """(seconds, steps, texts) of the same chats without a server; texts are put together after the clock stopped."""
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    chunks: dict[str, list[Any]] = {f"chat-{time.monotonic_ns()}-{n}": [] for n in range(len(prompts))}
    before, start = engine.metrics.steps, time.perf_counter()
    for name, (prompt, _) in zip(chunks, prompts, strict=True):
        engine.add(Request(name, prompt, params))
    while engine.has_work:
        for chunk in engine.step():
            chunks[chunk.request_id].append(chunk)
    seconds = time.perf_counter() - start
    texts = []
    for found, (_, thinking) in zip(chunks.values(), prompts, strict=True):
        reader = TurnReader(tokenizer, thinking=thinking)
        events = [event for chunk in found for event in reader.read(chunk)]
        texts.append("".join(event.text for event in events if isinstance(event, ContentDelta | ReasoningDelta)))
    return seconds, engine.metrics.steps - before, texts


def bodies_of(round_number: int, tokens: int) -> list[dict[str, Any]]:
    """Chats of about 60 words that no round has in common with another, so that no prefix is cached."""
    draw = random.Random(round_number)
    settings: dict[str, Any] = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    settings |= {"stream": True, "stream_options": {"include_usage": True}}
    texts = [" ".join(draw.choices(WORDS, k=60)) for _ in range(STREAMS)]
    return [{"messages": [{"role": "user", "content": text}], **settings} for text in texts]


def measure(
    report: Report,
    server: Server,
    client: subprocess.Popen[str],
    directory: str,
    threads: int,
    rounds: int,
    tokens: int,
) -> None:
    engine, tokenizer = build_engine(directory, EngineOptions(threads=threads, num_draft_tokens=0))
    template = ChatTemplate.from_dir(directory).for_tokenizer(tokenizer)
    samples: list[dict[str, float]] = []
    same: list[bool] = []
    wrong = few = 0
    try:
        for number in range(-1, rounds):  # the first warms up
            bodies = bodies_of(number, tokens if number >= 0 else 8)
            rendered = [template.render(tuple(body["messages"]), ()) for body in bodies]
            prompts = [(one.encode(tokenizer), one.thinking) for one in rendered]
            seconds, steps, texts = alone(engine, tokenizer, prompts, bodies[0]["max_tokens"])
            found = stream(server, client, bodies)
            if number < 0:
                continue
            same += [served == own for served, own in zip(found["texts"], texts, strict=True)]
            wrong += sum(count != tokens for count in found["tokens"])
            expected = min(tokens, found["seconds"] / FLUSH_SECONDS)
            few += sum(events < expected / 2 for events in found["events"])
            sample = {
                "alone_s": seconds / steps,
                "served_s": found["seconds"] / found["steps"],
                "loop_s": found["loop_s"] / found["steps"],
            }
            samples.append(sample)
            ms = {name: f"{1000 * value:.2f} ms" for name, value in sample.items()}
            print(
                f"round {number}: {found['steps']} steps of {ms['served_s']}, alone {steps} of {ms['alone_s']}; "
                f"the event loop computes {ms['loop_s']} in each"
            )
    finally:
        engine.close()
    report.samples["rounds"] = samples
    report.bar("part of the texts that are the engine's own", sum(same) / len(same), ">=", 0.5)
    report.bar("streams without as many tokens as asked", wrong, "==", 0)
    report.bar(
        f"streams with less than half as many events as tokens, or as {1000 * FLUSH_SECONDS:.0f} ms", few, "==", 0
    )
    slower = median(sample["served_s"] / sample["alone_s"] - 1 for sample in samples)
    loop = median(sample["loop_s"] / sample["alone_s"] for sample in samples)
    report.bar(f"a step with {STREAMS} streams served, % longer than alone", 100 * slower, "<", 5)
    report.bar("CPU time of the event loop in a step, % of a step alone", 100 * loop, "<", 5)


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--threads", type=int, default=max(1, len(os.sched_getaffinity(0)) - 1))
    args = parser.parse_args()
    report = Report("serving_overhead", args.quick)
    rounds, tokens = (3, 96) if args.quick else (15, 256)
    with tempfile.TemporaryDirectory() as directory:
        make_tiny(Path(directory), size="small", seed=0)
        with serving(directory, args.threads) as server, clients() as client:
            measure(report, server, client, directory, args.threads, rounds, tokens)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
