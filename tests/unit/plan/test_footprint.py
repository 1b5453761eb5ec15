"""Memory: published anchors, equality with the cache layout the engine uses, who holds what, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from freehold.model.cache import IndexCache, LatentCache, PagedCache
from freehold.model.cache_layout import (
    INDEX_FORMATS,
    LATENT_FORMATS,
    IndexFormat,
    LatentFormat,
    cache_bytes_per_token,
    latent_bytes,
)
from freehold.model.sizes import SIZES, size_config
from freehold.plan.footprint import fewest_gpus, footprint, rank_weights, refuse
from freehold.plan.hardware import cluster, gpu
from freehold.plan.layouts import stage_cuts
from freehold.plan.models import bundled, load
from freehold.plan.types import CacheFormat, Figure, Layout

TP8 = Layout(tp=8)
GLM = load("glm-5.2-fp8")


def test_latents_of_79_layers_take_91_008_bytes_a_token() -> None:
    memory = footprint(GLM, gpu("h200"), TP8, "sglang", cache=CacheFormat("bf16"), mtp=True)
    assert memory.latent_per_token == 91_008
    assert memory.cache_per_token == 93_912


def test_the_656_byte_format_with_mtp() -> None:
    memory = footprint(GLM, gpu("h200"), TP8, "vllm", cache=CacheFormat("fp8_ds_mla"), mtp=True)
    assert memory.cache_per_token == 54_728


def test_index_keys_on_all_layers_as_older_engines_had_them() -> None:
    memory = footprint(GLM, gpu("h200"), TP8, "sglang", cache=CacheFormat("bf16", "fp8", all_layers=True))
    assert memory.cache_per_token == 100_152
    assert memory.index_per_token == 78 * 132


def test_kimi_k2_holds_715_072_tokens_in_46_80_gib() -> None:
    """Latent attention without an indexer: 61 layers of the same 576 elements (DeepSeek-V3 and its children)."""
    per_token = 61 * latent_bytes(load("deepseek-v3.2").config, "bf16")
    assert per_token == 61 * 576 * 2
    assert 46.80 * 2**30 / per_token == pytest.approx(715_072, rel=1e-4)


@pytest.mark.parametrize("name", bundled())
@pytest.mark.parametrize("latent", LATENT_FORMATS)
@pytest.mark.parametrize("index", INDEX_FORMATS)
@pytest.mark.parametrize("mtp", [False, True])
def test_caches_are_those_of_the_engine(name: str, latent: str, index: str, mtp: bool) -> None:
    model = load(name)
    cache = CacheFormat(latent, index)  # type: ignore[arg-type]
    memory = footprint(model, gpu("b300"), TP8, "sglang", cache=cache, mtp=mtp)
    assert memory.cache_per_token == cache_bytes_per_token(model.config, cache.latent, cache.index, mtp=mtp)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("latent", "latent_cache"), [("bf16", "auto"), ("fp8_ds_mla", "fp8")])
@pytest.mark.parametrize(("index", "index_cache"), [("bf16", "auto"), ("fp8", "fp8")])
def test_caches_are_the_tensors_that_the_engine_allocates(
    tmp_path: Path,
    size: str,
    latent: LatentFormat,
    latent_cache: LatentCache,
    index: IndexFormat,
    index_cache: IndexCache,
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(size_config(size)))
    model = load(tmp_path)
    memory = footprint(model, gpu("cpu-server"), Layout(), "freehold", cache=CacheFormat(latent, index))
    real = PagedCache(model.config, 2, 16, torch.bfloat16, index_cache=index_cache, latent_cache=latent_cache)
    assert memory.cache_per_token * 2 * 16 == real.num_bytes


@pytest.mark.parametrize("layout", [Layout(), TP8, Layout(tp=1, dp=8, ep=8), Layout(tp=4, dp=2, ep=8)])
def test_ranks_together_hold_every_weight(layout: Layout) -> None:
    """Whatever is cut is there once; what is not cut is on every rank."""
    held = sum(rank_weights(GLM, layout, "vllm", mtp=True).values())
    assert layout.gpus * held >= GLM.total_bytes
    if layout.gpus == 1:
        assert held == GLM.total_bytes


def test_what_tp_cuts_and_what_it_does_not() -> None:
    one, eight = (rank_weights(GLM, layout, "vllm", mtp=False) for layout in (Layout(), TP8))
    for part in ("routed_expert", "shared_expert", "dense_mlp", "embed", "head"):
        assert eight[part] == one[part] // 8, part  # type: ignore[index]
    for part in ("indexer", "router", "norm"):
        assert eight[part] == one[part], part  # type: ignore[index]
    assert one["attention"] / 8 < eight["attention"] < one["attention"]


def test_the_mtp_layer_is_there_only_when_it_is_used() -> None:
    without, with_mtp = (footprint(GLM, gpu("h200"), TP8, "vllm", mtp=mtp) for mtp in (False, True))
    assert "mtp" not in without.weights
    assert 1.2e9 < with_mtp.weights["mtp"] < 1.6e9  # 9.95 B parameters over 8 ranks, a little of it whole
    assert with_mtp.cache_tokens < without.cache_tokens


def test_dp_groups_each_hold_their_own_sequences() -> None:
    tp, dp = footprint(GLM, gpu("b200"), TP8, "sglang"), footprint(GLM, gpu("b200"), Layout(1, 8, 8), "sglang")
    assert tp.cache_per_token == dp.cache_per_token
    assert dp.max_sequences(9216) > 4 * tp.max_sequences(9216)
    assert dp.max_context < tp.max_context  # a group has one GPU's room


def test_dcp_deals_latents_and_keeps_index_keys_whole() -> None:
    whole, dealt = (footprint(GLM, gpu("h200"), Layout(tp=8, dcp=dcp), "vllm") for dcp in (1, 8))
    assert dealt.latent_per_token == whole.latent_per_token // 8
    assert dealt.index_per_token == whole.index_per_token
    assert dealt.cache_tokens > 5 * whole.cache_tokens


def test_stages_hold_their_own_layers_and_the_fullest_decides() -> None:
    cuts = stage_cuts(GLM, 2)
    assert cuts is not None
    layout = Layout(tp=8, pp=2, cuts=cuts)
    stages = [sum(rank_weights(GLM, layout, "vllm", mtp=True, stage=stage).values()) for stage in (0, 1)]
    whole = sum(rank_weights(GLM, TP8, "vllm", mtp=True).values())
    embed = rank_weights(GLM, TP8, "vllm", mtp=True)["embed"]
    assert sum(stages) == pytest.approx(whole + embed, rel=1e-6)  # the MTP layer needs an embedding of its own
    memory = footprint(GLM, gpu("h100"), layout, "vllm", mtp=True)
    assert memory.fits
    assert memory.cache_per_token < cache_bytes_per_token(GLM.config, "fp8_ds_mla", "fp8", mtp=True)


@pytest.mark.parametrize(
    ("model", "hardware", "layout", "engine", "mtp", "cache", "fraction", "tokens"),
    [
        # InferenceX glm5.2_fp8_h200_sglang.sh: "holds only ~297K tokens in TP8", BF16, before unused keys were dropped
        ("glm-5.2-fp8", "h200", TP8, "sglang", False, CacheFormat("bf16", "fp8", True), 0.85, 297_000),
        # https://github.com/sgl-project/sglang/pull/30310, before and after; the fraction is SGLang's default there
        ("glm-5.2-nvfp4", "b300", Layout(tp=4), "sglang", True, CacheFormat("fp8", "fp8", True), 0.903, 2_430_528),
        ("glm-5.2-nvfp4", "b300", Layout(tp=4), "sglang", True, CacheFormat("fp8"), 0.903, 2_813_952),
        # https://github.com/vllm-project/recipes/pull/893: 25.94 GiB of 53,940 bytes
        ("glm-5.3-fp8", "h200", TP8, "vllm", False, CacheFormat("fp8_ds_mla"), 0.90, 516_375),
    ],
)
def test_cache_capacity_is_near_what_engines_reported(
    model: str, hardware: str, layout: Layout, engine: str, mtp: bool, cache: CacheFormat, fraction: float, tokens: int
) -> None:
    memory = footprint(load(model), gpu(hardware), layout, engine, cache=cache, mtp=mtp, fraction=fraction)  # type: ignore[arg-type]
    assert memory.cache_tokens == pytest.approx(tokens, rel=0.04)


def test_the_overhead_is_an_estimate_with_its_source() -> None:
    overhead = footprint(GLM, gpu("h200"), TP8, "vllm").overhead
    assert overhead.low < overhead.value < overhead.high
    assert overhead.basis == "interpolated"
    assert "https://" in overhead.source


def test_a_layout_that_does_not_fit_has_no_tokens() -> None:
    memory = footprint(load("glm-5.2"), gpu("h200"), TP8, "sglang")
    assert not memory.fits
    assert (memory.cache_tokens, memory.max_context, memory.max_sequences(1)) == (0, 0, 0)


def test_a_million_tokens_on_eight_b200_and_not_on_eight_h200() -> None:
    assert footprint(GLM, gpu("b200"), TP8, "vllm", mtp=True).max_context == 1_048_576
    assert footprint(GLM, gpu("h200"), TP8, "vllm", mtp=True).max_context < 1_048_576


@pytest.mark.parametrize(
    ("model", "hardware", "fewest"),
    [
        ("glm-5.2-fp8", "h200", 8),
        ("glm-5.2-fp8", "h100", 16),
        ("glm-5.2", "h200", 16),
        ("glm-5.2-fp8", "cpu-server", 1),
    ],
)
def test_the_fewest_that_fit(model: str, hardware: str, fewest: int) -> None:
    engine = "freehold" if hardware == "cpu-server" else "sglang"
    assert fewest_gpus(load(model), gpu(hardware), engine) == fewest  # type: ignore[arg-type]


def test_what_cannot_fit_says_what_would() -> None:
    message = str(refuse(load("glm-5.2"), cluster("8xh200"), "sglang"))
    assert message == (
        "glm-5.2 has 1,506.7 GB of weights and does not fit on 8 x H200 SXM (1,206.0 GB in all): "
        "it needs at least 16 of them; glm-5.2-fp8 would fit"
    )
    long = str(refuse(GLM, cluster("8xh100"), "vllm", context=1_048_576))
    assert "with room for a sequence of 1,048,576 tokens: it needs at least 16 of them" in long
    tiny = replace(gpu("h200"), memory=10**9, key="tiny", name="tiny")
    assert "more than 256 of them" in str(refuse(GLM, replace(cluster("8xh200"), gpu=tiny), "vllm"))


def test_a_figure_lies_in_its_interval() -> None:
    with pytest.raises(ValueError, match="outside its own interval"):
        Figure(3.0, 4.0, 5.0, "roofline", "made up")
