"""Random checkpoints: the right files and statistics, the same for a seed, and safe with other people's directories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from freehold.errors import CheckpointError, ConfigError, DiskFull, InvalidRequest
from freehold.headers import INDEX_NAME, CheckpointIndex
from freehold.model.checkpoint_files import verify_manifest
from freehold.model.config import GlmConfig
from freehold.model.names import tensor_specs
from freehold.model.random_tensors import RandomTensors, encode
from freehold.model.sizes import SIZES, size_config
from freehold.model.storage import check, find_problems
from freehold.model.tiny import MARKER_NAME, made_before, make_tiny, write_random_checkpoint
from freehold.model.tokenizer import Tokenizer


def tensor_bytes(directory: Path) -> dict[str, bytes]:
    found = {}
    for shard in CheckpointIndex.open(directory).shards:
        data = shard.path.read_bytes()
        found |= {entry.name: data[entry.offset : entry.offset + entry.nbytes] for entry in shard.tensors}
    return found


@pytest.mark.parametrize(
    ("size", "without_mtp", "active"),
    [("nano", 1.16e6, None), ("small", 114.7e6, 33.5e6), ("medium", 1569.9e6, 309.6e6)],
)
def test_sizes_are_those_they_claim(size: str, without_mtp: float, active: float | None) -> None:
    from freehold.model.inspect import _parameters

    parameters = _parameters(GlmConfig.from_dict(size_config(size)))
    assert parameters.total - parameters.mtp == pytest.approx(without_mtp, rel=2e-3)
    if active is not None:
        assert parameters.active == pytest.approx(active, rel=2e-3)


def test_the_files_of_a_checkpoint(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    written = make_tiny(tmp_path, "nano", 3, max_shard_bytes=1 << 20, progress=lambda *args: seen.append(args))
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "SHA256SUMS", "config.json", MARKER_NAME, "generation_config.json", "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors", INDEX_NAME, "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    index = CheckpointIndex.open(tmp_path)
    config = GlmConfig.from_file(tmp_path)
    check(config, index)
    assert config == GlmConfig.from_dict(size_config("nano"))
    assert (written.tensors, written.data_bytes, written.shards) == (440, index.total_bytes, 3)
    assert max(shard.file_bytes for shard in index.shards) < (1 << 20) + 30_000  # and its header
    assert seen[-1] == (index.total_bytes, index.total_bytes)
    assert verify_manifest(tmp_path, [shard.path for shard in index.shards]) == 3
    assert json.loads((tmp_path / INDEX_NAME).read_text())["metadata"] == {"total_size": index.total_bytes}
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["top_p"]) == ([448, 455, 457], 0.95)
    tokenizer = Tokenizer.from_dir(tmp_path)
    assert [tokenizer.decode([i]) for i in config.eos_token_ids] == ["<|endoftext|>", "<|user|>", "<|observation|>"]


def test_weights_depend_on_the_seed_and_not_on_shards(tmp_path: Path) -> None:
    make_tiny(tmp_path / "a", "nano", 1)
    make_tiny(tmp_path / "b", "nano", 1, max_shard_bytes=100_000)
    make_tiny(tmp_path / "c", "nano", 2)
    a, b, c = (tensor_bytes(tmp_path / name) for name in "abc")
    assert a == b
    assert all(a[name] != c[name] for name in a)
    assert (tmp_path / "a" / "model.safetensors").exists()


def test_weights_are_the_same_everywhere(tmp_path: Path) -> None:
    """A fixed value: a changed generator or rounding would silently change every benchmark and golden."""
    config = GlmConfig.from_dict(size_config("nano"))
    spec = next(s for s in tensor_specs(config) if s.name == "model.norm.weight")
    (values,) = RandomTensors(config, 0).values(spec, 1 << 20)
    assert values[:4].tolist() == pytest.approx([1.003764, 1.002071, 1.094593, 1.020573], abs=1e-6)


def test_distributions(tmp_path: Path) -> None:
    config = GlmConfig.from_dict(size_config("small"))
    specs = {spec.name: spec for spec in tensor_specs(config)}
    source = RandomTensors(config, 0)

    def measured(name: str) -> tuple[float, float]:
        values = np.concatenate(list(source.values(specs[name], 1 << 16)))
        return float(values.mean()), float(values.std())

    layer = "model.layers.3."
    for name, mean, deviation in (
        ("model.embed_tokens.weight", 0, 1),
        ("lm_head.weight", 0, 2 * 512**-0.5),
        (layer + "self_attn.q_a_proj.weight", 0, 512**-0.5),
        (layer + "self_attn.q_b_proj.weight", 0, 2.5 * 256**-0.5),
        (layer + "self_attn.o_proj.weight", 0, 512**-0.5 * 20**-0.5),
        (layer + "mlp.experts.0.down_proj.weight", 0, 256**-0.5 * 20**-0.5),
        (layer + "mlp.gate.weight", 0, 512**-0.5),
        ("model.layers.10.eh_proj.weight", 0, 1024**-0.5),
    ):
        found = measured(name)
        assert found == pytest.approx((mean, deviation), rel=0.05, abs=0.05 * deviation), name
    for name, mean, deviation in (
        (layer + "input_layernorm.weight", 1, 0.1),
        ("model.layers.2.self_attn.indexer.k_norm.bias", 0, 0.1),
        (layer + "mlp.gate.e_score_correction_bias", 6.9, 0.05),
    ):
        found = measured(name)
        assert found == pytest.approx((mean, deviation), rel=0.5, abs=0.05), name


def test_bfloat16_is_rounded_to_nearest_even() -> None:
    values = np.random.default_rng(0).standard_normal(100_000, dtype=np.float32)
    values[:3] = (1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8)  # ties
    for dtype, name in ((torch.bfloat16, "BF16"), (torch.float16, "F16"), (torch.float32, "F32")):
        expected = torch.from_numpy(values).to(dtype)
        assert encode(values, name) == expected.view(torch.uint8).numpy().tobytes()


def test_fp8_checkpoints_keep_what_the_config_says(tmp_path: Path) -> None:
    raw = size_config("nano")
    keep = "model.layers.0.self_attn.q_a_proj"
    quantization = {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
        "modules_to_not_convert": [keep],
    }  # fmt: skip
    write_random_checkpoint({**raw, "quantization_config": quantization}, tmp_path)
    tensors = CheckpointIndex.open(tmp_path).tensors
    assert tensors[keep + ".weight"].dtype == "BF16"
    assert keep + ".weight_scale_inv" not in tensors
    other = tensors["model.layers.1.self_attn.q_a_proj.weight_scale_inv"]
    assert (other.dtype, other.shape) == ("F32", (1, 1))
    assert tensors["model.layers.0.self_attn.indexer.weights_proj.weight"].dtype == "BF16"


def test_fp8_is_the_same_checkpoint_quantised(tmp_path: Path) -> None:
    from freehold.model.quant import quantize_blocks
    from freehold.model.weights import read_tensor

    raw = size_config("nano") | {"hidden_size": 320, "moe_intermediate_size": 136}
    write_random_checkpoint(raw, tmp_path / "bf16", 5)
    write_random_checkpoint(raw, tmp_path / "fp8", 5, fp8=True, max_shard_bytes=1 << 20)
    plain, fp8 = CheckpointIndex.open(tmp_path / "bf16"), CheckpointIndex.open(tmp_path / "fp8")
    assert not list(find_problems(GlmConfig.from_file(tmp_path / "fp8"), fp8))
    stored = tensor_bytes(tmp_path / "fp8")
    for name in ("model.layers.1.self_attn.kv_a_proj_with_mqa.weight", "model.layers.8.mlp.experts.3.up_proj.weight"):
        quantized, scale = quantize_blocks(read_tensor(plain, name))
        assert stored[name] == quantized.view(torch.uint8).numpy().tobytes()
        assert stored[name + "_scale_inv"] == scale.numpy().tobytes()
    norm = "model.layers.2.self_attn.indexer.k_norm.bias"
    assert stored[norm] == tensor_bytes(tmp_path / "bf16")[norm]


def test_any_config_and_dtype(tmp_path: Path) -> None:
    raw: dict[str, Any] = size_config("nano") | {"vocab_size": 100, "eos_token_id": 1, "attention_bias": True}
    write_random_checkpoint(raw, tmp_path, 7, dtype="float32")
    config, index = GlmConfig.from_file(tmp_path), CheckpointIndex.open(tmp_path)
    check(config, index)
    assert {entry.dtype for entry in index.tensors.values()} == {"F32"}
    assert "model.layers.0.self_attn.o_proj.bias" in index.tensors
    assert not (tmp_path / "tokenizer.json").exists()  # 100 ids have no room for one
    with pytest.raises(ConfigError, match="hidden_size"):
        write_random_checkpoint(raw | {"hidden_size": 0}, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_transformers_loads_it(tmp_path: Path) -> None:
    make_tiny(tmp_path, "nano", 0)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    assert model.config.indexer_types.count("full") == 4
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path)) == 512 - 28


def test_it_replaces_its_own_and_refuses_what_is_not(tmp_path: Path) -> None:
    make_tiny(tmp_path, "nano", 1, max_shard_bytes=1 << 20)
    assert made_before(tmp_path, "nano", 1)
    assert not made_before(tmp_path, "nano", 2)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "model-00001-of-00009.safetensors.tmp").write_bytes(b"of a call that was killed")
    make_tiny(tmp_path, "nano", 2)  # one shard: the three old ones must go
    assert [file.name for file in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]
    assert not (tmp_path / INDEX_NAME).exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"
    (tmp_path / MARKER_NAME).unlink()
    with pytest.raises(InvalidRequest, match="not empty"):
        make_tiny(tmp_path, "nano", 3)
    make_tiny(tmp_path, "nano", 3, force=True)
    assert made_before(tmp_path, "nano", 3)


def test_an_interrupted_call_is_not_complete_and_can_be_repeated(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_tiny(tmp_path, "nano", 1, max_shard_bytes=1 << 20, progress=stop)
    assert not made_before(tmp_path, "nano", 1)
    with pytest.raises(CheckpointError):
        CheckpointIndex.open(tmp_path)
    make_tiny(tmp_path, "nano", 1)
    assert made_before(tmp_path, "nano", 1)
    check(GlmConfig.from_file(tmp_path), CheckpointIndex.open(tmp_path))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.tmp").symlink_to("/dev/full")
    with pytest.raises(DiskFull, match=r"model\.safetensors: no space left"):
        make_tiny(tmp_path, "nano", 1, force=True)
    assert not list(tmp_path.glob("*.safetensors*"))


def test_a_call_that_failed_can_be_repeated_without_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise DiskFull("full")

    with monkeypatch.context() as patched:
        patched.setattr("freehold.model.tiny.RandomTensors.pieces", full)
        with pytest.raises(DiskFull):
            make_tiny(tmp_path / "d", "nano", 1)
    make_tiny(tmp_path / "d", "nano", 1)


def test_a_disk_that_is_too_small_is_known_before_writing(tmp_path: Path) -> None:
    huge = size_config("medium") | {"n_routed_experts": 10_000_000, "num_hidden_layers": 4}
    huge |= {"indexer_types": ["full"] * 4, "index_topk_freq": 1, "num_nextn_predict_layers": 0}
    huge |= {"mlp_layer_types": ["dense"] * 4, "first_k_dense_replace": 4}
    huge |= {"intermediate_size": 10**15}
    with pytest.raises(DiskFull, match="are free on its disk"):
        write_random_checkpoint(huge, tmp_path / "d")
    assert not list((tmp_path / "d").iterdir())


def test_what_cannot_be_asked_for(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="choose one of nano, small, medium") as caught:
        make_tiny(tmp_path, "large")
    assert caught.value.param == "size"
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidRequest, match="is a file"):
        make_tiny(tmp_path / "file", "nano")
    assert SIZES == ("nano", "small", "medium")
