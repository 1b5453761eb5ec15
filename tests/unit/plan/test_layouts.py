"""What runs where, and how a model may be spread: the support table's claims and every reason to refuse a layout."""

from __future__ import annotations

import pytest

from freehold.plan.hardware import cluster, gpu, gpus
from freehold.plan.layouts import engines, layouts, layouts_of, pp_note, refusal, stage_cuts, support
from freehold.plan.models import bundled, load
from freehold.plan.types import ENGINES, Engine, Layout

GLM = load("glm-5.2-fp8")


@pytest.mark.parametrize("key", ["a100", "rtx-pro-6000", "dgx-spark", "cpu-server"])
@pytest.mark.parametrize("name", ["glm-5.2-fp8", "glm-5.2-nvfp4", "glm-5.2-w4a16", "glm-5.2"])
def test_vllm_has_no_upstream_sparse_attention_there(key: str, name: str) -> None:
    known = support("vllm", gpu(key), load(name))
    assert not known.runs
    assert known.note
    assert known.source is not None


@pytest.mark.parametrize("key", ["h100", "h200", "b200", "b300", "gb200", "gb300", "mi300x", "mi325x", "mi355x"])
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_fp8_runs_on_datacentre_gpus(key: str, engine: Engine) -> None:
    known = support(engine, gpu(key), GLM)
    assert known.runs
    assert known.caches


def test_nvfp4_runs_on_blackwell_and_only_in_vllm_on_hopper() -> None:
    model = load("glm-5.2-nvfp4")
    assert support("sglang", gpu("b200"), model).runs
    assert support("vllm", gpu("b300"), model).runs
    assert not support("sglang", gpu("h200"), model).runs
    assert "no FP4 units" in support("vllm", gpu("h200"), model).note
    assert not support("vllm", gpu("mi355x"), model).runs


def test_the_embedded_engine_runs_glm_on_cpus_only() -> None:
    assert support("freehold", gpu("cpu-server"), GLM).runs
    assert support("freehold", gpu("h200"), GLM).status == "unknown"
    assert support("freehold", gpu("cpu-server"), load("deepseek-v3.2")).status == "unknown"


def test_caches_follow_the_generation() -> None:
    assert support("sglang", gpu("h200"), GLM).cache.latent == "bf16"
    assert support("sglang", gpu("b200"), GLM).cache.latent == "fp8"
    assert support("vllm", gpu("h200"), GLM).cache.latent == "fp8_ds_mla"


def test_every_pair_is_answered_and_every_rule_can_be_reached() -> None:
    seen = set()
    for engine in ENGINES:
        for made in gpus().values():
            for name in bundled():
                known = support(engine, made, load(name))
                assert known.runs == bool(known.runs and known.caches)
                assert (known.source is None) == (known.status == "unknown")
                seen.add((known.engine, known.status))
    assert {("vllm", "runs"), ("vllm", "patched"), ("vllm", "none"), ("sglang", "runs"), ("freehold", "runs")} <= seen
    assert set(engines()) == set(ENGINES)


@pytest.mark.parametrize("stages", range(1, 22))
def test_stages_begin_at_full_layers(stages: int) -> None:
    cuts = stage_cuts(GLM, stages)
    assert cuts is not None
    assert len(cuts) == stages
    assert cuts[0] == 0
    assert list(cuts) == sorted(set(cuts))
    assert all(GLM.config.indexer_types[cut] == "full" for cut in cuts)


def test_two_even_halves_of_78_layers_would_begin_at_a_shared_layer() -> None:
    assert GLM.config.indexer_types[39] == "shared"
    assert stage_cuts(GLM, 2) in ((0, 38), (0, 42))
    assert refusal(GLM, gpu("h200"), Layout(tp=8, pp=2, cuts=(0, 39)), "vllm") == (
        "a stage begins at a layer that shares the selection of the stage before"
    )
    assert stage_cuts(load("glm-5-fp8"), 2) == (0, 41)  # every layer is full: only bytes decide
    assert stage_cuts(GLM, 22) is None
    assert pp_note(GLM, 22) == "22 stages need as many full indexer layers to begin at; the model has 21"
    assert pp_note(GLM, 2).startswith("stages of ")


def test_cuts_are_the_best_of_all() -> None:
    """The slow twin tries every triple of full layers."""
    sizes = [0] * 79
    for entry in GLM.stored:
        sizes[0 if entry.module == "embed_tokens" else 78 if entry.layer is None else entry.layer] += entry.total
    full = GLM.config.full_layers

    def fullest(cuts: tuple[int, ...]) -> int:
        return max(sum(sizes[a:b]) for a, b in zip(cuts, (*cuts[1:], 79), strict=True))

    every = [(0, a, b) for a in full[1:] for b in full[1:] if a < b]
    chosen = stage_cuts(GLM, 3)
    assert chosen is not None
    assert fullest(chosen) == min(map(fullest, every))


@pytest.mark.parametrize(
    ("key", "layout", "reason"),
    [
        ("h200", Layout(tp=16), "TP16 crosses the scale-up domain of 8"),
        ("h200", Layout(tp=3), "TP3 does not divide 64 heads"),
        ("gb200", Layout(tp=64), "experts cut 64 ways leave no whole blocks"),
        ("gb200", Layout(tp=32, ep=32), None),
        ("h200", Layout(tp=1, dp=24, ep=24), "EP24 does not divide 256 experts"),
        ("h200", Layout(tp=1, dp=8, ep=1), "attention in DP groups is planned with whole experts"),
        ("h200", Layout(tp=8, dcp=8, pp=2, cuts=(0, 42)), "decode context parallelism with pipeline stages"),
        ("h200", Layout(tp=8), None),
        ("h200", Layout(tp=8, ep=8), None),
    ],
)
def test_reasons_to_refuse_a_layout(key: str, layout: Layout, reason: str | None) -> None:
    found = refusal(GLM, gpu(key), layout, "vllm")
    assert found is None if reason is None else found is not None and found.startswith(reason)


def test_the_embedded_engine_has_one_process() -> None:
    assert [str(layout) for layout in layouts(GLM, cluster("4xcpu-server"), "freehold")] == ["TP1"]


def test_layouts_of_two_nodes() -> None:
    found = {str(layout) for layout in layouts(GLM, cluster("16xh100"), "vllm")}
    assert {"TP8", "TP8·EP8", "TP8·PP2", "TP1·DP16·EP16", "TP8·DP2·EP16", "TP4·PP4"} <= found
    assert "TP16" not in found
    for layout in layouts(GLM, cluster("16xh100"), "vllm"):
        assert layout.gpus in (1, 2, 4, 8, 16)
        assert refusal(GLM, gpu("h100"), layout, "vllm") is None


def test_one_rack_is_one_domain() -> None:
    found = {str(layout) for layout in layouts(GLM, cluster("16xgb200"), "vllm")}
    assert "TP16" in found  # 2048 / 16 is one block
    assert "TP16·EP16" in found


def test_no_layout_twice() -> None:
    found = list(layouts_of(GLM, gpu("gb300"), 32, "vllm", dcp=True))
    assert len(found) == len(set(found))


@pytest.mark.parametrize("sizes", [{"tp": 0}, {"tp": 4, "ep": 3}, {"tp": 8, "dcp": 3}, {"pp": 2}, {"cuts": (3,)}])
def test_what_is_no_layout(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="is no layout"):
        Layout(**sizes)
