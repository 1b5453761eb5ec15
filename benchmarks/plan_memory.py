"""Is the planner's memory right? Its figures beside published ones.

    python benchmarks/plan_memory.py            # and keep the result
    python benchmarks/plan_memory.py --quick

Anchors are sizes that were counted from headers or follow from a published cache layout: each must be met within 2%.
Capacities are what engines reported of a whole deployment, which holds an estimate (activations, graphs, communicators)
besides what is counted: each must be met within 5%. The first and the last of them are what the estimates were taken
from; the other two were not used. Two claims of an article are printed beside what they should be.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass

from _common import Report, arguments

from freehold.model.cache_layout import latent_bytes
from freehold.plan.footprint import footprint
from freehold.plan.hardware import gpu
from freehold.plan.layouts import stage_cuts
from freehold.plan.models import load
from freehold.plan.types import CacheFormat, Engine, Layout

MILLION = 1_048_576
TP8 = Layout(tp=8)


@dataclass(frozen=True)
class Row:
    """One figure: ours, the published one, and where that is from."""

    what: str
    ours: float
    published: float
    source: str

    @property
    def error(self) -> float:
        return self.ours / self.published - 1


def per_token(model: str, cache: CacheFormat, *, mtp: bool) -> int:
    return footprint(load(model), gpu("b300"), TP8, "sglang", cache=cache, mtp=mtp).cache_per_token


def anchors() -> list[Row]:
    """Counted sizes."""
    bf16, packed, raw, nvfp4 = (CacheFormat(name) for name in ("bf16", "fp8_ds_mla", "fp8", "nvfp4_ds_mla"))
    walk = "public walk over every safetensors header of GLM-5.2-FP8 and -NVFP4"
    layouts = "cache layouts of vLLM 0.32 (FlashMLA sparse) and SGLang 0.5.23"
    latents = footprint(load("glm-5.2-fp8"), gpu("b300"), TP8, "sglang", cache=bf16, mtp=True).latent_per_token
    kimi = 46.80 * 2**30 / (61 * latent_bytes(load("deepseek-v3.2").config, "bf16"))
    return [
        Row("GLM-5.2 BF16, bytes of weights", load("glm-5.2").total_bytes, 1_506_659_919_872, walk),
        Row("GLM-5.2 FP8, bytes of weights", load("glm-5.2-fp8").total_bytes, 755_617_140_416, walk),
        Row("GLM-5.2 NVFP4, bytes of files", load("glm-5.2-nvfp4").total_bytes, 464_823_042_096, walk),
        Row("GLM-5.1, parameters", load("glm-5.1").parameters, 753_864_139_008, "listing of zai-org/GLM-5.1"),
        Row("DeepSeek-V3.2, parameters", load("deepseek-v3.2").parameters, 685e9, "its model card"),
        Row("BF16 latents of 79 layers, bytes a token", latents, 91_008, layouts),
        Row("the same with index keys", per_token("glm-5.2", bf16, mtp=True), 93_912, layouts),
        Row("656-byte format with MTP, bytes a token", per_token("glm-5.2", packed, mtp=True), 54_728, layouts),
        Row("656-byte format without MTP", per_token("glm-5.2", packed, mtp=False), 53_940, layouts),
        Row("one cache of 576 bytes, without MTP", per_token("glm-5.2", raw, mtp=False), 47_700, layouts),
        Row("NVFP4 cache, without MTP", per_token("glm-5.2", nvfp4, mtp=False), 30_228, layouts),
        Row("1,048,576 tokens in it", MILLION * per_token("glm-5.2", packed, mtp=False), 56_560_189_440, layouts),
        Row("Kimi-K2-Thinking, tokens in 46.80 GiB", kimi, 715_072, "vLLM's log of Kimi-K2-Thinking on 8xH200"),
        Row(
            "KV bytes a token and node, 8 ranks",
            8 * per_token("glm-5.3-fp8", packed, mtp=False),
            59_763_793_920 / 138_615,
            "https://github.com/vllm-project/recipes/pull/893",
        ),
    ]


def capacities() -> list[Row]:
    """Tokens that the caches of a whole deployment held."""

    def tokens(
        model: str, key: str, layout: Layout, engine: Engine, cache: CacheFormat, share: float, mtp: bool
    ) -> int:
        chosen = gpu(key)
        return footprint(load(model), chosen, layout, engine, cache=cache, mtp=mtp, fraction=share).cache_tokens

    every = CacheFormat("bf16", "fp8", all_layers=True)
    before, after = CacheFormat("fp8", "fp8", all_layers=True), CacheFormat("fp8")
    pull = "https://github.com/sgl-project/sglang/pull/30310"
    return [
        Row(
            "GLM-5.2 FP8, 8xH200, TP8, SGLang, BF16",
            tokens("glm-5.2-fp8", "h200", TP8, "sglang", every, 0.85, False),
            297_000,
            "InferenceX glm5.2_fp8_h200_sglang.sh",
        ),
        Row(
            "GLM-5.2 NVFP4, 4xB300, TP4, SGLang, all index keys",
            tokens("glm-5.2-nvfp4", "b300", Layout(tp=4), "sglang", before, 0.903, True),
            2_430_528,
            pull,
        ),
        Row(
            "the same with index keys on full layers only",
            tokens("glm-5.2-nvfp4", "b300", Layout(tp=4), "sglang", after, 0.903, True),
            2_813_952,
            pull,
        ),
        Row(
            "GLM-5.3 FP8, 8xH200, TP8, vLLM, 25.94 GiB of 53,940 bytes",
            tokens("glm-5.3-fp8", "h200", TP8, "vllm", CacheFormat("fp8_ds_mla"), 0.90, False),
            25.94 * 2**30 / 53_940,
            "https://github.com/vllm-project/recipes/pull/893",
        ),
    ]


def show(rows: list[Row]) -> None:
    for row in rows:
        print(f"  {row.what:<58} {row.ours:>22,.0f} {row.published:>22,.0f} {100 * row.error:>+7.2f}%")


def claims() -> None:
    """An article's: 160 GB in BF16 and 80 GB in FP8 for a million tokens; FP8 on 12xH100 or on 8xH200."""
    print("\nclaims of an article, beside what is counted")
    for name, claimed in (("bf16", 160), ("fp8_ds_mla", 80)):
        cache = CacheFormat(name)  # type: ignore[arg-type]
        counted = per_token("glm-5.2", cache, mtp=True) * MILLION / 1e9
        print(f"  cache of 1,048,576 tokens, {name}: claimed {claimed} GB, counted {counted:.1f} GB")
    model = load("glm-5.2-fp8")
    cuts = stage_cuts(model, 3)
    assert cuts is not None
    cases: list[tuple[str, Layout, Engine]] = [
        (key, layout, engine)
        for key, layout in (("h100", Layout(tp=4, pp=3, cuts=cuts)), ("h200", TP8))
        for engine in ("vllm", "sglang")
    ]
    for key, layout, engine in cases:
        memory = footprint(model, gpu(key), layout, engine)
        print(
            f"  {layout.gpus}x{key.upper()} FP8, {engine} ({layout}): {memory.weight_bytes / 1e9:.1f} GB on the "
            f"fullest GPU in weights, caches for {memory.cache_tokens:,} tokens, the longest of {memory.max_context:,}"
        )


def main() -> int:
    options = arguments(__doc__).parse_args()
    report = Report("plan_memory", options.quick)
    print(f"{'':60} {'ours':>22} {'published':>22}    error")
    counted, reported = anchors(), capacities()
    print("anchors")
    show(counted)
    print("capacities that engines reported")
    show(reported)
    claims()
    print()
    report.samples = {"rows": [asdict(row) | {"error": row.error} for row in (*counted, *reported)]}
    report.bar("largest error of an anchor, %", 100 * max(abs(row.error) for row in counted), "<=", 2.0)
    report.bar("largest error of a reported capacity, %", 100 * max(abs(row.error) for row in reported), "<=", 5.0)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
