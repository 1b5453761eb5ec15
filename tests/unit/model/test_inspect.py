"""`inspect`: the published figures, exactly, and what it says about real directories."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from freehold.errors import CheckpointError, ConfigError, NotFound
from freehold.headers import CheckpointIndex
from freehold.model.inspect import PUBLISHED, Layers, Parameters, inspect
from freehold.model.tiny import make_tiny


def test_glm_52() -> None:
    report = inspect("GLM-5.2")
    assert report.layers == Layers(78, full_indexer=21, shared_indexer=57, dense_mlp=3, sparse_mlp=75, mtp=1)
    assert report.parameters == Parameters(753_329_921_024, 19_456, 9_952_920_320, 40_297_758_720)
    assert (report.tensors, report.shards, report.kind) == (59_585, None, "published")
    assert report.total_bytes == 1_506_659_919_872
    assert report.bytes_by_dtype == {"BF16": 753_329_921_024 * 2, "F32": 77_824}
    assert (report.quantization, report.template) == ("none", "built-in, profile glm-5.2")
    assert [(row.latent, row.index, row.per_token, row.per_token_mtp, row.max_context) for row in report.caches] == [
        ("fp32", "fp32", 190_464, 193_280, 199_715_979_264),
        ("fp32", "fp8", 182_484, 184_920, 191_348_342_784),
        ("bf16", "bf16", 95_232, 96_640, 99_857_989_632),
        ("bf16", "fp8", 92_628, 93_912, 97_127_497_728),
        ("fp8_ds_mla", "fp32", 61_920, 63_088, 64_927_825_920),
        ("fp8_ds_mla", "bf16", 56_544, 57_456, 59_290_681_344),
        ("fp8_ds_mla", "fp8", 53_940, 54_728, 56_560_189_440),
        ("fp8", "fp8", 47_700, 48_408, 50_017_075_200),
        ("nvfp4_ds_mla", "fp8", 30_228, 30_712, 31_696_355_328),
    ]


def test_glm_52_fp8_is_as_its_headers_say() -> None:
    report = inspect("glm-5.2-fp8")
    assert report.tensors == 118_629
    assert report.total_bytes == 755_617_140_416
    assert report.bytes_by_dtype == {"F8_E4M3": 751_226_191_872, "BF16": 2_103_729_152 * 2, "F32": 45_872_560 * 4}
    assert report.parameters == inspect("glm-5.2").parameters


def test_glm_51_has_more_of_everything_but_context() -> None:
    report = inspect("glm-5.1")
    assert report.tensors == 59_870
    assert report.parameters.total + report.parameters.correction_bias == 753_864_139_008
    assert report.layers.full_indexer == 78
    assert inspect("glm-5.3").template == "built-in, profile glm-5.3"


@pytest.mark.parametrize("name", PUBLISHED)
def test_parts_add_up_and_json_has_it_all(name: str) -> None:
    report = inspect(name)
    assert sum(report.bytes_by_part.values()) == sum(report.bytes_by_dtype.values()) == report.total_bytes
    again = json.loads(json.dumps(report.as_dict()))
    assert again["parameters"]["active"] == report.parameters.active
    assert again["config"]["indexer_types"] == list(report.config.indexer_types)
    assert len(json.dumps(again)) < 20_000  # the 541 names of the FP8 config are not repeated


def test_a_checkpoint_directory(tmp_path: Path) -> None:
    make_tiny(tmp_path, "nano", max_shard_bytes=1 << 20)
    report = inspect(tmp_path, verify=True)
    index = CheckpointIndex.open(tmp_path)
    assert (report.kind, report.shards, report.tensors, report.problems) == ("checkpoint", 3, 440, ())
    assert report.total_bytes == index.total_bytes
    assert report.verified_files == 3
    assert report.template.startswith("built-in")
    assert inspect(tmp_path).verified_files is None


def test_fp8_sizes_come_from_the_headers(tmp_path: Path) -> None:
    make_tiny(tmp_path, "nano", fp8=True)
    report = inspect(tmp_path)
    assert report.problems == ()
    assert report.quantization.startswith("fp8")
    assert report.bytes_by_dtype == inspect(tmp_path / "config.json").bytes_by_dtype
    assert "F8_E4M3" in report.bytes_by_dtype


def test_a_config_alone(tmp_path: Path) -> None:
    make_tiny(tmp_path / "full", "nano")
    (tmp_path / "config.json").write_bytes((tmp_path / "full" / "config.json").read_bytes())
    for source in (tmp_path, tmp_path / "config.json"):
        report = inspect(source)
        assert (report.kind, report.shards) == ("config", None)
        assert report.bytes_by_part == inspect(tmp_path / "full").bytes_by_part


def test_templates(tmp_path: Path) -> None:
    make_tiny(tmp_path, "nano")
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert inspect(tmp_path).template == "in tokenizer_config.json"
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert inspect(tmp_path).template == "chat_template.jinja (14 bytes, not a published one)"
    (tmp_path / "chat_template.jinja").unlink()
    settings.write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json: not readable"):
        inspect(tmp_path)


def test_problems_are_listed_not_raised(tmp_path: Path) -> None:
    make_tiny(tmp_path, "nano")
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"num_nextn_predict_layers": 0}))
    (tmp_path / "old.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes())
    report = inspect(tmp_path)
    assert len(report.problems) == 71  # the MTP layer's tensors
    assert "it is of an MTP layer, but num_nextn_predict_layers is 0" in report.problems[0]
    assert report.bytes_by_part["unexpected"] > 0
    (note,) = report.notes
    assert "old.safetensors: no index names it" in note


def test_what_cannot_be_inspected(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"glm-5\.2-fp8"):
        inspect("glm-9")
    with pytest.raises(ConfigError, match="no such file"):
        inspect(tmp_path)
    make_tiny(tmp_path / "a", "nano")
    (tmp_path / "a" / "model.safetensors").rename(tmp_path / "a" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="never loaded"):
        inspect(tmp_path / "a")
    make_tiny(tmp_path / "b", "nano")
    shard = tmp_path / "b" / "model.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert hashlib.sha256(data).hexdigest() not in (tmp_path / "b" / "SHA256SUMS").read_text()
    with pytest.raises(CheckpointError, match="its SHA-256"):
        inspect(tmp_path / "b", verify=True)
