"""Launches: what is emitted for each engine and kind of layout, and that nothing invalid gets out."""

from __future__ import annotations

import dataclasses

import pytest

from freehold.errors import InvalidRequest
from freehold.plan.emit import Deployment, check_arithmetic, launch
from freehold.plan.flags import ServingEngine
from freehold.plan.footprint import footprint
from freehold.plan.hardware import gpu
from freehold.plan.layouts import stage_cuts
from freehold.plan.models import load
from freehold.plan.types import Layout


def deployment(
    engine: ServingEngine = "vllm",
    layout: Layout | None = None,
    *,
    model: str = "glm-5.2-fp8",
    on: str = "h200",
    drafts: int = 0,
    context: int = 32_768,
    sequences: int = 16,
) -> Deployment:
    spec, hardware = load(model), gpu(on)
    room = footprint(spec, hardware, layout or Layout(tp=8), engine, mtp=drafts > 0)
    return Deployment(spec, hardware, engine, room, context, sequences, drafts)


def option(command: tuple[str, ...], name: str) -> str:
    return command[command.index(name) + 1]


def test_vllm_on_one_node() -> None:
    started = launch(deployment(drafts=5))
    (command,) = started.commands
    assert command[:3] == ("vllm", "serve", "zai-org/GLM-5.2-FP8")
    assert option(command, "--tensor-parallel-size") == "8"
    assert option(command, "--kv-cache-dtype") == "fp8_ds_mla"
    assert option(command, "--speculative-config.num_speculative_tokens") == "5"
    assert (option(command, "--reasoning-parser"), option(command, "--tool-call-parser")) == ("glm45", "glm47")
    assert option(command, "--gpu-memory-utilization") == "0.90"
    assert option(command, "--host") == "127.0.0.1"
    assert any("Recipes disagree on the cache" in note for note in started.notes)
    assert started.shell().startswith("vllm serve zai-org/GLM-5.2-FP8 \\\n  --served-model-name glm-5.2-fp8 \\\n")


def test_sglang_counts_all_ranks_as_tp_and_groups_apart() -> None:
    (command,) = launch(deployment("sglang", Layout(tp=1, dp=8, ep=8), drafts=1)).commands
    assert option(command, "--tp-size") == "8"
    assert option(command, "--attn-dp-size") == "8"
    assert option(command, "--ep-size") == "8"
    assert option(command, "--moe-a2a-backend") == "deepep"
    assert option(command, "--speculative-num-draft-tokens") == "2"
    assert "--enable-dp-attention" not in command


@pytest.mark.parametrize(
    ("on", "engine", "kv"),
    [
        ("h200", "sglang", "bf16"),
        ("b200", "sglang", "fp8_e4m3"),
        ("b200", "vllm", "fp8_e4m3"),
        ("h200", "vllm", "fp8_ds_mla"),
    ],
)
def test_the_cache_dtype_follows_engine_and_generation(on: str, engine: ServingEngine, kv: str) -> None:
    assert option(launch(deployment(engine, on=on)).commands[0], "--kv-cache-dtype") == kv


def test_amd_gets_its_backends() -> None:
    started = launch(deployment("vllm", on="mi300x"))
    assert option(started.commands[0], "--moe-backend") == "aiter"
    assert started.environment["VLLM_ROCM_USE_AITER"] == "1"


def test_nvfp4_is_named_to_sglang_only() -> None:
    command = launch(deployment("sglang", Layout(tp=4), model="glm-5.2-nvfp4", on="b200")).commands[0]
    assert option(command, "--quantization") == "modelopt_fp4"
    assert (
        "--quantization" not in launch(deployment("vllm", Layout(tp=4), model="glm-5.2-nvfp4", on="b200")).commands[0]
    )


def test_deepseek_has_its_own_parsers() -> None:
    command = launch(deployment("vllm", model="deepseek-v3.2")).commands[0]
    assert option(command, "--tool-call-parser") == "deepseek_v32"


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_pipeline_is_cut_where_an_indexer_is(engine: ServingEngine) -> None:
    cuts = stage_cuts(load("glm-5.2-fp8"), 2)
    assert cuts is not None
    started = launch(deployment(engine, Layout(tp=8, pp=2, cuts=cuts), on="h100"))
    assert len(started.commands) == 2
    partition = started.environment["VLLM_PP_LAYER_PARTITION" if engine == "vllm" else "SGLANG_PP_LAYER_PARTITION"]
    assert partition == f"{cuts[1]},{78 - cuts[1]}"
    ranks = [option(command, "--node-rank") for command in started.commands]
    assert ranks == ["0", "1"]
    assert ("--headless" in started.commands[1]) == (engine == "vllm")
    assert "$HEAD_ADDRESS" in started.shell(1)
    assert started.shell(1).startswith(f"{'VLLM' if engine == 'vllm' else 'SGLANG'}_PP_LAYER_PARTITION=")


def test_data_parallel_vllm_over_machines() -> None:
    head, worker = launch(deployment("vllm", Layout(tp=1, dp=16, ep=16), on="b200")).commands
    assert option(head, "--data-parallel-size-local") == "8"
    assert "--headless" not in head
    assert option(worker, "--data-parallel-start-rank") == "8"
    assert option(worker, "--max-num-seqs") == "1", "a limit a rank: 16 sequences over 16 ranks"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"max_context": 2_000_000}, "a context of 2,000,000"),
        ({"max_context": 0}, "a context of 0"),
        ({"max_sequences": 0}, "0 sequences for 1 groups"),
        ({"drafts": 9}, "9 draft tokens"),
        ({"replicas": 0}, "0 replicas"),
    ],
)
def test_what_does_not_add_up_is_refused(change: dict[str, int], problem: str) -> None:
    with pytest.raises(InvalidRequest, match=problem):
        launch(dataclasses.replace(deployment(), **change))  # type: ignore[arg-type]


def test_bytes_are_added_up() -> None:
    good = deployment()
    grown = dataclasses.replace(good.footprint, cache_tokens=good.footprint.cache_tokens * 3)
    with pytest.raises(InvalidRequest, match="bytes a GPU of"):
        check_arithmetic(dataclasses.replace(good, footprint=grown))
    odd = dataclasses.replace(good.footprint, layout=Layout(tp=12))
    with pytest.raises(InvalidRequest, match="do not fill machines of 8"):
        check_arithmetic(dataclasses.replace(good, footprint=odd))


def test_drafts_in_a_pipeline() -> None:
    cuts = stage_cuts(load("glm-5.2-fp8"), 2)
    assert cuts is not None
    layout = Layout(tp=8, pp=2, cuts=cuts)
    with pytest.raises(InvalidRequest, match="not known to run drafts with pipeline"):
        launch(deployment("vllm", layout, on="h200", drafts=3))
    assert launch(deployment("sglang", layout, on="h200", drafts=3)).environment["SGLANG_ENABLE_PP_SPEC"] == "1"
    groups = Layout(tp=1, dp=8, ep=8, pp=2, cuts=cuts)
    with pytest.raises(InvalidRequest, match="SGLang refuses drafts"):
        launch(deployment("sglang", groups, on="h200", drafts=3))


def test_a_flag_that_the_engine_lacks_does_not_get_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(deployment: Deployment, host: str) -> tuple[dict[str, str], list[str]]:
        return {}, ["--tensor-parallel", "8"]

    monkeypatch.setattr("freehold.plan.emit._vllm", wrong)
    with pytest.raises(InvalidRequest, match=r"would refuse this launch: vllm 0.32 has no --tensor-parallel"):
        launch(deployment())
