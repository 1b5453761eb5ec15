"""Loading: every dtype, FP8, exactly once, little memory, and one line for whatever is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from freehold.errors import CheckpointError, ConfigError
from freehold.headers import INDEX_NAME, SINGLE_NAME, CheckpointIndex
from freehold.model.config import GlmConfig
from freehold.model.glm import Glm
from freehold.model.names import tensor_specs
from freehold.model.quant import dequantize_blocks
from freehold.model.sizes import size_config
from freehold.model.storage_fp8 import fp8_quantization
from freehold.model.tiny import make_tiny, write_random_checkpoint
from freehold.model.weights import load_weights, read_tensor

Q_A = "model.layers.4.self_attn.q_a_proj.weight"
KV_A = "model.layers.4.self_attn.kv_a_proj_with_mqa.weight"
BIAS = "model.layers.3.mlp.gate.e_score_correction_bias"


def odd_config(**changes: Any) -> dict[str, Any]:
    """Sizes that leave ragged blocks and heads that straddle them: 2.5 blocks a kv_b head, as in GLM-5.2 3.5."""
    return size_config("nano") | {
        "hidden_size": 200, "q_lora_rank": 136, "kv_lora_rank": 130, "qk_nope_head_dim": 192, "v_head_dim": 128,
        "qk_rope_head_dim": 32, "qk_head_dim": 224, "num_attention_heads": 3, "num_key_value_heads": 3,
        "n_routed_experts": 4, "moe_intermediate_size": 72,
    } | changes  # fmt: skip


def load(directory: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Glm:
    model = Glm(GlmConfig.from_file(directory), dtype=dtype)
    for tensor in model.checkpoint_tensors().values():
        tensor.data.fill_(float("nan"))  # what is not loaded will show
    load_weights(model, directory, **options)
    return model


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float32])
def test_every_tensor_is_loaded_from_every_dtype(tmp_path: Path, stored: str, wanted: torch.dtype) -> None:
    write_random_checkpoint(size_config("nano"), tmp_path, 1, dtype=stored)
    on_disk = safetensors.torch.load_file(tmp_path / SINGLE_NAME)
    loaded = load(tmp_path, wanted).checkpoint_tensors()
    assert loaded.keys() == on_disk.keys()
    for name, tensor in loaded.items():
        assert tensor.dtype == (torch.float32 if name.endswith("correction_bias") else wanted)
        assert torch.equal(tensor, on_disk[name].to(tensor.dtype)), name


@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("max_shard_bytes", [1 << 30, 60_000])
def test_fp8_with_ragged_blocks_and_straddling_heads(tmp_path: Path, wanted: torch.dtype, max_shard_bytes: int) -> None:
    write_random_checkpoint(odd_config(), tmp_path, 1, fp8=True, max_shard_bytes=max_shard_bytes)
    raw: dict[str, torch.Tensor] = {}
    for file in tmp_path.glob("*.safetensors"):
        raw |= safetensors.torch.load_file(file)
    kv_b = "model.layers.0.self_attn.kv_b_proj.weight"
    assert tuple(raw[kv_b].shape) == (3 * 320, 130)
    assert tuple(raw[kv_b + "_scale_inv"].shape) == (8, 2)
    loaded = load(tmp_path, wanted).checkpoint_tensors()
    quantised = 0
    for name, tensor in loaded.items():
        expected = raw[name].to(tensor.dtype)
        if raw[name].dtype == torch.float8_e4m3fn:
            quantised += 1
            rows, columns = tensor.shape
            scale = raw[name + "_scale_inv"].double()
            scale = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
            exact = raw[name].double() * scale
            if wanted == torch.float32:
                expected = exact.float()
            else:  # through dequantize_blocks, which has its own tests, into a tensor of its own
                dequantize_blocks(raw[name], raw[name + "_scale_inv"], expected)
                assert bool(((expected.double() - exact).abs() <= exact.abs() * 2.0**-8).all())
        assert torch.equal(tensor, expected), name
    assert quantised == sum(spec.quantizable for spec in tensor_specs(GlmConfig.from_file(tmp_path)))


def test_a_scale_may_be_in_another_shard(tmp_path: Path) -> None:
    write_random_checkpoint(odd_config(), tmp_path, 1, fp8=True)
    whole = load(tmp_path).checkpoint_tensors()
    tensors = safetensors.torch.load_file(tmp_path / SINGLE_NAME)
    (tmp_path / SINGLE_NAME).unlink()
    groups: dict[str, list[str]] = {"a.safetensors": [], "b.safetensors": []}
    for name in tensors:
        groups["b.safetensors" if name.endswith("_scale_inv") else "a.safetensors"].append(name)
    for file, names in groups.items():
        safetensors.torch.save_file({name: tensors[name] for name in names}, tmp_path / file)
    weight_map = {name: file for file, names in groups.items() for name in names}
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    split = load(tmp_path).checkpoint_tensors()
    assert all(torch.equal(whole[name], split[name]) for name in whole)


def test_data_that_is_not_aligned(tmp_path: Path) -> None:
    """The format does not ask for padding; a header may end anywhere."""
    make_tiny(tmp_path, "nano")
    expected = load(tmp_path).checkpoint_tensors()
    path = tmp_path / SINGLE_NAME
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip(b" ") + b" " * (1 + length % 2)
    header += b" " * (1 - len(header) % 2)  # odd, so that the data starts at an odd byte
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    assert (8 + len(header)) % 2 == 1
    found = load(tmp_path).checkpoint_tensors()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_progress_and_the_index_that_comes_back(tmp_path: Path) -> None:
    make_tiny(tmp_path, "nano", max_shard_bytes=1 << 20)
    seen: list[tuple[int, int]] = []
    model = Glm(GlmConfig.from_file(tmp_path), dtype=torch.bfloat16)
    index = load_weights(model, tmp_path, progress=lambda done, total: seen.append((done, total)), verify=True)
    assert len(index.shards) == 3
    assert seen == sorted(seen)
    assert seen[-1] == (index.total_bytes, index.total_bytes)


def test_reading_one_tensor(tmp_path: Path) -> None:
    write_random_checkpoint(odd_config(), tmp_path, 1, fp8=True)
    index, loaded = CheckpointIndex.open(tmp_path), load(tmp_path, torch.bfloat16).checkpoint_tensors()
    assert torch.equal(read_tensor(index, Q_A), loaded[Q_A])
    assert read_tensor(index, BIAS).dtype == torch.float32
    with pytest.raises(CheckpointError, match=r"no tensor 'model\.nothing'"):
        read_tensor(index, "model.nothing")


Edit = Callable[[dict[str, torch.Tensor]], None]


def drop(name: str) -> Edit:
    return lambda tensors: tensors.__delitem__(name)


def put(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    return lambda tensors: tensors.update({name: change(tensors[name]).contiguous()})


def add(name: str) -> Edit:
    return lambda tensors: tensors.update({name: torch.zeros(2, 2)})


@pytest.mark.parametrize(
    ("fp8", "edit", "message"),
    [
        (False, drop(Q_A), f"tensor '{Q_A}' is missing"),
        (False, add("model.layers.4.self_attn.q_c_proj.weight"), "q_c_proj.weight' has no use in this model"),
        (False, add("model.layers.8.embed_tokens.weight"), "the MTP layer uses the model's own embedding"),
        (False, add("model.layers.8.shared_head.head.weight"), "the MTP layer uses the model's own embedding"),
        (False, add("model.layers.4.self_attn.indexer.wk.weight"), "shares the indexer of another"),
        (False, put(KV_A, lambda t: t.T), r"has shape \[64, 96\], expected \[96, 64\]"),
        (
            False,
            put("lm_head.weight", lambda t: t[:-1]),
            r"'lm_head.weight' has shape \[511, 64\], expected \[512, 64\]",
        ),
        (False, put(Q_A, lambda t: t.to(torch.int8)), "is I8; expected BF16, F16, F32 or FP8"),
        (False, put(Q_A, lambda t: t.double()), "is F64; expected"),
        (False, put(Q_A, lambda t: t.to(torch.float8_e5m2)), "is F8_E5M2; expected"),
        (False, put(Q_A, lambda t: t.to(torch.float8_e4m3fn)), f"is FP8, but '{Q_A}_scale_inv' is missing"),
        (False, put(BIAS, lambda t: t.bfloat16()), "is BF16; it must be F32"),
        (False, add(Q_A + "_scale_inv"), "but it has FP8 scales"),
        (True, drop(Q_A + "_scale_inv"), f"is FP8, but '{Q_A}_scale_inv' is missing"),
        (True, drop(Q_A), f"tensor '{Q_A}' is missing"),
        (True, put(Q_A + "_scale_inv", lambda t: t.bfloat16()), "it must be F32"),
        (True, put(Q_A + "_scale_inv", lambda t: t * float("inf")), "has a scale that is NaN or infinite"),
        (True, put(Q_A + "_scale_inv", lambda t: torch.ones(2, 1)), r"has shape \[2, 1\], expected \[1, 1\]"),
        (True, put(Q_A, lambda t: t.bfloat16()), "but it has FP8 scales"),
    ],
)
def test_what_is_wrong_with_a_tensor_is_said_in_one_line(tmp_path: Path, fp8: bool, edit: Edit, message: str) -> None:
    make_tiny(tmp_path, "nano", fp8=fp8)
    tensors = safetensors.torch.load_file(tmp_path / SINGLE_NAME)
    edit(tensors)
    safetensors.torch.save_file(tensors, tmp_path / SINGLE_NAME)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(tmp_path)
    assert "\n" not in caught.value.message


def edit_config(directory: Path, **changes: Any) -> None:
    raw = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps(raw))


def test_the_scales_and_the_config_must_agree(tmp_path: Path) -> None:
    make_tiny(tmp_path / "fp8", "nano", fp8=True)
    edit_config(tmp_path / "fp8", quantization_config=None)
    with pytest.raises(CheckpointError, match="has FP8 block scales, but"):
        load(tmp_path / "fp8")
    make_tiny(tmp_path / "bf16", "nano")
    edit_config(tmp_path / "bf16", quantization_config=fp8_quantization(GlmConfig.from_file(tmp_path / "bf16")))
    with pytest.raises(CheckpointError, match="declares FP8, but no tensor has"):
        load(tmp_path / "bf16")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_method 'modelopt' is not supported"),
        ({"quant_method": "gptq"}, "quant_method 'gptq' is not supported"),
        ({"quant_method": None}, "quant_method None is not supported"),
        ({"fmt": "e5m2"}, "fmt = 'e5m2'"),
        ({"activation_scheme": "static"}, "activation_scheme = 'static'"),
        ({"weight_block_size": [64, 64]}, r"weight_block_size = \[64, 64\]"),
        ({"weight_block_size": None}, "weight_block_size = None"),
        ({"scale_fmt": "ue8m0"}, "unknown key 'scale_fmt'"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert must be a list"),
    ],
)
def test_another_quantisation_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    make_tiny(tmp_path, "nano", fp8=True)
    quantization = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    edit_config(tmp_path, quantization_config=quantization | changes)
    with pytest.raises(ConfigError, match=message):
        load(tmp_path)


def test_nothing_is_loaded_from_a_checkpoint_with_a_problem(tmp_path: Path) -> None:
    make_tiny(tmp_path, "nano", max_shard_bytes=1 << 20)
    last = max(tmp_path.glob("*.safetensors"))
    os.truncate(last, last.stat().st_size - 1)
    model = Glm(GlmConfig.from_file(tmp_path))
    for tensor in model.checkpoint_tensors().values():
        tensor.data.fill_(7)
    with pytest.raises(CheckpointError, match=f"{last.name}: truncated"):
        load_weights(model, tmp_path)
    assert all(bool((tensor == 7).all()) for tensor in model.checkpoint_tensors().values())


def test_a_flipped_bit_is_found_on_request(tmp_path: Path) -> None:
    make_tiny(tmp_path, "nano")
    with (tmp_path / SINGLE_NAME).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    load(tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: its SHA-256 is not that in SHA256SUMS"):
        load(tmp_path, verify=True)


def test_a_model_of_another_config_is_refused(tmp_path: Path) -> None:
    make_tiny(tmp_path, "nano")
    other = GlmConfig.from_dict(size_config("nano") | {"vocab_size": 513})
    with pytest.raises(CheckpointError, match=r"has shape \[512, 64\], expected \[513, 64\] \(and 1 more problems\)"):
        load_weights(Glm(other), tmp_path)


class Partial:
    """A model that forgot tensors, or has them wrong."""

    def __init__(self, directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
        self.config = GlmConfig.from_file(directory)
        self._tensors = Glm(self.config).checkpoint_tensors()
        change(self._tensors)

    def checkpoint_tensors(self) -> dict[str, torch.Tensor]:
        return self._tensors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(Q_A), f"the model has no place for tensor '{Q_A}'"),
        (add("model.extra"), "the model's tensor 'model.extra'"),
        (put("lm_head.weight", lambda t: t[1:]), "the model's tensor 'lm_head.weight'"),
        (put(BIAS, lambda t: t.bfloat16()), "it must be float32"),
    ],
)
def test_a_model_that_does_not_hold_the_published_tensors(tmp_path: Path, change: Edit, message: str) -> None:
    make_tiny(tmp_path, "nano")
    with torch.no_grad(), pytest.raises(CheckpointError, match=message):
        load_weights(Partial(tmp_path, change), tmp_path)


MEASURE = """
import sys
import torch
from freehold.model.config import GlmConfig
from freehold.model.glm import Glm
from freehold.model.weights import load_weights
from tests.private_memory import Peak

directory = sys.argv[1]
with Peak() as peak:
    model = Glm(GlmConfig.from_file(directory), dtype=torch.bfloat16)
    load_weights(model, directory)
print(peak.bytes, sum(t.numel() * t.element_size() for t in model.checkpoint_tensors().values()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("fp8", [False, True])
def test_peak_private_memory_is_the_model_and_little_more(tmp_path: Path, fp8: bool) -> None:
    make_tiny(tmp_path, "small", fp8=fp8, max_shard_bytes=100_000_000)
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    peak, size = map(int, result.stdout.split())
    assert size > 250_000_000
    assert 0.95 * size < peak <= 1.15 * size
