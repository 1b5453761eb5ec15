"""Is the embedded engine fast enough to be worth having? Decode and prefill beside `transformers`, in one run.

Model `small`, bf16, random weights. Ours is the whole engine (scheduler, batch, model, sampler), greedy, one request.
`transformers` runs eagerly with its dynamic cache, each prefill in its best chunk size; with `--compile` it is also
timed compiled with a static cache (shown, no bar; compiling takes many minutes on two cores). Before that, both
must agree: the same values at every layer, in fp32, on a prompt past index_topk.
Samples alternate; medians are compared; raw samples are kept.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _common import Report, arguments

from freehold.engine.engine import Engine
from freehold.engine.loading import EngineOptions, build_engine
from freehold.engine.request import Request
from freehold.model.oracle import compare_layers, load_oracle, load_ours, stable_selection
from freehold.model.tiny import make_tiny
from freehold.types import SamplingParams

CONTEXT = 4096
DEEP = 65536


def prompt_of(length: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, 8000, (length,), generator=generator).tolist())


def ours(engine: Engine, length: int, tokens: int, seed: int) -> tuple[float, list[float]]:
    """(prefill seconds, seconds of each decode step) of one request on an idle engine."""
    params = SamplingParams(max_tokens=tokens + 1, temperature=0.0, ignore_eos=True)
    torch.set_num_threads(1)  # as build_engine leaves it: the kernels have threads of their own
    engine.add(Request(f"bench-{length}-{seed}-{time.monotonic_ns()}", prompt_of(length, seed), params))
    start = last = time.perf_counter()
    prefill, steps = 0.0, []
    while engine.has_work:
        chunks = engine.step()
        now = time.perf_counter()
        if any(chunk.token_ids for chunk in chunks):
            if prefill == 0.0:
                prefill = now - start
            else:
                steps.append(now - last)
        last = now
    return prefill, steps


class Peer:
    """`transformers` on the same checkpoint."""

    def __init__(self, directory: str, threads: int) -> None:
        self.model = load_oracle(directory, torch.bfloat16)
        self.threads = threads

    def prefill(self, prompt: tuple[int, ...], chunk: int) -> tuple[float, Any]:
        from transformers import DynamicCache

        torch.set_num_threads(self.threads)
        cache = DynamicCache(config=self.model.config)
        start = time.perf_counter()
        with torch.inference_mode():
            for first in range(0, len(prompt), chunk):
                self.model(torch.tensor([prompt[first : first + chunk]]), past_key_values=cache, logits_to_keep=1)
        return time.perf_counter() - start, cache

    def decode(self, cache: Any, tokens: int, forward: Callable[..., Any] | None = None) -> list[float]:
        torch.set_num_threads(self.threads)
        forward = forward or self.model
        steps, token = [], 1
        with torch.inference_mode():
            for _ in range(tokens):
                start = time.perf_counter()
                logits = forward(torch.tensor([[token]]), past_key_values=cache).logits
                token = int(logits[0, -1].argmax())
                steps.append(time.perf_counter() - start)
        return steps

    def compiled_decode(self, prompt: tuple[int, ...], tokens: int) -> Callable[[], list[float]]:
        """With a static cache and a compiled forward: decodes 4 more tokens at each call, `tokens` at most in all."""
        from transformers import StaticCache

        torch.set_num_threads(self.threads)
        cache = StaticCache(config=self.model.config, max_cache_len=len(prompt) + tokens + 16)
        with torch.inference_mode():
            for first in range(0, len(prompt), 512):
                self.model(torch.tensor([prompt[first : first + 512]]), past_key_values=cache, logits_to_keep=1)
        compiled = torch.compile(self.model.forward)
        start = time.perf_counter()
        self.decode(cache, 3, compiled)
        print(f"transformers was compiled in {time.perf_counter() - start:.0f} s", flush=True)
        return lambda: self.decode(cache, 4, compiled)


def agree(directory: str) -> float:
    """Correctness first: the share of points that differ, in fp32, on a prompt past index_topk. Must be 0."""
    with stable_selection():
        points = compare_layers(load_ours(directory), load_oracle(directory), prompt_of(600, 9), tolerance=1e-3)
    return sum(point.differs for point in points) / len(points)


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="also time the compiled peer")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    report = Report("engine_vs_transformers", args.quick)
    rounds, tokens, deep = (2, 16, 16384) if args.quick else (5, 64, DEEP)
    with tempfile.TemporaryDirectory() as directory:
        make_tiny(Path(directory), size="small", seed=0)
        report.bar("points that differ from transformers in fp32", agree(directory), "==", 0)
        engine, _ = build_engine(directory, EngineOptions(threads=args.threads, max_num_seqs=4))
        measure(report, engine, Peer(directory, args.threads), rounds, tokens, deep, compiled=args.compile)
        engine.close()
    return report.finish()


def measure(report: Report, engine: Engine, peer: Peer, rounds: int, tokens: int, deep: int, *, compiled: bool) -> None:
    ours(engine, CONTEXT, 4, 99)  # warm-up
    prompt = prompt_of(CONTEXT, 0)
    chunks = (512,) if report.quick else (256, 512, 1024, CONTEXT)
    peer_prefill: dict[int, list[float]] = {chunk: [] for chunk in chunks}
    our_prefill, our_steps, peer_steps = [], [], []
    for i in range(rounds):
        seconds, steps = ours(engine, CONTEXT, tokens, i)
        our_prefill.append(seconds)
        our_steps += steps
        for chunk in chunks:
            seconds, cache = peer.prefill(prompt, chunk)
            peer_prefill[chunk].append(seconds)
        peer_steps += peer.decode(cache, 4 if report.quick else 8)
        print(f"round {i}: decode {1 / median(our_steps):.1f} tokens/s, transformers {1 / median(peer_steps):.2f}")
    deep_prefill, deep_steps = ours(engine, deep, tokens, 7)
    deep_steps += ours(engine, deep, tokens, 7)[1]  # a prefix hit: the same context again
    best = min(median(samples) for samples in peer_prefill.values())
    best_chunk = min(peer_prefill, key=lambda chunk: median(peer_prefill[chunk]))
    speed, peer_speed = CONTEXT / median(our_prefill), CONTEXT / best
    print(f"prefill of {CONTEXT}: {speed:.0f} tokens/s; transformers {peer_speed:.0f} in chunks of {best_chunk}")
    print(f"decode at {deep}: {1 / median(deep_steps):.1f} tokens/s; prefill of {deep} took {deep_prefill:.1f} s")
    report.samples |= {
        "ours": {"prefill_s": our_prefill, "decode_s": our_steps, f"decode_{deep}_s": deep_steps},
        "transformers": {"prefill_s": peer_prefill, "decode_s": peer_steps},
    }
    if compiled:
        beside_compiled(report, engine, peer, prompt, rounds, tokens)
    report.bar(f"decode at {CONTEXT}: times eager transformers", median(peer_steps) / median(our_steps), ">=", 35)
    report.bar(f"prefill of {CONTEXT}: times transformers' best chunk", best / median(our_prefill), ">=", 2)
    report.bar(f"decode at {deep}: times slower than at {CONTEXT}", median(deep_steps) / median(our_steps), "<=", 1.5)


def beside_compiled(
    report: Report, engine: Engine, peer: Peer, prompt: tuple[int, ...], rounds: int, tokens: int
) -> None:
    """The peer's best decode: a static cache, compiled. Takes turns with ours, whose prompt is in the prefix cache."""
    decode = peer.compiled_decode(prompt, 4 * rounds)
    our_steps, peer_steps = [], []
    for _ in range(rounds):
        our_steps += ours(engine, CONTEXT, tokens, 0)[1]
        peer_steps += decode()
    report.samples["compiled"] = {"ours_decode_s": our_steps, "transformers_decode_s": peer_steps}
    print(f"compiled: {1 / median(peer_steps):.2f} tokens/s, ours {1 / median(our_steps):.1f}")
    report.bar(f"decode at {CONTEXT}: times compiled transformers", median(peer_steps) / median(our_steps), ">=", 17)


if __name__ == "__main__":
    sys.exit(main())
