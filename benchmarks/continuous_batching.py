"""Is a full server quicker than a queue, and does a short question wait for a long one? Continuous batching, measured.

Model `small`, bf16, random weights; the whole engine (scheduler, batch, model, sampler), greedy, without HTTP.

1. 64 requests, prompts of 16 to 1,024 tokens (log-uniform: as many of 16 to 32 as of 512 to 1,024) and answers of 16
   to 128 (uniform), seeded, submitted at once and one after another, in alternating rounds; the total times of a
   round are compared. No prefix cache, so that nothing is computed for free. Each request must get as many tokens as
   it asked for. (The tokens themselves are compared in tests/property; between a batch of 64 and one of 1, bf16
   rounds differently.) Batching makes decoding cheaper and prompts of more than a few rows hardly, so it is also
   shown how much sooner 64 at once would be if decoding were free. `--lengths uniform` draws prompts uniformly, which
   leaves more to prompts; without a bar.
2. A 16,384-token prompt alone: the seconds of each of its chunks (a chunk is max_num_batched_tokens of prefill).
   Then one more such prompt, and when its first chunk begins, a 32-token request arrives: its time to first token, in
   chunks. While that prompt is computed, an answer that had begun before must get a token in every step.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from _common import Report, arguments

from freehold.engine.engine import Engine
from freehold.engine.loading import EngineOptions, build_engine
from freehold.engine.request import Request
from freehold.model.tiny import make_tiny
from freehold.types import SamplingParams

LONG, SHORT = 16_384, 32


@dataclass(frozen=True)
class Ask:
    name: str
    prompt: tuple[int, ...]
    max_tokens: int

    def request(self, suffix: str) -> Request:
        params = SamplingParams(max_tokens=self.max_tokens, temperature=0.0, ignore_eos=True)
        return Request(f"{self.name}-{suffix}", self.prompt, params)


def draw_asks(count: int, seed: int, *, uniform: bool = False) -> list[Ask]:
    draw = random.Random(seed)
    asks = []
    for number in range(count):
        length = draw.randint(16, 1024) if uniform else round(2 ** draw.uniform(4, 10))
        asks.append(Ask(f"r{seed}-{number}", prompt_of(length, draw), draw.randint(16, 128)))
    return asks


def prompt_of(length: int, draw: random.Random) -> tuple[int, ...]:
    return tuple(draw.randrange(8000) for _ in range(length))


def run_all(engine: Engine) -> dict[str, int]:
    """Steps until nothing is left; the tokens that each request got."""
    tokens: dict[str, int] = {}
    while engine.has_work:
        for chunk in engine.step():
            if chunk.error is not None:
                raise chunk.error
            tokens[chunk.request_id] = tokens.get(chunk.request_id, 0) + len(chunk.token_ids)
    return tokens


def at_once(engine: Engine, asks: Sequence[Ask]) -> tuple[float, dict[str, int]]:
    start = time.perf_counter()
    for ask in asks:
        engine.add(ask.request("together"))
    tokens = run_all(engine)
    return time.perf_counter() - start, tokens


def one_after_another(engine: Engine, asks: Sequence[Ask]) -> tuple[float, float, dict[str, int]]:
    """(seconds, those of them spent on prompts, tokens by request)."""
    start, prompts, tokens = time.perf_counter(), 0.0, dict[str, int]()
    for ask in asks:
        engine.add(ask.request("alone"))
        began = time.perf_counter()
        first = engine.step()  # a prompt of up to 1,024 tokens is one chunk
        prompts += time.perf_counter() - began
        tokens |= run_all(engine)
        for chunk in first:
            tokens[chunk.request_id] += len(chunk.token_ids)
    return time.perf_counter() - start, prompts, tokens


def throughput(report: Report, engine: Engine, count: int, rounds: int, *, uniform: bool) -> None:
    together: list[float] = []
    alone: list[float] = []
    prompts: list[float] = []
    wrong = 0
    for number in range(rounds):
        asks = draw_asks(count, seed=number, uniform=uniform)
        seconds, tokens = at_once(engine, asks)
        together.append(seconds)
        wrong += sum(tokens[f"{ask.name}-together"] != ask.max_tokens for ask in asks)
        seconds, of_prompts, tokens = one_after_another(engine, asks)
        alone.append(seconds)
        prompts.append(of_prompts)
        wrong += sum(tokens[f"{ask.name}-alone"] != ask.max_tokens for ask in asks)
        print(
            f"round {number}: {sum(len(ask.prompt) for ask in asks)} + {sum(ask.max_tokens for ask in asks)} tokens: "
            f"at once {together[-1]:.2f} s; one after another {alone[-1]:.2f} s, {prompts[-1]:.2f} s of them on prompts"
        )
    report.samples |= {"at_once_s": together, "one_after_another_s": alone, "prompts_of_them_s": prompts}
    report.bar("answers of a wrong length", wrong, "==", 0)
    ratio = median(slow / fast for slow, fast in zip(alone, together, strict=True))
    limit = median(slow / part for slow, part in zip(alone, prompts, strict=True))
    print(f"  if decoding in a batch were free: {limit:.2f} times sooner")
    if uniform:
        print(f"  uniform lengths: {ratio:.2f} times sooner (no bar)")
    else:
        report.bar(f"{count} requests at once: times sooner than one after another", ratio, ">=", 4)


def chunks_of_a_long_prompt(engine: Engine, draw: random.Random) -> list[float]:
    """Seconds of each step of a long prompt that has the engine to itself."""
    engine.add(Ask("long", prompt_of(LONG, draw), 1).request(f"alone-{draw.random()}"))
    seconds = []
    while engine.has_work:
        start = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - start)
    return seconds


def first_token_behind_a_long_prompt(engine: Engine, draw: random.Random) -> tuple[float, int]:
    """(seconds to the first token of a short request, steps in which an answer that had begun got nothing).

    The request arrives as the step of the first chunk begins: it waits for that whole step.
    """
    writer = Ask("writer", prompt_of(SHORT, draw), 4096).request(str(draw.random()))
    engine.add(writer)
    engine.step()
    long = Ask("long", prompt_of(LONG, draw), 1).request(str(draw.random()))
    engine.add(long)
    short = Ask("short", prompt_of(SHORT, draw), 8).request(str(draw.random()))
    arrived = time.perf_counter()
    engine.step()  # of the long prompt's first chunk; what arrives meanwhile is taken after it
    engine.add(short)
    first, stalled, unfinished = 0.0, 0, True
    while unfinished:
        chunks = engine.step()
        advanced = {chunk.request_id for chunk in chunks if chunk.token_ids}
        if not first and short.request_id in advanced:
            first = time.perf_counter() - arrived
        stalled += writer.request_id not in advanced
        unfinished = long.request_id not in advanced
    engine.abort(writer.request_id)
    run_all(engine)
    return first, stalled


def waiting(report: Report, engine: Engine, rounds: int) -> None:
    draw = random.Random(1)
    chunk_s: list[list[float]] = []
    first_s: list[float] = []
    stalled = 0
    for number in range(rounds):
        chunk_s.append(chunks_of_a_long_prompt(engine, draw))
        first, without = first_token_behind_a_long_prompt(engine, draw)
        first_s.append(first)
        stalled += without
        print(
            f"round {number}: {LONG} tokens in {len(chunk_s[-1])} chunks of {median(chunk_s[-1]):.2f} s; "
            f"the first token of a {SHORT}-token request behind them came after {first:.2f} s"
        )
    report.samples |= {"chunk_s": chunk_s, "first_token_s": first_s}
    chunks = median(first / median(seconds) for first, seconds in zip(first_s, chunk_s, strict=True))
    report.bar("steps in which a running answer got no token", stalled, "==", 0)
    report.bar("first token behind a long prompt, in chunks", chunks, "<", 3)


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lengths", choices=("log", "uniform"), default="log", help="how prompt lengths are drawn")
    args = parser.parse_args()
    report = Report("continuous_batching", args.quick)
    count, rounds = 64, 1 if args.quick else 3
    with tempfile.TemporaryDirectory() as directory:
        make_tiny(Path(directory), size="small", seed=0)
        options = EngineOptions(threads=args.threads, max_num_seqs=64, enable_prefix_cache=False, num_draft_tokens=0)
        engine, _ = build_engine(directory, options)
        try:
            one_after_another(engine, draw_asks(2, seed=99))  # warm-up
            throughput(report, engine, count, rounds, uniform=args.lengths == "uniform")
            waiting(report, engine, rounds)
        finally:
            engine.close()
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
