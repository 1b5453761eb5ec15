"""Models to plan for: counted sizes against published ones and against files, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from freehold.errors import CheckpointError, ConfigError, FreeholdError, InvalidRequest
from freehold.headers import encode_header
from freehold.model.config import GlmConfig
from freehold.model.inspect import published_config, published_json
from freehold.model.sizes import size_config
from freehold.model.storage import stored_tensors
from freehold.plan.models import bundled, counted, load
from freehold.plan.types import WeightDtype

_ITEM = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "U8": 1, "I32": 4, "I64": 8}


def write_checkpoint(directory: Path, raw: dict[str, object], *, leave_out: str = "", extra: str = "") -> None:
    """A checkpoint of zeros with every tensor that its config calls for, but those whose name has `leave_out`."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(raw))
    tensors = [(t.name, t.dtype, t.shape) for t in stored_tensors(GlmConfig.from_dict(raw))]
    tensors = [tensor for tensor in tensors if not leave_out or leave_out not in tensor[0]]
    if extra:
        tensors.append((extra, "BF16", (4, 4)))
    nbytes = sum(int(np.prod(shape)) * _ITEM[dtype] for _, dtype, shape in tensors)
    (directory / "model.safetensors").write_bytes(encode_header(tensors, {}) + bytes(nbytes))


@pytest.mark.parametrize(
    ("name", "nbytes"),
    [("glm-5.2", 1_506_659_919_872), ("glm-5.2-fp8", 755_617_140_416)],
)
def test_sizes_are_the_published_ones(name: str, nbytes: int) -> None:
    assert load(name).total_bytes == nbytes


def test_nvfp4_is_its_files_without_their_headers() -> None:
    files = 464_823_042_096
    assert 0 < files - load("glm-5.2-nvfp4").total_bytes < 1e-4 * files


def test_deepseek_has_its_published_size() -> None:
    spec = load("deepseek-v3.2")
    assert spec.parameters == pytest.approx(685e9, rel=0.002)  # as the model card counts, its MTP layer included
    assert spec.family == "deepseek_v32"
    assert len(spec.config.full_layers) == 61


@pytest.mark.parametrize("name", ["glm-5.2", "glm-5.2-fp8", "glm-5.1"])
def test_counting_one_expert_for_all_is_counting_all(name: str) -> None:
    """The slow twin lists every stored tensor of the checkpoint."""
    item = {**_ITEM}
    slow = sum(int(np.prod(t.shape)) * item[t.dtype] for t in stored_tensors(published_config(name)))
    assert load(name).total_bytes == slow


@pytest.mark.parametrize("name", bundled())
def test_every_model_of_the_table_loads(name: str) -> None:
    spec = load(name)
    assert spec.name == name
    assert spec.licence == "MIT"
    assert spec.source.where
    assert spec.config.has_mtp
    assert spec.total_bytes == sum(entry.total for entry in spec.stored)
    dense = load(name.removesuffix(f"-{spec.dtype}")) if spec.family == "glm_moe_dsa" else spec
    assert dense.parameters == spec.parameters


def test_the_four_builds_of_every_glm_are_there() -> None:
    wanted = {f"glm-{version}{suffix}" for version in ("5", "5.1", "5.2", "5.3") for suffix in _SUFFIXES}
    assert wanted | {"deepseek-v3.2"} == set(bundled())


_SUFFIXES = ("", "-fp8", "-nvfp4", "-w4a16")


def test_names_are_taken_as_people_write_them() -> None:
    assert load("zai-org/GLM-5.2-FP8") is load("glm-5.2-fp8")
    assert load("GLM-5.2-BF16") is load("glm-5.2")
    assert load("nvidia/GLM-5.2-NVFP4") is load("glm-5.2-nvfp4")
    assert load("zai-org/GLM-5.3") is load("glm-5.3-fp8")  # the repository without a suffix holds FP8
    assert load("zai-org/GLM-5.3-BF16") is load("glm-5.3")


def test_an_unknown_name_says_what_there_is() -> None:
    with pytest.raises(InvalidRequest, match=r"glm-6: no such directory, and no published model; there are glm-5, "):
        load("glm-6")


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_a_directory_is_read_by_its_headers(tmp_path: Path, dtype: WeightDtype) -> None:
    raw = size_config("nano")
    if dtype == "fp8":
        raw["quantization_config"] = published_json("glm-5.2-fp8")["quantization_config"] | {
            "modules_to_not_convert": ["lm_head", "model.embed_tokens"]
        }
    write_checkpoint(tmp_path / "m", raw)
    spec = load(tmp_path / "m")
    assert spec.dtype == dtype
    assert spec.total_bytes == (tmp_path / "m" / "model.safetensors").stat().st_size - _header_bytes(tmp_path / "m")
    assert not spec.bundled
    # By the config alone the same is counted, but for what this build converts and the published one does not.
    (tmp_path / "m" / "model.safetensors").unlink()
    by_config = load(tmp_path / "m")
    assert by_config.total_bytes == pytest.approx(spec.total_bytes, rel=0.01)
    assert "no weights beside config.json" in by_config.notes[0]


def _header_bytes(directory: Path) -> int:
    data = (directory / "model.safetensors").read_bytes()
    return 8 + int.from_bytes(data[:8], "little")


def test_a_build_without_its_mtp_layer_has_none(tmp_path: Path) -> None:
    raw = size_config("nano")
    write_checkpoint(tmp_path, raw, leave_out=f"model.layers.{raw['num_hidden_layers']}.")
    spec = load(tmp_path)
    assert not spec.config.has_mtp
    assert "no drafts" in spec.notes[0]


@pytest.mark.parametrize(
    ("leave_out", "extra", "message"),
    [
        ("layers.4.self_attn.o_proj", "", r"layer 4: no tensor of 'o_proj' in the files"),
        ("lm_head", "", r"no tensor of 'lm_head' in the files"),
        ("", "model.layers.5.self_attn.indexer.wk.weight", r"layer 5 has an indexer, but config.json says"),
        ("", "model.layers.40.mlp.gate.weight", r"has tensors of layer 40, but config.json has 8 layers"),
        ("", "model.vision.patch.weight", r"'model.vision.patch.weight' belongs to no part of this architecture"),
    ],
)
def test_files_that_do_not_match_are_refused(tmp_path: Path, leave_out: str, extra: str, message: str) -> None:
    write_checkpoint(tmp_path, size_config("nano"), leave_out=leave_out, extra=extra)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not readable as JSON"),
        ("[]", "expected a JSON object"),
        ('{"model_type": "llama"}', "expected 'glm_moe_dsa', found 'llama'"),
        (json.dumps(size_config("nano") | {"num_hidden_layers": -1}), "num_hidden_layers must be a positive integer"),
        (json.dumps(size_config("nano") | {"quantization_config": {"quant_method": "gguf"}}), "no published size"),
    ],
)
def test_a_malformed_config_is_one_clear_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_weights_of_an_unknown_storage_are_refused(tmp_path: Path) -> None:
    raw = size_config("nano")
    write_checkpoint(tmp_path, raw)
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    header = data[: _header_bytes(tmp_path)].replace(b'"BF16"', b'"I16" ')
    path.write_bytes(header + data[len(header) :])
    with pytest.raises(ConfigError, match=r"stored mostly as I16, 16\.0 bits each"):
        load(tmp_path)


def test_the_licence_is_read_from_the_checkpoint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, size_config("nano"))
    assert load(tmp_path).licence is None
    (tmp_path / "LICENSE").write_text("\nMIT License\n\nCopyright (c) 2026\n")
    assert load(tmp_path).licence == "MIT"
    (tmp_path / "LICENSE").write_text("Some Community License 2.0\n")
    spec = load(tmp_path)
    assert spec.licence == "Some Community License 2.0"
    assert spec.licence_source.endswith("LICENSE")


def test_every_error_is_one_of_ours(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(FreeholdError):
        load(tmp_path)
    with pytest.raises(FreeholdError):
        load("")


def test_counting_sees_a_wrong_config() -> None:
    """The sizes above can fail: a config with one indexer more is larger."""
    config = published_config("glm-5.2")
    more = replace(config, indexer_types=("full",) * 4 + config.indexer_types[4:])
    sizes = [sum(entry.total for entry in counted(made, "bf16")) for made in (config, more)]
    assert sizes[1] - sizes[0] == 2 * (4096 * 2048 + 128 * 6144 + 32 * 6144 + 2 * 128)
