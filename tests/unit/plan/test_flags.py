"""The engines' argument lists: real launches pass, and every kind of mistake is found."""

from __future__ import annotations

import pytest

from freehold.plan.flags import ServingEngine, flag_table

VLLM = (
    "--kv-cache-dtype fp8 --tensor-parallel-size 8 --speculative-config.method mtp "
    "--speculative-config.num_speculative_tokens 5 --tool-call-parser glm47 --reasoning-parser glm45 "
    "--enable-auto-tool-choice --served-model-name glm-5.2-fp8 --max-model-len 1M -dp 2"
)
SGLANG = (
    "--model-path zai-org/GLM-5.2-FP8 --tp-size 8 --attn-dp-size 8 --moe-a2a-backend deepep "
    "--speculative-algorithm EAGLE --speculative-num-steps 1 --speculative-eagle-topk 1 "
    "--speculative-num-draft-tokens 2 --mem-fraction-static 0.85 --chunked-prefill-size 32768 "
    "--reasoning-parser glm45 --tool-call-parser glm47"
)


@pytest.mark.parametrize(("engine", "line"), [("vllm", VLLM), ("sglang", SGLANG)])
def test_documented_launches_pass(engine: ServingEngine, line: str) -> None:
    assert flag_table(engine).problems(line.split()) == []


def test_the_tables_are_whole() -> None:
    assert len(set(map(id, flag_table("vllm").flags.values()))) > 300
    assert len(set(map(id, flag_table("sglang").flags.values()))) > 500
    assert flag_table("vllm").flags["-tp"].type == "int"
    assert flag_table("sglang").flags["--tensor-parallel-size"] is flag_table("sglang").flags["--tp-size"]


@pytest.mark.parametrize(
    ("engine", "line", "problem"),
    [
        ("vllm", "--tensor-parallel 8", "has no --tensor-parallel"),
        ("vllm", "--tensor-parallel-size eight", "takes int, got 'eight'"),
        ("vllm", "--tensor-parallel-size", "takes one value, got 0"),
        ("vllm", "--tensor-parallel-size 8 8", "takes one value, got 2"),
        ("vllm", "--tensor-parallel-size 8 --tensor-parallel-size 8", "given twice"),
        ("vllm", "--kv-cache-dtype fp7", "no choice 'fp7'"),
        ("vllm", "--tool-call-parser glm", "no choice 'glm'"),
        ("vllm", "--enable-expert-parallel true", "takes no value"),
        ("vllm", "--no-tensor-parallel-size", "has no --no-tensor-parallel-size"),
        ("vllm", "--speculative-config.tokens 3", "has no key tokens"),
        ("vllm", "--speculative-config.num_speculative_tokens x", "takes int"),
        ("vllm", '--speculative-config {"tokens":3}', "has no key tokens"),
        ("vllm", "--speculative-config 3", "takes json"),
        ("vllm", "--max-model-len long", "takes int"),
        ("vllm", "stray --port 1", "belongs to no option"),
        ("vllm", "--gpu-memory-utilization high", "takes float"),
        ("sglang", "--dp-size 8 --enable-dp-attention", "deprecated: --attn-dp-size"),
        ("sglang", "--cuda-graph-max-bs 16", "has no --cuda-graph-max-bs"),
        ("sglang", "--moe-a2a-backend deep", "no choice 'deep'"),
    ],
)
def test_mistakes_are_found(engine: ServingEngine, line: str, problem: str) -> None:
    found = flag_table(engine).problems(line.split())
    assert len(found) == 1
    assert problem in found[0]


def test_switches_can_be_negated_and_values_joined() -> None:
    assert flag_table("vllm").problems(["--no-enable-prefix-caching", "--port=8000"]) == []
