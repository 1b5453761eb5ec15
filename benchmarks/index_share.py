"""What sharing the indexer's choice saves as the context grows: the same model with and without IndexShare.

Two random checkpoints with the dimensions of `small` and 18 layers: in one every layer is full (`index_topk_freq` 1),
in the other 6 of 18 (freq 4, the rule of GLM-5.2). Decode is measured through the engine: scheduler, batch, model and
greedy sampler, one request. A million tokens would take an hour to prefill, so the caches are filled directly, index
keys and latents with random numbers of the scale that their norms give, and their blocks are offered to the prefix
cache; a request with such a prompt then hits all of it and starts to decode. Both models share the latents in memory.

Predictions of the time of a step, and so of the ratio freq 1 : freq 4, from bytes that a step must read:

    bytes       what `freehold.model.traffic` counts (weights of one token, latents of the selected, index keys of the
                whole context) / bandwidth
    calibrated  time measured at context 4,096 + bytes that a longer context adds / bandwidth

The first is the roofline, and the bar is on it; it knows no fixed costs (calls, small kernels, latency), which both
models pay alike. The second does, and shows how much of an error they are: 4,096 is far past index_topk (256), where
a longer context adds index keys and nothing else. Bandwidth: what one pass over a large matrix takes, in the same run.

Beside them stands the closed form of the real GLM-5.2: FLOPs of a decoded token with 78 indexers against 21.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _common import Report, arguments
from _deep_engine import assemble
from _index_share_plot import draw, peers_growth

from freehold.engine.block_manager import BlockTable
from freehold.engine.engine import Engine
from freehold.engine.request import Request
from freehold.model.cache import PagedCache
from freehold.model.config import GlmConfig
from freehold.model.glm import Glm
from freehold.model.inspect import published_config
from freehold.model.ops.native import NativeOps
from freehold.model.packed import PackedWeight
from freehold.model.sizes import size_config
from freehold.model.traffic import Formats, decode_step, step_traffic, total, weight_formats
from freehold.types import SamplingParams

LAYERS = 18
FREQS = (1, 4)
SHORT = 4096
CONTEXTS = (16_384, 65_536, 262_144, 1_048_576)
_FILL = 65_536  # rows made at a time; the latents repeat after so many
_STREAM_BYTES = 1 << 29

# What the closed form is known to give for GLM-5.2.
GLM52_RATIOS = {262_144: 1.84, 1_048_576: 2.74}


def share_config(freq: int) -> dict[str, Any]:
    """config.json of `small` with LAYERS layers and this index_topk_freq; no MTP layer, which decode does not run."""
    raw = size_config("small")
    kinds = ["full" if max(i - 2, 0) % freq == 0 else "shared" for i in range(LAYERS)]
    return raw | {
        "num_hidden_layers": LAYERS,
        "num_nextn_predict_layers": 0,
        "index_topk_freq": freq,
        "indexer_types": kinds,
        "mlp_layer_types": ["dense" if i < 3 else "sparse" for i in range(LAYERS)],
        "max_position_embeddings": 2 * CONTEXTS[-1],
    }


def flops_per_token(config: GlmConfig, context: int, indexers: int) -> float:
    """FLOPs of one decoded token: every weight once, the attention over the selected in absorbed form, the indexers.

    2·weights + layers · 2·heads·selected·(latent_dim + kv_lora_rank) + indexers · context · 2·(heads · (dim + 1)).
    The reading of the embedding is no FLOP; the MTP layer is not run.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads
    attention = (
        hidden * (config.q_lora_rank + config.latent_dim)
        + config.q_lora_rank * heads * config.qk_head_dim
        + config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
        + heads * config.v_head_dim * hidden
    )
    sparse = config.mlp_layer_types.count("sparse")
    experts = 3 * hidden * config.moe_intermediate_size * (config.num_experts_per_tok + config.n_shared_experts)
    mlp = sparse * (experts + hidden * config.n_routed_experts)
    mlp += (config.num_hidden_layers - sparse) * 3 * hidden * config.intermediate_size
    index_weights = config.q_lora_rank * config.index_n_heads * config.index_head_dim
    index_weights += hidden * (config.index_head_dim + config.index_n_heads)
    weights = config.num_hidden_layers * attention + mlp + hidden * config.vocab_size + indexers * index_weights
    selected = min(context, config.index_topk)
    core = config.num_hidden_layers * 2 * heads * selected * (config.latent_dim + config.kv_lora_rank)
    index = indexers * context * 2 * config.index_n_heads * (config.index_head_dim + 1)
    return 2 * weights + core + index


def closed_form(contexts: tuple[int, ...]) -> dict[int, float]:
    """FLOPs of GLM-5.2 without IndexShare over those with it, by context."""
    config = published_config("glm-5.2")
    every, full = config.num_hidden_layers, len(config.full_layers)
    return {n: flops_per_token(config, n, every) / flops_per_token(config, n, full) for n in contexts}


def step_bytes(config: GlmConfig, context: int) -> float:
    """Bytes that a decode step moves at least: weights, caches, all in bf16 (`freehold.model.traffic`)."""
    formats = Formats(weight_formats("bf16"))
    return total(step_traffic(config, formats, decode_step(context)).values()).bytes


@dataclass
class Subject:
    """One of the two models, its engine, and its step times by context."""

    freq: int
    model: Glm
    cache: PagedCache
    engine: Engine
    steps: dict[int, list[float]] = field(default_factory=dict)

    def time(self, context: int) -> float:
        return median(self.steps[context])


def fill(subject: Subject, tokens: int, seed: int) -> None:
    """Random index keys and latents for the first `tokens` slots: unit normal, as LayerNorm and RMSNorm leave them.

    All keys differ, as real ones do (copies would tie); latents repeat after _FILL rows, which no choice depends on.
    """
    generator = torch.Generator().manual_seed(seed)
    for keys in subject.cache.index:
        for first in range(0, tokens if keys is not None else 0, _FILL):
            assert isinstance(keys, torch.Tensor)
            part = keys[first : min(first + _FILL, tokens)]
            part.copy_(torch.empty(part.shape).normal_(generator=generator))
    for latents in subject.cache.latent:
        block = torch.empty(_FILL, latents.shape[1]).normal_(generator=generator).to(latents.dtype)
        for first in range(0, tokens, _FILL):
            part = latents[first : min(first + _FILL, tokens)]
            part.copy_(block[: part.shape[0]])


def share_latents(source: Subject, target: Subject) -> None:
    """The same latents for both, in the same memory: each writes the position that it decodes before it reads it."""
    target.cache.latent = source.cache.latent
    for layer, keys in enumerate(target.cache.index):
        if keys is not None:
            target.cache.index[layer] = source.cache.index[layer]


def offer(engine: Engine, prompt: tuple[int, ...]) -> None:
    """Enter a prompt whose caches are filled into the prefix cache, as a request that had computed it would."""
    blocks = engine.scheduler.blocks
    table = BlockTable()
    if not blocks.allocate(table, len(prompt)):
        raise MemoryError("the cache has too few blocks for the prompt")
    if table.blocks != list(range(len(table.blocks))):
        raise RuntimeError("blocks of a new cache are expected in order")
    blocks.publish(table, prompt, len(prompt))
    blocks.free(table)


def decode(subject: Subject, prompt: tuple[int, ...], context: int, steps: int) -> list[float]:
    """Seconds of each decode step of one request whose prompt is all in the cache but its last token."""
    engine = subject.engine
    params = SamplingParams(max_tokens=steps + 3, temperature=0.0, ignore_eos=True)
    request = Request(f"{context}-{time.monotonic_ns()}", (*prompt[:context], 1), params)
    engine.add(request)
    engine.step()
    if request.num_cached_tokens != context:
        raise RuntimeError(f"{request.num_cached_tokens} of {context} tokens were found in the prefix cache")
    times = []
    while engine.has_work:
        start = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - start)
    return times[1 : steps + 1]


def bandwidth(ops: NativeOps) -> float:
    """Bytes a second of one row through a matrix that no cache holds, with the engine's own kernel and threads."""
    outputs, inner = _STREAM_BYTES // 8192, 4096
    weight = PackedWeight(outputs, inner, "bf16")
    weight.codes.zero_()
    x = torch.ones(1, inner, dtype=torch.bfloat16)
    start = time.perf_counter()
    with torch.inference_mode():
        ops.linear(x, weight)
    return _STREAM_BYTES / (time.perf_counter() - start)


def measure(
    subjects: list[Subject], prompt: tuple[int, ...], contexts: tuple[int, ...], args: argparse.Namespace
) -> list[float]:
    """Step times into the subjects, everything alternating; returns the samples of the bandwidth."""
    streams, ops = [], NativeOps(args.threads)
    for i in range(args.rounds + 1):  # the first round warms up
        streams.append(bandwidth(ops))
        for context in (SHORT, *contexts):
            for subject in subjects if i % 2 else reversed(subjects):
                times = decode(subject, prompt, context, args.steps)
                if i:
                    subject.steps.setdefault(context, []).extend(times)
        if i:
            shown = ", ".join(f"{n:,}: {subjects[0].time(n) / subjects[1].time(n):.2f}" for n in contexts)
            print(f"round {i}: freq 1 takes so many times as long as freq 4: {shown}", flush=True)
    return streams[1:]


def predict(subject: Subject, context: int, rate: float) -> tuple[float, float]:
    """Seconds of a step: from bytes alone, and calibrated."""
    config = subject.model.config
    read, short = step_bytes(config, context), step_bytes(config, SHORT)
    return read / rate, subject.time(SHORT) + (read - short) / rate


def evaluate(report: Report, subjects: list[Subject], contexts: tuple[int, ...], rate: float) -> dict[str, Any]:
    """Bars, a table on the terminal, and everything that the plot shows."""
    every, shared = subjects
    glm = closed_form((SHORT, *contexts))
    print(f"{rate / 1e9:.1f} GB/s. Times of a step in ms (freq 1 / freq 4), and their ratio:")
    columns = "".join(f"{name:>18}        " for name in ("measured", "calibrated", "bytes alone"))
    print(f"{'context':>10} {columns}  GLM-5.2")
    rows = []
    for context in (SHORT, *contexts):
        pairs = {"measured": (every.time(context), shared.time(context))}
        (bytes_1, fit_1), (bytes_4, fit_4) = predict(every, context, rate), predict(shared, context, rate)
        pairs |= {"calibrated": (fit_1, fit_4), "bytes": (bytes_1, bytes_4)}
        shown = " ".join(f"{a * 1e3:>8.2f} /{b * 1e3:>7.2f} {a / b:>6.2f}" for a, b in pairs.values())
        print(f"{context:>10,} {shown} {glm[context]:>8.2f}")
        rows.append({"context": context, "glm52_flops_ratio": glm[context], **pairs})
    for row in rows[1:]:
        (a, b), (bound_a, bound_b) = row["measured"], row["bytes"]
        error = abs(a / b / (bound_a / bound_b) - 1)
        report.bar(f"at {row['context']:,}: ratio off the roofline's", error, "<=", 0.15)
    for context, ratio in GLM52_RATIOS.items():
        error = abs(closed_form((context,))[context] - ratio)
        report.bar(f"closed form of GLM-5.2 at {context:,}: distance from {ratio}", error, "<=", 0.005)
    return {"bandwidth": rate, "rows": rows}


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=None, help="default 5, or 2 with --quick")
    parser.add_argument("--steps", type=int, default=16, help="steps timed of each request")
    parser.add_argument("--plot", type=Path, default=None)
    args = parser.parse_args()
    args.rounds = args.rounds or (2 if args.quick else 5)
    contexts = CONTEXTS[:2] if args.quick else CONTEXTS
    report = Report("index_share", args.quick)
    with tempfile.TemporaryDirectory() as directory:
        subjects = []
        for freq in FREQS:
            parts = assemble(share_config(freq), Path(directory, str(freq)), contexts[-1], args.threads)
            subjects.append(Subject(freq, parts.model, parts.cache, parts.engine))
        print(f"filling the caches of {contexts[-1]:,} tokens", flush=True)
        fill(subjects[0], contexts[-1], seed=1)
        share_latents(*subjects)
        generator = torch.Generator().manual_seed(2)
        prompt = tuple(torch.randint(0, 8000, (contexts[-1],), generator=generator).tolist())
        for subject in subjects:
            offer(subject.engine, prompt)
        streams = measure(subjects, prompt, contexts, args)
        for subject in subjects:
            subject.engine.close()
    data = evaluate(report, subjects, contexts, median(streams))
    peers = peers_growth()
    report.samples |= data | {"peers_growth": peers, "bandwidth_samples": streams}
    report.samples["decode_s"] = {f"freq {s.freq}": s.steps for s in subjects}
    code = report.finish()
    if not args.quick or args.plot is not None:
        draw(data, peers, args.plot)
    return code


if __name__ == "__main__":
    sys.exit(main())
