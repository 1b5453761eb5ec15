"""Step times: amounts equal closed forms, and go the way physics goes."""

from __future__ import annotations

import pytest

from freehold.plan.footprint import rank_weights
from freehold.plan.hardware import gpu
from freehold.plan.models import load
from freehold.plan.roofline import CAUSES, Chunk, Efficiencies, StepTimes, add, seconds
from freehold.plan.types import CacheFormat, Engine, Layout

H200, B200 = gpu("h200"), gpu("b200")
GLM5, GLM52, NVFP4 = load("glm-5-fp8"), load("glm-5.2-fp8"), load("glm-5-nvfp4")
BF16 = CacheFormat("bf16")
SOME = Efficiencies(0.8, 0.2, 0.7, 4e-6, 20e-6, 30e-6, 0.01)
FREE = Efficiencies(1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0)


def times(model=GLM5, on=H200, layout=None, engine: Engine = "sglang", cache=BF16, drafts: int = 0) -> StepTimes:  # type: ignore[no-untyped-def]
    return StepTimes(model, on, layout or Layout(tp=8), engine, cache, drafts=drafts)


def of(cause: str, work: tuple[float, ...]) -> float:
    return work[CAUSES.index(cause)]


def step(made: StepTimes, sequences: int, context: int, efficiencies: Efficiencies = SOME) -> float:
    seen = sequences * min(context, made.topk)
    work = made.decode(sequences, seen, sequences * context, efficiencies.factors)
    return seconds(work, efficiencies.factors)


def test_decode_reads_all_weights_once_and_the_caches() -> None:
    made, sequences, context = times(), 4096, 10_000
    work = made.decode(sequences, sequences * 2048, sequences * context, (1.0, 1e-9, 0, 0, 0, 0, 0))  # memory binds
    weights = sum(rank_weights(GLM5, Layout(tp=8), "sglang", mtp=False).values())
    embedding = next(entry.total for entry in GLM5.stored if entry.module == "embed_tokens") / 8
    cache = sequences * (2048 * 1152 * 78 + context * 132 * 78)
    assert of("memory", work) == pytest.approx((weights - embedding + cache) / H200.bandwidth, rel=1e-3)


def test_few_rows_touch_few_experts() -> None:
    made = times()
    assert made.coverage(1) == pytest.approx(8 / 256)
    assert made.coverage(10_000) == pytest.approx(1.0)
    covered = [made.coverage(rows) for rows in (1, 2, 8, 32, 128, 512)]
    assert covered == sorted(covered)
    assert covered[3] < 1 - (1 - 8 / 256) ** 32  # less than if rows chose evenly


def test_prompt_flops_are_those_of_the_architecture() -> None:
    rows = 2000  # all of them see all before them
    work = times().prefill([Chunk(0, rows)], (1e-9, 1.0, 0, 0, 0, 0, 0))
    config = GLM5.config
    tensor, cut = 0.0, {"q_a_proj", "kv_a_proj_with_mqa", "indexer", "gate", "norm"}
    for entry in GLM5.stored:
        if entry.layer is None or entry.layer >= 78:
            continue
        used = 8 / 256 if entry.module == "experts" else 1.0
        fp8 = "F8_E4M3" in entry.bytes
        peak = H200.flops["fp8" if fp8 else "bf16"]
        tensor += 2 * entry.parameters * used * rows / (1 if entry.module in cut else 8) / peak
    keys = rows * (rows + 1) / 2
    attend = 2 * 64 / 8 * (2 * config.kv_lora_rank + 64) * keys * 78 / H200.flops["bf16"]
    score = 2 * 32 * 128 * keys * 78 / H200.flops["fp8"]
    assert of("compute", work) == pytest.approx(tensor + attend + score, rel=0.01)


def test_a_prompt_in_chunks_attends_as_one() -> None:
    made, factors = times(), (1e-9, 1.0, 0, 0, 0, 0, 0)
    whole = made.prefill([Chunk(0, 6000)], factors)
    parts = add(made.prefill([Chunk(0, 1500)], factors), made.prefill([Chunk(1500, 4500)], factors))
    assert of("compute", parts) == pytest.approx(of("compute", whole))
    assert of("launches", parts) == 2 * of("launches", whole)


def test_shared_layers_have_no_indexer() -> None:
    every, shared = (step(times(model), 8, 100_000, FREE) for model in (GLM5, GLM52))
    keys, weights = 8 * 100_000 * 132, 9_371_648  # of one indexer, in FP8
    assert every - shared == pytest.approx((78 - 21) * (keys + weights) / H200.bandwidth, rel=0.02)
    assert of("kernels", times(GLM5).decode(1, 1, 1, SOME.factors)) > of(
        "kernels", times(GLM52).decode(1, 1, 1, SOME.factors)
    )


def test_fp4_reads_less_and_quantises_nothing_outside_experts() -> None:
    eight, four = (times(model, B200).decode(64, 64 * 1000, 64 * 1000, SOME.factors) for model in (GLM5, NVFP4))
    assert of("memory", four) < 0.7 * of("memory", eight)
    assert of("kernels", four) < of("kernels", eight)


def test_times_go_the_right_way() -> None:
    assert step(times(), 1, 100) < step(times(), 8, 100) < step(times(), 8, 9000) < step(times(), 8, 900_000)
    assert step(times(on=B200), 8, 9000) < step(times(), 8, 9000)
    assert step(times(layout=Layout(tp=8, ep=8)), 8, 9000) == pytest.approx(step(times(), 8, 9000))
    slower = Efficiencies(0.4, 0.1, 0.3, 8e-6, 40e-6, 60e-6, 0.02)
    assert step(times(), 8, 9000, slower) > step(times(), 8, 9000)


def test_drafts_cost_less_than_as_many_steps() -> None:
    plain, drafted = step(times(), 4, 2000), step(times(drafts=3), 4, 2000)
    assert plain < drafted < 2.5 * plain
    assert times(load("glm-5.2-fp8"), drafts=3).drafts == 3


def test_attention_groups_share_sequences_but_not_experts() -> None:
    whole = times(layout=Layout(tp=8), cache=CacheFormat("fp8_ds_mla"))
    groups = times(layout=Layout(tp=1, dp=8, ep=8), cache=CacheFormat("fp8_ds_mla"))
    factors = (1.0, 1e-9, 0, 0, 0, 0, 0)
    long, short = (
        [made.decode(64, 64 * 2048, 64 * context, factors)[0] for made in (whole, groups)] for context in (90_000, 2048)
    )
    # An eighth of the caches is read on each rank.
    assert long[1] - short[1] == pytest.approx((long[0] - short[0]) / 8)


def test_stages_take_turns() -> None:
    one, two = times(layout=Layout(tp=8)), times(layout=Layout(tp=8, pp=2, cuts=(0, 39)))
    # Half of the sequences pass each stage at a time: the same weights are read, the same kernels run.
    assert step(two, 2, 4000) == pytest.approx(step(one, 1, 4000), rel=0.1)
    assert of("links", two.decode(64, 1, 1, SOME.factors)) < of("links", one.decode(64, 1, 1, SOME.factors))


@pytest.mark.parametrize("wrong", [{"memory": 0.0}, {"compute": 1.5}, {"links": -1.0}, {"kernels": -1e-6}])
def test_efficiencies_that_cannot_be(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"share|negative"):
        Efficiencies(**(SOME.as_dict() | wrong))


def test_factors_and_efficiencies_are_the_same() -> None:
    assert Efficiencies.from_factors(SOME.factors).as_dict() == pytest.approx(SOME.as_dict())
