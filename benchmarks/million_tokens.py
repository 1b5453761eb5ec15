"""A prompt of 1,048,576 tokens, really prefilled by the engine: does it finish, in the memory that it should take, and
is the indexer's choice at its far end still the right one?

A model of nano's dimensions with 6 layers, 2 of them full, and index_topk 512, bf16. The indexer's scores take nearly
all of the time, as they grow with the square of the prompt: n²/2 · 2 · heads · (dim + 1) FLOPs for each full layer,
5.7e14 for the two; at 3e11 a second and core that is some 15 minutes on two cores. The time is first estimated from
a short measurement. Afterwards

    the cache has to take exactly the bytes that the formula of its layout says;
    what the indexer chose for sampled rows, the last among them, has to be what the plain PyTorch reference chooses
    when it scores the cached keys again. Sums in another order may exchange equals: a position that only one of the
    two chose must score the same as the least that both chose, within 1e-5 of the largest score.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _common import Report, arguments
from _deep_engine import BLOCK, SPARE_BLOCKS, Assembled, assemble
from torch import Tensor

from freehold.engine.request import Request
from freehold.model import cache_layout
from freehold.model.cache import IndexCache, PagedCache
from freehold.model.config import GlmConfig
from freehold.model.index_keys import Fp8Keys, IndexKeys
from freehold.model.inputs import Span
from freehold.model.ops.native import NativeOps
from freehold.model.ops.reference import ReferenceOps
from freehold.model.sizes import size_config
from freehold.types import SamplingParams

TOKENS, QUICK_TOKENS = 1_048_576, 16_384
LAYERS, FREQ, TOPK = 6, 4, 512
SAMPLES = 8
MOST_MINUTES = 45.0
TOLERANCE = 1e-5
_VOCABULARY = 440  # text tokens of nano's tokenizer


def million_config() -> dict[str, Any]:
    """config.json of nano with full layers 0 and 4 (offset 1), no MTP layer, and room for the tokens generated."""
    return size_config("nano") | {
        "num_hidden_layers": LAYERS,
        "num_nextn_predict_layers": 0,
        "index_topk": TOPK,
        "index_topk_freq": FREQ,
        "index_skip_topk_offset": 1,
        "indexer_types": ["full" if i % FREQ == 0 else "shared" for i in range(LAYERS)],
        "mlp_layer_types": ["dense" if i < 3 else "sparse" for i in range(LAYERS)],
        "max_position_embeddings": TOKENS + BLOCK,
    }


@dataclass(frozen=True)
class Sample:
    """What the indexer of one layer chose for one position, and from what."""

    layer: int
    position: int
    query_TJD: Tensor
    weight_TJ: Tensor
    slots_K: Tensor
    table_B: Tensor


class RecordingOps(NativeOps):
    """The native kernels; selections of the wanted positions from this cache are kept as they pass."""

    def __init__(self, threads: int, cache: PagedCache, wanted: frozenset[int]) -> None:
        super().__init__(threads)
        self.cache, self.wanted = cache, wanted
        self.samples: list[Sample] = []

    def select(
        self,
        query_TJD: Tensor,
        weight_TJ: Tensor,
        keys_SD: IndexKeys,
        spans: tuple[Span, ...],
        block_size: int,
        topk: int,
    ) -> Tensor:
        chosen_RK = super().select(query_TJD, weight_TJ, keys_SD, spans, block_size, topk)
        layer = next((i for i, keys in enumerate(self.cache.index) if keys is keys_SD), None)
        if layer is None:
            return chosen_RK
        before = 0
        for span in spans:
            for position in self.wanted.intersection(range(span.start, span.end)):
                offset = position - span.start
                row = slice(span.row + offset, span.row + offset + 1)
                slots = chosen_RK[before + offset].clone()
                self.samples.append(
                    Sample(layer, position, query_TJD[row].clone(), weight_TJ[row].clone(), slots, span.table_B)
                )
            before += span.length
        return chosen_RK


def worst_exchange(sample: Sample, cache: PagedCache, topk: int) -> tuple[int, float]:
    """(positions that only one side chose, the largest distance of one's score from the least that both chose).

    The distance is relative to the largest score; infinite if the two chose different numbers of positions.
    """
    keys = cache.index[sample.layer]
    assert keys is not None
    span = Span(0, 1, sample.position, sample.table_B)
    expected_K = ReferenceOps().select(sample.query_TJD, sample.weight_TJ, keys, (span,), cache.block_size, topk)[0]
    chosen = {slot for slot in sample.slots_K.tolist() if slot >= 0}
    expected = {slot for slot in expected_K.tolist() if slot >= 0}
    if len(chosen) != len(expected):
        return len(chosen ^ expected), float("inf")
    if chosen == expected:
        return 0, 0.0
    slots = torch.tensor(sorted(chosen | expected))
    if isinstance(keys, Fp8Keys):
        values, scales = keys.rows(slots)
    else:
        values, scales = keys[slots].float(), torch.ones(len(slots))
    dots_JP = sample.query_TJD[0].float() @ values.T
    scores = dict(zip(slots.tolist(), ((sample.weight_TJ @ dots_JP.relu())[0] * scales).tolist(), strict=True))
    both = chosen & expected
    least, largest = min(scores[slot] for slot in both), max(abs(score) for score in scores.values())
    return len(chosen ^ expected), max(abs(scores[slot] - least) for slot in chosen ^ expected) / largest


class Progress:
    """A line that says how far the prefill is and how long it will take: a step costs a constant and its context."""

    def __init__(self, tokens: int) -> None:
        self.tokens, self.started, self.shown = tokens, time.perf_counter(), 0.0
        self.contexts: list[int] = []
        self.seconds: list[float] = []

    def step(self, done: int, seconds: float) -> None:
        self.contexts.append(done)
        self.seconds.append(seconds)
        now = time.perf_counter()
        if now - self.shown < (1.0 if sys.stdout.isatty() else 60.0) and done < self.tokens:
            return
        self.shown = now
        bar = "#" * round(30 * done / self.tokens)
        end = "\r" if sys.stdout.isatty() and done < self.tokens else "\n"
        spent = (now - self.started) / 60
        print(f"[{bar:<30}] {done:>9,} of {self.tokens:,}  {spent:5.1f} min, {self.left() / 60:5.1f} to go", end=end)
        sys.stdout.flush()

    def left(self) -> float:
        """Seconds to go, by a straight line through the steps so far."""
        if len(self.contexts) < 3:
            return float("nan")
        x, y = torch.tensor(self.contexts).double(), torch.tensor(self.seconds).double()
        slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
        chunk = self.contexts[-1] - self.contexts[-2]
        steps = (self.tokens - self.contexts[-1]) / max(1, chunk)
        middle = (self.tokens + self.contexts[-1]) / 2
        return steps * max(0.0, float(y.mean()) + slope * (middle - float(x.mean())))


def selection_flops(config: GlmConfig, tokens: int) -> float:
    per_pair = 2 * config.index_n_heads * (config.index_head_dim + 1)
    return len(config.full_layers) * tokens**2 / 2 * per_pair


def selection_rate(ops: NativeOps, config: GlmConfig) -> float:
    """FLOPs a second of scoring 512 rows at the end of 65,536 random keys."""
    keys, rows = 65_536, 512
    generator = torch.Generator().manual_seed(5)
    keys_SD = torch.randn(keys, config.index_head_dim, generator=generator).bfloat16()
    query = torch.randn(rows, config.index_n_heads, config.index_head_dim, generator=generator).bfloat16()
    weight = torch.rand(rows, config.index_n_heads, generator=generator)
    span = Span(0, rows, keys - rows, torch.arange(keys // BLOCK))
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        ops.select(query, weight, keys_SD, (span,), BLOCK, config.index_topk)
        seconds.append(time.perf_counter() - start)
    return rows * keys * 2 * config.index_n_heads * (config.index_head_dim + 1) / min(seconds)


def prefill(parts: Assembled, prompt: tuple[int, ...]) -> tuple[float, int, list[float]]:
    """(seconds until the first token, how many tokens were generated, seconds of each step)."""
    engine = parts.engine
    engine.add(Request("million", prompt, SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)))
    progress, tokens, first = Progress(len(prompt)), 0, 0.0
    while engine.has_work:
        start = time.perf_counter()
        chunks = engine.step()
        seconds = time.perf_counter() - start
        if engine.failure is not None:
            raise engine.failure
        if tokens == 0:
            done = min(len(prompt), (len(progress.seconds) + 1) * engine.config.max_num_batched_tokens)
            progress.step(done, seconds)
        tokens += sum(len(chunk.token_ids) for chunk in chunks)
        if tokens and not first:
            first = time.perf_counter() - progress.started
    return first, tokens, progress.seconds


def check(report: Report, parts: Assembled, ops: RecordingOps, tokens: int, index_cache: IndexCache) -> None:
    config, cache = parts.model.config, parts.cache
    blocks = -(-tokens // BLOCK) + SPARE_BLOCKS
    formats: tuple[cache_layout.LatentFormat, cache_layout.IndexFormat]
    formats = ("bf16", "fp8" if index_cache == "fp8" else "bf16")
    expected = blocks * BLOCK * cache_layout.cache_bytes_per_token(config, *formats)
    print(f"cache: {cache.num_bytes:,} bytes for {blocks * BLOCK:,} tokens")
    report.bar("bytes of the cache beside its formula", cache.num_bytes - expected, "==", 0)
    report.bar("selections recorded", len(ops.samples), "==", len(config.full_layers) * len(ops.wanted))
    worst = 0.0
    for sample in ops.samples:
        exchanged, distance = worst_exchange(sample, cache, config.index_topk)
        print(f"  layer {sample.layer}, position {sample.position:>9,}: {exchanged} positions on one side only")
        worst = max(worst, distance)
    report.bar("choice of sampled rows: distance from the reference's, in scores", worst, "<=", TOLERANCE)


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=None, help=f"default {TOKENS}, or {QUICK_TOKENS} with --quick")
    parser.add_argument("--index-cache", choices=("auto", "fp8"), default="auto")
    args = parser.parse_args()
    tokens = args.tokens or (QUICK_TOKENS if args.quick else TOKENS)
    report = Report("million_tokens", args.quick)
    generator = torch.Generator().manual_seed(3)
    prompt = tuple(torch.randint(0, _VOCABULARY, (tokens,), generator=generator).tolist())
    rows = torch.randint(TOPK, tokens, (SAMPLES,), generator=generator).tolist()
    with tempfile.TemporaryDirectory() as directory:
        parts = assemble(million_config(), Path(directory), tokens, args.threads, args.index_cache)
        parts.model.ops = ops = RecordingOps(args.threads, parts.cache, frozenset((*rows, tokens - 1)))
        flops, rate = selection_flops(parts.model.config, tokens), selection_rate(ops, parts.model.config)
        print(f"selection: {flops:.2e} FLOPs at {rate:.2e} a second are {flops / rate / 60:.1f} minutes", flush=True)
        seconds, generated, steps = prefill(parts, prompt)
    print(f"{tokens:,} tokens in {seconds / 60:.1f} minutes, {tokens / seconds:.0f} a second")
    report.bar(f"after {tokens:,} tokens: tokens generated", generated, "==", 4)
    check(report, parts, ops, tokens, args.index_cache)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"peak resident memory: {peak / 2**30:.2f} GiB")
    if not args.quick:
        report.bar("minutes", seconds / 60, "<=", MOST_MINUTES)
    report.samples |= {"seconds": seconds, "step_s": steps, "peak_bytes": peak, "selection_flops": flops}
    report.samples |= {"selection_flops_per_second": rate, "index_cache": args.index_cache}
    parts.engine.close()
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
