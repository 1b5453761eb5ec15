"""What `publish.write` writes: read by our loaders and `transformers`, whole or not at all."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch

from freehold.errors import CheckpointError, ConfigError, InvalidRequest
from freehold.headers import INDEX_NAME, CheckpointIndex
from freehold.model.checkpoint_files import verify_manifest
from freehold.model.config import GlmConfig
from freehold.model.glm import Glm
from freehold.model.inspect import inspect
from freehold.model.sizes import size_config
from freehold.model.tiny import make_tiny
from freehold.model.tokenizer import Tokenizer
from freehold.model.weights import load_weights
from freehold.train import publish

BIAS = "model.layers.3.mlp.gate.e_score_correction_bias"


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("nano") / "source"
    make_tiny(directory, "nano", seed=5)
    return directory


def load(directory: Path, dtype: torch.dtype = torch.float32) -> Glm:
    model = Glm(GlmConfig.from_file(directory), dtype=dtype)
    load_weights(model, directory)
    return model


def write(model: Glm, source: Path, out: Path, **options: object) -> publish.Published:
    return publish.write(model, Tokenizer.from_dir(source), size_config("nano"), out, **options)  # type: ignore[arg-type]


def test_a_model_held_in_fp32_comes_back_in_bf16_with_fp32_biases(nano: Path, tmp_path: Path) -> None:
    model = load(nano)
    written = write(model, nano, tmp_path / "out")
    index = CheckpointIndex.open(tmp_path / "out")
    assert inspect(tmp_path / "out").problems == ()
    assert verify_manifest(tmp_path / "out", (shard.path for shard in index.shards)) == 1
    assert (written.tensors, written.data_bytes) == (len(index.tensors), index.total_bytes)
    assert {entry.dtype for entry in index.tensors.values()} == {"BF16", "F32"}
    assert index.tensors[BIAS].dtype == "F32"
    again = load(tmp_path / "out")
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name  # the source was bf16: nothing is rounded


def test_what_is_written_of_an_untouched_model_is_the_source_byte_for_byte(nano: Path, tmp_path: Path) -> None:
    write(load(nano, torch.bfloat16), nano, tmp_path / "out")
    for name in ("model.safetensors", "SHA256SUMS", "config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (nano / name).read_bytes(), name


def test_transformers_reads_it(nano: Path, tmp_path: Path) -> None:
    oracle = pytest.importorskip("freehold.model.oracle", reason="needs transformers")
    pytest.importorskip("transformers", reason="needs transformers")
    model = load(nano)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    write(model, nano, tmp_path / "out")
    ours, theirs = oracle.load_ours(tmp_path / "out"), oracle.load_oracle(tmp_path / "out")
    with oracle.stable_selection():
        found = oracle.compare_layers(ours, theirs, list(range(40)))
    assert [point.point for point in found if point.differs] == []


def test_shards_have_an_index(nano: Path, tmp_path: Path) -> None:
    write(load(nano), nano, tmp_path / "out", max_shard_bytes=600_000)
    assert (tmp_path / "out" / INDEX_NAME).is_file()
    assert inspect(tmp_path / "out").problems == ()


def test_sampling_defaults_can_be_given(nano: Path, tmp_path: Path) -> None:
    write(load(nano), nano, tmp_path / "out", generation={"temperature": 0.0})
    text = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert text["temperature"] == 0.0
    assert "top_p" not in text
    assert text["eos_token_id"] == size_config("nano")["eos_token_id"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3.4e38])  # the last is finite in fp32, not in bf16
def test_a_weight_that_is_no_number_is_refused_and_nothing_is_left(nano: Path, tmp_path: Path, bad: float) -> None:
    model = load(nano)
    with torch.no_grad():
        model.norm.weight[3] = bad
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight'.*NaN or infinite"):
        write(model, nano, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_with_something_in_it_is_kept_unless_it_is_to_be_replaced(nano: Path, tmp_path: Path) -> None:
    model, out = load(nano), tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("x")
    with pytest.raises(InvalidRequest, match="never overwritten"):
        write(model, nano, out)
    assert (out / "mine").read_text() == "x"
    write(model, nano, out, replace=True)
    assert not (out / "mine").exists()
    assert inspect(out).problems == ()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_replacement_leaves_what_was_there(nano: Path, tmp_path: Path) -> None:
    model, out = load(nano), tmp_path / "out"
    write(model, nano, out)
    with torch.no_grad():
        model.norm.weight[3] = float("nan")
    with pytest.raises(CheckpointError):
        write(model, nano, out, replace=True)
    assert inspect(out).problems == ()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_replacement_that_cannot_be_put_in_place_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").write_text("old")
    rename = Path.rename

    def refused(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refused)
    with (
        pytest.raises(CheckpointError, match="cannot be made: Input/output error"),
        publish.staged(tmp_path / "out", replace=True) as work,
    ):
        (work / "new").write_text("new")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "kept"]


def test_a_config_of_another_model_is_refused(nano: Path, tmp_path: Path) -> None:
    config = {**size_config("nano"), "moe_intermediate_size": 48}
    with pytest.raises(ConfigError, match="asks for"):
        publish.write(load(nano), Tokenizer.from_dir(nano), config, tmp_path / "out")
    unlike = {**size_config("nano"), "num_nextn_predict_layers": 0}
    with pytest.raises(ConfigError, match=r"has no 'model\.layers\.8\."):
        publish.write(load(nano), Tokenizer.from_dir(nano), unlike, tmp_path / "out")
    with pytest.raises(ConfigError, match="tokenizer has 1024 ids"):
        publish.write(load(nano), Tokenizer.toy(1024), size_config("nano"), tmp_path / "out")


def test_rows_of_no_token_are_left_out_and_nothing_else_changes(nano: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.toy(384)  # fewer ids than the model has rows
    config = {**size_config("nano"), "eos_token_id": 1, "pad_token_id": 1}
    model = load(nano)
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    smaller, raw = publish.drop_unused_tokens(model, tokenizer, config)
    ids = Tokenizer(tokenizer.backend).vocab_size
    assert ids <= raw["vocab_size"] == smaller.vocab_size < ids + 64
    publish.write(model, smaller, raw, tmp_path / "out")
    again = load(tmp_path / "out")
    assert again.embed_tokens.shape[0] == raw["vocab_size"]
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, whole[name][: len(tensor)]), name
        assert tensor.shape == whole[name].shape or name in ("embed_tokens", "lm_head.weight")
