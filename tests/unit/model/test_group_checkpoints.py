"""Loading int8 and int4 checkpoints: into tensors, into targets of another kind, and one line for whatever is wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from freehold.errors import CheckpointError
from freehold.headers import INDEX_NAME, SINGLE_NAME, CheckpointIndex
from freehold.model.config import GlmConfig
from freehold.model.glm import Glm
from freehold.model.group_quant import GroupQuantized, dequantize_groups, quantize_groups
from freehold.model.inspect import inspect
from freehold.model.quant import BlockQuantized, dequantize_blocks
from freehold.model.quantize import Scheme, quantize_checkpoint
from freehold.model.tiny import make_tiny
from freehold.model.weights import Source, load_weights, read_tensor

Q_A = "model.layers.4.self_attn.q_a_proj.weight"
EXPERT = "model.layers.4.mlp.experts.3.up_proj.weight"
BIAS = "model.layers.3.mlp.gate.e_score_correction_bias"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bf16, and what is made of it: int8, int4, fp8."""
    base = tmp_path_factory.mktemp("made")
    make_tiny(base / "bf16", "nano", seed=3)
    schemes: tuple[Scheme, ...] = ("int8", "int4", "fp8")
    for scheme in schemes:
        quantize_checkpoint(base / "bf16", base / scheme, scheme, max_shard_bytes=600_000)
    return base


def single(made: Path, out: Path, edit: Callable[[dict[str, torch.Tensor]], None], scheme: str = "int8") -> Path:
    """A copy in one file, edited."""
    out.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for shard in (made / scheme).glob("*.safetensors"):
        tensors |= safetensors.torch.load_file(shard)
    edit(tensors)
    safetensors.torch.save_file(tensors, out / SINGLE_NAME)
    (out / "config.json").write_bytes((made / scheme / "config.json").read_bytes())
    return out


def load(directory: Path, dtype: torch.dtype = torch.bfloat16) -> Glm:
    model = Glm(GlmConfig.from_file(directory), dtype=dtype)
    for tensor in model.checkpoint_tensors().values():
        tensor.data.fill_(float("nan"))  # what is not loaded will show
    load_weights(model, directory)
    return model


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tensors_get_the_dequantised_weights(made: Path, scheme: str, dtype: torch.dtype) -> None:
    original = safetensors.torch.load_file(made / "bf16" / SINGLE_NAME)
    loaded, index = load(made / scheme, dtype).checkpoint_tensors(), CheckpointIndex.open(made / scheme)
    assert len(index.shards) > 2
    changed = 0
    for name, tensor in loaded.items():
        expected = original[name].to(tensor.dtype)
        if name + "_packed" in index.tensors:
            changed += 1
            eight = scheme == "int8" or ".indexer." in name or name.startswith(("lm_head.", "model.layers.8."))
            bits = 8 if eight else 4
            quantized = quantize_groups(original[name], bits, 64 if bits == 8 else 32)
            expected = dequantize_groups(quantized, tensor.dtype)
            assert not torch.equal(expected, original[name].to(tensor.dtype))
        assert torch.equal(tensor, expected), name
        if tensor.dtype == torch.bfloat16:
            assert torch.equal(read_tensor(index, name), expected)
    assert changed == {"int8": 260, "int4": 345}[scheme]


class Keeper:
    """A target that keeps what it is given."""

    def __init__(self, shape: tuple[int, ...], *, wanted: bool = True) -> None:
        self.shape, self.wanted = shape, wanted
        self.given: list[Source] = []

    def load(self, source: Source, name: str) -> None:
        match source:
            case GroupQuantized(codes_OI, scale_OG, bits, group):
                self.given.append(GroupQuantized(codes_OI.clone(), scale_OG.clone(), bits, group))
            case BlockQuantized(weight_OI, scale_RC):
                self.given.append(BlockQuantized(weight_OI.clone(), scale_RC.clone()))
            case torch.Tensor():
                self.given.append(source.clone())


class KeepingModel:
    """A model whose matrices, all but the router's bias and norms, are targets."""

    def __init__(self, config: GlmConfig) -> None:
        self.config = config
        self.tensors: dict[str, Any] = {
            name: Keeper(tuple(tensor.shape)) if tensor.ndim == 2 else tensor
            for name, tensor in Glm(config).checkpoint_tensors().items()
        }

    def checkpoint_tensors(self) -> dict[str, Any]:
        return self.tensors


@pytest.mark.parametrize("scheme", ["bf16", "int8", "int4", "fp8"])
def test_targets_get_what_the_file_has(made: Path, scheme: str) -> None:
    model = KeepingModel(GlmConfig.from_file(made / scheme))
    load_weights(model, made / scheme)
    plain = load(made / scheme).checkpoint_tensors()
    kinds: dict[str, int] = {}
    for name, target in model.tensors.items():
        if isinstance(target, torch.Tensor):
            assert torch.equal(target, plain[name])
            continue
        (given,) = target.given
        kinds[type(given).__name__] = kinds.get(type(given).__name__, 0) + 1
        assert tuple(given.shape) == target.shape
        if isinstance(given, GroupQuantized):
            given = dequantize_groups(given, torch.bfloat16)
        elif isinstance(given, BlockQuantized):
            out = torch.empty(given.shape, dtype=torch.bfloat16)
            dequantize_blocks(given.weight_OI, given.scale_RC, out)
            given = out
        assert torch.equal(given, plain[name]), name
    assert (
        kinds
        == {
            "bf16": {"Tensor": 384},
            "int8": {"Tensor": 124, "GroupQuantized": 260},
            "int4": {"Tensor": 39, "GroupQuantized": 345},
            "fp8": {"Tensor": 14, "BlockQuantized": 370},
        }[scheme]
    )


def test_a_target_that_wants_nothing_is_given_nothing(made: Path) -> None:
    """And its file is not read for it; the others get theirs."""
    model = KeepingModel(GlmConfig.from_file(made / "int4"))
    experts = [name for name, target in model.tensors.items() if ".experts.3." in name and isinstance(target, Keeper)]
    for name in experts:
        model.tensors[name] = Keeper(model.tensors[name].shape, wanted=False)
    seen: list[tuple[int, int]] = []
    load_weights(model, made / "int4", progress=lambda done, total: seen.append((done, total)))
    given = {name: len(target.given) for name, target in model.tensors.items() if isinstance(target, Keeper)}
    assert len(experts) == 3 * 6
    assert given == {name: int(name not in experts) for name in given}
    assert seen[-1][0] == seen[-1][1]


def test_a_bias_must_stay_a_tensor(made: Path) -> None:
    model = KeepingModel(GlmConfig.from_file(made / "int8"))
    model.tensors[BIAS] = Keeper((16,))
    with pytest.raises(CheckpointError, match="as Keeper; it must be float32"):
        load_weights(model, made / "int8")


def test_scales_may_be_in_another_shard(made: Path, tmp_path: Path) -> None:
    whole = load(made / "int4").checkpoint_tensors()
    directory = single(made, tmp_path / "x", lambda tensors: None, "int4")
    tensors = safetensors.torch.load_file(directory / SINGLE_NAME)
    (directory / SINGLE_NAME).unlink()
    where = {name: "b.safetensors" if name.endswith(("_scale", "_shape")) else "a.safetensors" for name in tensors}
    for file in ("a.safetensors", "b.safetensors"):
        safetensors.torch.save_file({n: t for n, t in tensors.items() if where[n] == file}, directory / file)
    (directory / INDEX_NAME).write_text(json.dumps({"weight_map": where}))
    split = load(directory).checkpoint_tensors()
    assert all(torch.equal(whole[name], split[name]) for name in whole)


Edit = Callable[[dict[str, torch.Tensor]], None]


def drop(name: str) -> Edit:
    return lambda tensors: tensors.__delitem__(name)


def put(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    return lambda tensors: tensors.update({name: change(tensors[name]).contiguous()})


def plain_again(tensors: dict[str, torch.Tensor]) -> None:
    tensors[Q_A] = torch.zeros(64, 64, dtype=torch.bfloat16)
    for suffix in ("_packed", "_scale", "_shape"):
        del tensors[Q_A + suffix]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop(Q_A + "_packed"), f"tensor '{Q_A}_packed' is missing"),
        (drop(Q_A + "_scale"), f"tensor '{Q_A}_scale' is missing"),
        (drop(Q_A + "_shape"), f"tensor '{Q_A}_shape' is missing"),
        (
            put(Q_A + "_scale", lambda t: t.repeat(1, 2)),
            r"\[64, 2\], expected \[64, 1\] \(int8 in groups of 64\)",
        ),
        (put(Q_A + "_packed", lambda t: t[:, :8]), r"shape \[64, 8\], expected \[64, 16\]"),
        (put(Q_A + "_shape", lambda t: torch.ones(3, dtype=torch.int64)), r"shape \[3\], expected \[2\]"),
        (put(Q_A + "_scale", lambda t: t.half()), "is F16; it must be BF16"),
        (put(Q_A + "_packed", lambda t: t.float()), "is F32; it must be I32"),
        (put(Q_A + "_shape", lambda t: t.int()), "is I32; it must be I64"),
        (put(Q_A + "_shape", lambda t: torch.tensor([64, 63])), r"says \[64, 63\], which"),
        (put(Q_A + "_shape", lambda t: torch.tensor([32, 64])), r"says \[32, 64\], which"),
        (put(Q_A + "_shape", lambda t: torch.tensor([64, 128])), r"is a matrix \[64, 128\], expected \[64, 64\]"),
        (put(Q_A + "_scale", lambda t: t * float("nan")), "has a scale that is NaN or infinite"),
        (lambda tensors: tensors.update({Q_A: torch.zeros(64, 64)}), f"tensor '{Q_A}' has no use in this model"),
        (plain_again, f"'{Q_A}' is there: config.json must list it in ignore"),
    ],
)
def test_what_is_wrong_with_a_tensor_is_said_in_one_line(made: Path, tmp_path: Path, edit: Edit, message: str) -> None:
    directory = single(made, tmp_path / "x", edit)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(directory)
    assert "\n" not in caught.value.message


def test_the_config_must_declare_what_the_file_has(made: Path, tmp_path: Path) -> None:
    directory = single(made, tmp_path / "x", lambda tensors: None)
    raw = json.loads((directory / "config.json").read_text())
    del raw["quantization_config"]
    (directory / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"_packed' is there, but config\.json does not declare it"):
        load(directory)


def test_a_truncated_shard_and_a_flipped_bit(made: Path, tmp_path: Path) -> None:
    directory = single(made, tmp_path / "x", lambda tensors: None)
    os.truncate(directory / SINGLE_NAME, (directory / SINGLE_NAME).stat().st_size - 1)
    with pytest.raises(CheckpointError, match="truncated"):
        load(directory)
    assert inspect(made / "int8", verify=True).verified_files == len(CheckpointIndex.open(made / "int8").shards)


def test_inspect_tells_the_scheme_and_the_bits(made: Path) -> None:
    for scheme, text in (("int8", "260 matrices int8 in groups of 64"), ("int4", "296 matrices int4 in groups of 32")):
        report = inspect(made / scheme)
        assert report.problems == ()
        assert text in report.quantization
        assert report.total_bytes == inspect(made / scheme / "config.json").total_bytes
        assert report.bytes_by_part.keys() == inspect(made / "bf16").bytes_by_part.keys()
        assert report.bits_per_weight == pytest.approx(8 * report.total_bytes / report.parameters.total)
    assert inspect("glm-5.2").bits_per_weight == pytest.approx(16, abs=1e-4)
