"""What 8-bit caches save, cost and change: bytes, resident memory, decode speed, and predictions.

bytes        a token of GLM-5.2 takes what its published cache layouts say, in every format;
memory       a filled cache of the model `small` for 1,048,576 tokens (65,536 with --quick) is resident in the memory
             that its formula says, within 3 %, bf16 and FP8; the engine gives exactly that many tokens to a budget
             of that many bytes. Each in a process of its own;
speed        decode steps with each format of the caches, in turn on one loaded model: 8-bit latents must not be
             slower than bf16 ones (0.97 of the speed at least, for the noise of a median);
predictions  `freehold bench caches` on the project's own documents, by context. The model's weights are random, its
             predictions as good as noise and easily moved, so the yardstick is what FP8 weights, as the published
             builds have them, do to the same model on the same text: 8-bit caches must move predictions no further.
             Up to index_topk 8-bit index keys must change nothing (but the order of sums: 1e-6);
rounding     of the latents that the model computes: with scales that are powers of two, as stored, the error may be
             5 % larger than with amax / 448, as other engines have them.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from _common import ROOT, Report, arguments
from torch import Tensor

from freehold.engine.compare import Comparison, compare_caches, compare_checkpoints
from freehold.engine.loading import EngineOptions, build_engine, load_model
from freehold.engine.runner import ModelRunner
from freehold.model import cache_layout
from freehold.model.cache import PagedCache, cache_bytes_per_token, cache_formats
from freehold.model.config import GlmConfig
from freehold.model.glm import Glm
from freehold.model.inputs import single_sequence
from freehold.model.inspect import published_config
from freehold.model.latents import LATENT_GROUP, Fp8Latents
from freehold.model.ops.fused import FusedLayers
from freehold.model.ops.native import NativeOps
from freehold.model.quantize import quantize_checkpoint
from freehold.model.tiny import make_tiny
from freehold.model.tokenizer import Tokenizer

Stored = Literal["auto", "fp8"]
FORMATS: tuple[tuple[Stored, Stored], ...] = (("auto", "auto"), ("auto", "fp8"), ("fp8", "auto"), ("fp8", "fp8"))
"""(latent cache, index cache)."""
PUBLISHED: dict[tuple[cache_layout.LatentFormat, cache_layout.IndexFormat], tuple[int, int]] = {
    ("bf16", "fp8"): (92_628, 93_912),
    ("fp8_ds_mla", "fp8"): (53_940, 54_728),
}
"""Bytes a token of GLM-5.2, and with its MTP layer."""
BLOCK = 64
_FILLED = 1 << 15  # slots written at a time


def name_of(latent: Stored, index: Stored) -> str:
    return "{} latents, {} keys".format(*cache_formats(torch.bfloat16, index, latent))


def fill(cache: PagedCache, ops: NativeOps, rope: int, seed: int = 0) -> None:
    """Every slot of every layer, through the kernels that serving writes with: standard normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    width = cache.latent[0].shape[1]
    latents = torch.randn(_FILLED, width, generator=generator).bfloat16()
    nothing, ones = torch.empty(0, dtype=torch.bfloat16), torch.ones(_FILLED, rope // 2)
    zeros = torch.zeros_like(ones)
    slots_S = torch.arange(cache.num_blocks * cache.block_size)
    for held in (*cache.latent, *cache.index):
        if held is None:
            continue
        values = latents[:, : held.shape[1]].contiguous()
        for slots_T in slots_S.split(_FILLED):
            rows = len(slots_T)
            ops.write_cache(values[:rows], nothing, None, 1e-6, ones[:rows], zeros[:rows], True, 0, held, slots_T)


def resident() -> int:
    """Bytes of this process that are in memory, without what malloc keeps of memory that was given back to it."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/smaps_rollup", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("Rss:"))


def filled_bytes(directory: str, tokens: int, latent: Stored, index: Stored, answers: Any) -> None:
    """In a process of its own: (tokens that the engine has room for, bytes of its cache, bytes that filling took)."""
    config = GlmConfig.from_file(directory)
    budget = tokens * cache_bytes_per_token(config, torch.bfloat16, index, latent)
    options = EngineOptions(
        threads=1, cache_bytes=budget, index_cache=index, latent_cache=latent, enable_prefix_cache=False
    )
    engine, _ = build_engine(directory, options)
    runner = engine.runner
    assert isinstance(runner, ModelRunner)
    ops, cache = runner.model.ops, runner.cache
    assert isinstance(ops, NativeOps)
    rope = config.qk_rope_head_dim
    fill(PagedCache(config, 1, BLOCK, torch.bfloat16, index_cache=index, latent_cache=latent), ops, rope)  # warm up
    before = resident()
    fill(cache, ops, rope)
    answers.put((cache.num_blocks * cache.block_size, cache.num_bytes, resident() - before))
    engine.close()


def memory(report: Report, directory: Path, tokens: int) -> None:
    config, spawn = GlmConfig.from_file(directory), multiprocessing.get_context("spawn")
    taken: dict[tuple[Stored, Stored], int] = {}
    for latent, index in FORMATS:
        answers = spawn.Queue()
        process = spawn.Process(target=filled_bytes, args=(str(directory), tokens, latent, index, answers))
        process.start()
        room, stored, grown = answers.get(timeout=600)
        process.join()
        name = name_of(latent, index)
        formula = tokens * cache_layout.cache_bytes_per_token(
            config, *cache_formats(torch.bfloat16, index, latent), mtp=True
        )
        print(f"{name}: {formula:,} bytes by the formula, {grown:,} resident")
        report.bar(f"{name}: tokens that a budget of the formula's bytes holds", room, "==", tokens)
        report.bar(f"{name}: bytes of the cache beside the formula", stored - formula, "==", 0)
        report.bar(f"{name}: resident, beside the formula, off by", abs(grown / formula - 1), "<=", 0.03)
        taken[latent, index] = grown
    report.samples["resident_bytes"] = {name_of(*formats): grown for formats, grown in taken.items()}
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    plain, eight = (cache_layout.latent_bytes(config, latent) for latent in ("bf16", "fp8_ds_mla"))
    wanted = layers * tokens * (plain - eight)
    saved = taken["auto", "fp8"] - taken["fp8", "fp8"]
    report.bar("8-bit latents: memory saved, beside the formula, off by", abs(saved / wanted - 1), "<=", 0.03)


def speed(report: Report, directory: Path, size: str, context: int, rounds: int) -> None:
    """One model, a cache of each format; in each round a step with each of them, in an order that turns."""
    config = GlmConfig.from_file(directory)
    model = load_model(directory, config, EngineOptions())
    ops = model.ops
    assert isinstance(ops, NativeOps)
    caches, fused = {}, {}
    for latent, index in FORMATS:
        blocks = -(-(context + rounds) // BLOCK) + 1
        cache = PagedCache(config, blocks, BLOCK, model.dtype, index_cache=index, latent_cache=latent)
        fill(cache, ops, config.qk_rope_head_dim)
        caches[latent, index] = cache
        fused[latent, index] = FusedLayers(ops, config, model.decoder_layers)
    samples: dict[tuple[Stored, Stored], list[float]] = {formats: [] for formats in FORMATS}
    with torch.inference_mode():
        for round_ in range(rounds):
            for turn in range(len(FORMATS)):
                formats = FORMATS[(round_ + turn) % len(FORMATS)]
                model.run_few = fused[formats]
                samples[formats].append(step_seconds(model, caches[formats], context + round_))
    samples = {formats: times[rounds // 10 :] for formats, times in samples.items()}
    report.samples[f"decode_s_{size}_{context}"] = {name_of(*key): times for key, times in samples.items()}
    plain = median(samples["auto", "auto"])
    print(f"{size}, decode at {context:,}:")
    for formats, times in samples.items():
        print(
            f"  {name_of(*formats):32} {median(times) * 1e3:8.3f} ms a step, {plain / median(times):.3f} of the speed"
        )
    for index in ("auto", "fp8"):
        with_8, without = samples["fp8", index], samples["auto", index]  # type: ignore[index]
        ratio = median(a / b for a, b in zip(without, with_8, strict=True))
        keys = "bf16" if index == "auto" else "fp8"
        report.bar(f"{size} at {context:,}, {keys} keys: speed of fp8 latents by that of bf16", ratio, ">=", 0.97)


def step_seconds(model: Glm, cache: PagedCache, position: int) -> float:
    start = time.perf_counter()
    model.logits(model(single_sequence([position % 4000], start=position, block_size=BLOCK), cache))
    return time.perf_counter() - start


def show(found: Comparison) -> None:
    for bucket in (*found.buckets, found.total):
        where = f"{bucket.start:,} to {'' if bucket.stop is None else f'{bucket.stop - 1:,}'}"
        print(
            f"  positions {where:16} {bucket.positions:>7,}: KL {bucket.kl_mean:.2e} "
            f"(median {bucket.kl_median:.2e}, p99 {bucket.kl_p99:.2e}), same top 1 {bucket.top1:.2%}, "
            f"perplexity {bucket.perplexity_change:+.2%}"
        )


def predictions(report: Report, directory: Path, text: str) -> None:
    quantize_checkpoint(directory, directory.with_name("fp8"), "fp8")
    weights = compare_checkpoints(directory, directory.with_name("fp8"), text)
    print("FP8 weights, the caches as computed:")
    show(weights)
    report.samples["predictions: FP8 weights"] = weights.as_dict()
    for each in compare_caches(directory, text):
        found, name = each.comparison, f"{each.latent} latents, {each.index} keys"
        print(f"{name}: {each.bytes_per_token:,} bytes a token, {each.bytes_as_computed:,} as computed")
        show(found)
        report.samples[f"predictions: {name}"] = each.as_dict()
        if each.latent == "bf16":
            report.bar(f"{name}: KL within index_topk", found.buckets[0].kl_mean, "<=", 1e-6)
        report.bar(f"{name}: positions beyond index_topk", sum(b.positions for b in found.buckets[1:]), ">=", 500)
        moved = found.total.kl_mean / weights.total.kl_mean
        report.bar(f"{name}: mean KL of all positions by that of FP8 weights", moved, "<=", 1.0)
        agreed = found.total.top1 - weights.total.top1
        report.bar(f"{name}: same top 1, less that of FP8 weights", agreed, ">=", 0.0)


def rounding(report: Report, directory: Path, text: str) -> None:
    """Relative RMS error of the latents of a text in layers from first to last."""
    config = GlmConfig.from_file(directory)
    model = load_model(directory, config, EngineOptions())
    tokens = Tokenizer.from_dir(directory).encode(text, special=False)[:512]
    cache = PagedCache(config, -(-len(tokens) // BLOCK), BLOCK, model.dtype)
    with torch.inference_mode():
        model(single_sequence(tokens, block_size=BLOCK), cache)
    squares = {"powers of two": 0.0, "amax / 448": 0.0}
    whole = 0.0
    for latents in cache.latent[: config.num_hidden_layers]:
        assert isinstance(latents, Tensor)
        exact = latents[: len(tokens)]
        rank, rope = config.kv_lora_rank, config.qk_rope_head_dim
        held = Fp8Latents(torch.empty(len(tokens), Fp8Latents.record_bytes(rank, rope), dtype=torch.uint8), rank, rope)
        held.write(torch.arange(len(tokens)), exact)
        values = exact[:, :rank].float()
        stored = held.rows(torch.arange(len(tokens)))[:, :rank]
        squares["powers of two"] += float((stored - values).double().square().sum())
        for group in values.split(LATENT_GROUP, dim=-1):
            scale = group.abs().amax(-1, keepdim=True) / 448
            again = (group / scale).to(torch.float8_e4m3fn).float() * scale
            squares["amax / 448"] += float((again - group).double().square().sum())
        whole += float(values.double().square().sum())
    errors = {name: (square / whole) ** 0.5 for name, square in squares.items()}
    print("relative RMS error of latents: " + ", ".join(f"{error:.3%} with {name}" for name, error in errors.items()))
    report.samples["rounding"] = errors
    report.bar(
        "error with powers of two by that with amax / 448", errors["powers of two"] / errors["amax / 448"], "<=", 1.05
    )


def main() -> int:
    args = arguments(__doc__).parse_args()
    report = Report("cache_formats", args.quick)
    config = published_config("glm-5.2")
    for formats, (alone, with_mtp) in PUBLISHED.items():
        name = f"GLM-5.2, {formats[0]} latents and {formats[1]} keys: bytes a token"
        report.bar(name, cache_layout.cache_bytes_per_token(config, *formats), "==", alone)
        report.bar(f"{name} with MTP", cache_layout.cache_bytes_per_token(config, *formats, mtp=True), "==", with_mtp)
    files = sorted((ROOT / "docs").rglob("*.md"))
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)[: 8_000 if args.quick else 60_000]
    with tempfile.TemporaryDirectory() as base:
        small = Path(base) / "small"
        make_tiny(small, "small")
        rounding(report, small, text)
        predictions(report, small, text)
        for context in (300, 4096) if args.quick else (300, 4096, 65_536):
            speed(report, small, "small", context, 40 if args.quick else 300)
        if not args.quick:
            medium = Path(base) / "medium"
            make_tiny(medium, "medium")
            speed(report, medium, "medium", 16_384, 100)
        memory(report, small, 1 << (16 if args.quick else 20))
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
