"""Engines on quantised weights: the same codes from either side, the same tokens in any batch, and little memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import safetensors.torch
import torch

from freehold.engine.engine import Engine
from freehold.engine.loading import EngineOptions, build_engine, load_model
from freehold.engine.request import Request
from freehold.errors import CheckpointError, InvalidRequest
from freehold.headers import SINGLE_NAME
from freehold.model.config import GlmConfig
from freehold.model.glm import Glm
from freehold.model.packed import PackedWeight
from freehold.model.packing import Quantize
from freehold.model.quantize import quantize_checkpoint
from freehold.model.sizes import size_config
from freehold.model.tiny import make_tiny, write_random_checkpoint
from freehold.types import SamplingParams
from tests.native_cases import needs_native

SCHEMES: tuple[Quantize, ...] = get_args(Quantize)
OPTIONS = EngineOptions(cache_bytes=1 << 24, threads=2)
GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bf16, and what `freehold quantize` makes of it."""
    base = tmp_path_factory.mktemp("made")
    make_tiny(base / "bf16", "nano", seed=6)
    for scheme in SCHEMES:
        quantize_checkpoint(base / "bf16", base / scheme, scheme)
    return base


def prompts(count: int) -> list[tuple[int, ...]]:
    """Of 1 to 60 tokens: below and above index_topk."""
    g = torch.Generator().manual_seed(8)
    lengths = [1 + (23 * i + 7) % 60 for i in range(count)]
    return [tuple(torch.randint(0, 448, (length,), generator=g).tolist()) for length in lengths]


def tokens_of(engine: Engine, asked: list[tuple[int, ...]]) -> list[list[int]]:
    """What each prompt is answered with when all are sent at once."""
    for i, prompt in enumerate(asked):
        engine.add(Request(str(i), prompt, GREEDY))
    found: dict[str, list[int]] = {str(i): [] for i in range(len(asked))}
    while engine.has_work:
        for chunk in engine.step():
            found[chunk.request_id] += chunk.token_ids
    assert all(len(tokens) == GREEDY.max_tokens for tokens in found.values())
    return list(found.values())


def packed_of(model: Glm) -> dict[str, PackedWeight]:
    return {name: part for name, part in model.named_modules() if isinstance(part, PackedWeight)}


@pytest.mark.parametrize("ops", ["auto", "reference"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantising_on_loading_is_loading_what_was_quantised(made: Path, scheme: Quantize, ops: str) -> None:
    """The same codes, scales and tokens, from the bf16 checkpoint and from its quantised copy."""
    options = replace(OPTIONS, ops=ops, quantize=scheme)
    models = [
        load_model(made / "bf16", GlmConfig.from_file(made / "bf16"), options),
        load_model(made / scheme, GlmConfig.from_file(made / scheme), options),
    ]
    if ops == "auto":  # the reference holds a quantised checkpoint dequantised, unless it is asked to
        models.append(load_model(made / scheme, GlmConfig.from_file(made / scheme), OPTIONS))
    first = packed_of(models[0])
    for model in models[1:]:
        held = packed_of(model)
        assert held.keys() == first.keys()
        for name, weight in held.items():
            assert (weight.kind, weight.group) == (first[name].kind, first[name].group), name
            assert torch.equal(weight.codes, first[name].codes), name
            assert weight.scales is None or torch.equal(weight.scales, first[name].scales), name  # type: ignore[arg-type]
    if ops == "reference" and scheme != "fp8":
        return  # kv_b, which the stored copies have in bf16, is then left as it is
    asked = prompts(3) if ops == "auto" else prompts(1)
    on_loading, _ = build_engine(made / "bf16", options)
    stored, _ = build_engine(made / scheme, replace(OPTIONS, ops=ops))
    assert tokens_of(on_loading, asked) == tokens_of(stored, asked)


@pytest.mark.parametrize("name", ["self_attn.q_a_proj", "self_attn.kv_b_proj", "mlp.experts.3.down_proj"])
@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_a_weight_that_is_no_number_is_named(made: Path, tmp_path: Path, scheme: Quantize, name: str) -> None:
    shutil.copytree(made / "bf16", tmp_path / "in")
    tensors = safetensors.torch.load_file(tmp_path / "in" / SINGLE_NAME)
    name = f"model.layers.4.{name}.weight"
    tensors[name][3, 5] = float("inf")
    safetensors.torch.save_file(tensors, tmp_path / "in" / SINGLE_NAME)
    config = GlmConfig.from_file(tmp_path / "in")
    if scheme == "int8" and name.endswith("down_proj.weight"):
        scheme = "int4"  # nano's experts have no whole groups of int8
    with pytest.raises(CheckpointError, match=f"'{name}' has a weight that is NaN or infinite"):
        load_model(tmp_path / "in", config, replace(OPTIONS, quantize=scheme))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_an_fp32_model_does_not_quantise_is_not_rounded(tmp_path: Path, scheme: Quantize) -> None:
    write_random_checkpoint(size_config("nano"), tmp_path, 5, dtype="float32")
    config = GlmConfig.from_file(tmp_path)
    plain, quantised = (load_model(tmp_path, config, replace(OPTIONS, quantize=q)) for q in (None, scheme))
    for model in (plain, quantised):
        assert model.dtype is torch.float32
    for path in ("layers.4.mlp.gate", "layers.0.self_attn.indexer.weights_proj", "mtp.input.eh_proj"):
        weights = [model.get_submodule(path).weight for model in (plain, quantised)]
        assert isinstance(weights[1], torch.Tensor), path
        assert torch.equal(*weights)
    assert isinstance(quantised.get_submodule("layers.4.self_attn.q_a_proj").weight, PackedWeight)


@pytest.mark.parametrize(("stored", "asked"), [("int8", "int4"), ("int4", "int8"), ("int4", "fp8")])
def test_what_is_quantised_already_is_not_quantised_again(made: Path, stored: str, asked: Quantize) -> None:
    """As `freehold quantize` refuses it. FP8, which models are published in, may become less."""
    config = GlmConfig.from_file(made / stored)
    with pytest.raises(InvalidRequest, match=f"{stored}: is quantised already"):
        load_model(made / stored, config, replace(OPTIONS, quantize=asked))
    load_model(made / "fp8", GlmConfig.from_file(made / "fp8"), replace(OPTIONS, quantize="int4"))


@needs_native
def test_an_fp8_checkpoint_is_held_in_fp8(made: Path) -> None:
    """Every matrix that GLM-5.2-FP8 has in FP8, in about half the bytes of bf16."""
    bf16, fp8 = (
        packed_of(load_model(made / name, GlmConfig.from_file(made / name), OPTIONS)) for name in ("bf16", "fp8")
    )
    assert bf16.keys() == fp8.keys()
    assert {weight.kind for weight in bf16.values()} == {"bf16"}
    kept = {name for name, weight in fp8.items() if weight.kind == "bf16"}
    assert {weight.kind for name, weight in fp8.items() if name not in kept} == {"fp8"}
    assert all(
        name == "lm_head.weight" or name.endswith(("gate.weight", "weights_proj.weight", "eh_proj.weight"))
        for name in kept
    )
    sizes = [sum(weight.num_bytes for name, weight in held.items() if name not in kept) for held in (bf16, fp8)]
    assert 0.5 * sizes[0] < sizes[1] < 0.57 * sizes[0]  # nano has a scale for 32 or 64 inputs, GLM-5.2 for 128


@needs_native
@pytest.mark.parametrize("scheme", [None, *SCHEMES])
def test_batching_does_not_change_tokens(made: Path, scheme: Quantize | None) -> None:
    """Steps of at most 16 rows, prefill included: alone, 8 at once, 16 at once."""
    options = replace(OPTIONS, quantize=scheme, max_num_batched_tokens=16, max_num_seqs=16)
    asked = prompts(16)
    alone_engine, _ = build_engine(made / "bf16", options)
    alone = [tokens_of(alone_engine, [prompt])[0] for prompt in asked]
    assert len({tuple(tokens) for tokens in alone}) > 8  # not one answer to everything
    for together in (8, 16):
        engine, _ = build_engine(made / "bf16", options)
        assert tokens_of(engine, asked[:together]) == alone[:together]


@needs_native
@pytest.mark.parametrize("scheme", [None, *SCHEMES])
def test_threads_do_not_change_tokens(made: Path, scheme: Quantize | None) -> None:
    found = []
    for threads in (1, 3):
        engine, _ = build_engine(made / "bf16", replace(OPTIONS, quantize=scheme, threads=threads))
        found.append(tokens_of(engine, prompts(5)))
    assert found[0] == found[1]


MEASURE = """
import sys
from pathlib import Path
from freehold.engine.loading import EngineOptions, load_model
from freehold.model.config import GlmConfig
from freehold.model.names import tensor_specs
from freehold.model.packed import PackedWeight
from tests.private_memory import Peak

directory, scheme = Path(sys.argv[1]), sys.argv[2]
config = GlmConfig.from_file(directory)
with Peak() as peak:
    model = load_model(directory, config, EngineOptions(threads=1, quantize=scheme))
held = sum(p.numel() * p.element_size() for p in model.parameters())
held += sum(part.num_bytes for part in model.modules() if isinstance(part, PackedWeight))
sizes = [spec.size for spec in tensor_specs(config)]
print(peak.bytes, held, sum(sizes), max(sizes))
"""


@needs_native
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize(("scheme", "most"), [("int8", 0.75), ("int4", 0.55), ("fp8", 0.75)])
def test_quantising_on_loading_never_holds_the_bf16_weights(tmp_path: Path, scheme: str, most: float) -> None:
    """Private memory peaks at what is held and some copies of one matrix, far below the bf16 weights."""
    make_tiny(tmp_path, "small", max_shard_bytes=100_000_000)
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), scheme], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    peak, held, parameters, largest = map(int, result.stdout.split())
    assert 0.9 * held < peak < held + 12 * largest
    assert peak < most * 2 * parameters
