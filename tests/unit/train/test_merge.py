"""Merging an adapter into a checkpoint: the right tensors change, by the right amount, and nothing else does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from freehold.errors import CheckpointError, InvalidRequest
from freehold.headers import CheckpointIndex
from freehold.model.adapters import WEIGHTS_NAME, read_adapter
from freehold.model.config import GlmConfig
from freehold.model.glm import Glm
from freehold.model.inspect import inspect
from freehold.model.quantize import quantize_checkpoint
from freehold.model.sizes import size_config
from freehold.model.tiny import make_tiny, write_random_checkpoint
from freehold.model.weights import load_weights, read_tensor
from freehold.train.lora import TARGETS, Lora, LoraSettings
from freehold.train.merge import merge_adapter


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("nano") / "source"
    make_tiny(directory, "nano", seed=5)
    (directory / "LICENSE").write_text("mine")
    (directory / "README.md").write_text("what these weights can do")
    return directory


def random_adapter(checkpoint: Path, out: Path, settings: LoraSettings) -> dict[str, torch.Tensor]:
    """Save an adapter of random factors; returns what every matrix is with it, in fp32."""
    model = Glm(GlmConfig.from_file(checkpoint), dtype=torch.float32)
    load_weights(model, checkpoint)
    lora = Lora(model, settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in lora.named_parameters():
            parameter.normal_(std=0.1, generator=generator)
    lora.save(out)
    index = CheckpointIndex.open(checkpoint)
    return {
        name: read_tensor(index, name).float() + settings.scale * (b_Or @ a_rI)
        for name, (a_rI, b_Or) in lora.factors().items()
    }


@pytest.mark.parametrize("targets", [("attention",), TARGETS])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_what_the_adapter_changes_is_changed_and_the_rest_is_the_same_bytes(
    tmp_path: Path, targets: tuple[str, ...], dtype: str
) -> None:
    write_random_checkpoint(size_config("nano"), tmp_path / "in", 5, dtype=dtype)
    settings = LoraSettings(rank=3, alpha=7.0, targets=targets)  # type: ignore[arg-type]
    wanted = random_adapter(tmp_path / "in", tmp_path / "adapter", settings)
    merged = merge_adapter(tmp_path / "in", tmp_path / "adapter", tmp_path / "out", max_shard_bytes=600_000)
    before, after = CheckpointIndex.open(tmp_path / "in"), CheckpointIndex.open(tmp_path / "out")
    assert before.tensors.keys() == after.tensors.keys()
    assert (merged.tensors, merged.changed, merged.dequantised) == (len(before.tensors), len(wanted), False)
    for name in before.tensors:
        old, new = read_tensor(before, name), read_tensor(after, name)
        assert old.dtype == new.dtype
        if name not in wanted:
            assert torch.equal(old, new), name
        else:
            assert not torch.equal(old, new), name
            error = (new.float() - wanted[name]).abs().max() / wanted[name].abs().max()
            assert error < {"bfloat16": 2**-8, "float16": 2**-11, "float32": 1e-6}[dtype], name


def test_small_files_come_along_and_the_card_of_other_weights_does_not(nano: Path, tmp_path: Path) -> None:
    random_adapter(nano, tmp_path / "adapter", LoraSettings(rank=2))
    merge_adapter(nano, tmp_path / "adapter", tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE").read_text() == "mine"
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (nano / "tokenizer.json").read_bytes()
    assert not (tmp_path / "out" / "README.md").exists()
    assert inspect(tmp_path / "out", verify=True).verified_files == 1


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_a_quantised_checkpoint_is_dequantised(nano: Path, tmp_path: Path, scheme: str) -> None:
    quantize_checkpoint(nano, tmp_path / "in", scheme)  # type: ignore[arg-type]
    wanted = random_adapter(tmp_path / "in", tmp_path / "adapter", LoraSettings(rank=2))
    merged = merge_adapter(tmp_path / "in", tmp_path / "adapter", tmp_path / "out")
    assert merged.dequantised
    assert GlmConfig.from_file(tmp_path / "out").quantization is None
    after = CheckpointIndex.open(tmp_path / "out")
    for name, value in wanted.items():
        assert torch.allclose(read_tensor(after, name).float(), value, atol=0, rtol=2**-7) or bool(
            ((read_tensor(after, name).float() - value).abs() <= value.abs().max() * 2**-8).all()
        ), name


def test_an_adapter_that_is_damaged_or_of_another_model_is_refused_and_nothing_is_left(
    nano: Path, tmp_path: Path
) -> None:
    make_tiny(tmp_path / "small", "small", seed=1)
    random_adapter(nano, tmp_path / "adapter", LoraSettings(rank=2))
    with pytest.raises(CheckpointError):
        merge_adapter(tmp_path / "small", tmp_path / "adapter", tmp_path / "out")
    data = (tmp_path / "adapter" / WEIGHTS_NAME).read_bytes()
    (tmp_path / "adapter" / WEIGHTS_NAME).write_bytes(data[:-4])
    with pytest.raises(CheckpointError, match="truncated"):
        merge_adapter(nano, tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_not_overwritten(nano: Path, tmp_path: Path) -> None:
    random_adapter(nano, tmp_path / "adapter", LoraSettings(rank=2))
    with pytest.raises(InvalidRequest, match="never overwritten"):
        merge_adapter(nano, tmp_path / "adapter", nano)


def test_a_saved_adapter_reads_back_as_it_was(nano: Path, tmp_path: Path) -> None:
    config = GlmConfig.from_file(nano)
    settings = LoraSettings(rank=3, alpha=1.5, targets=TARGETS)
    random_adapter(nano, tmp_path / "adapter", settings)
    read = read_adapter(tmp_path / "adapter", config)
    model = Glm(config, dtype=torch.float32)
    load_weights(model, nano)
    lora = Lora(model, settings)
    lora.load(read)
    for name, (a_rI, b_Or) in lora.factors().items():
        assert torch.equal(a_rI, read.factors[name][0])
        assert torch.equal(b_Or, read.factors[name][1])
    with pytest.raises(InvalidRequest, match="rank 3"):
        Lora(Glm(config, dtype=torch.float32), LoraSettings(rank=2)).load(read)
    with pytest.raises(InvalidRequest, match="changes also"):
        Lora(Glm(config, dtype=torch.float32), LoraSettings(rank=3, alpha=1.5)).load(read)
