"""Writing quantised checkpoints: what is in them, what happens when a run is stopped, and what is refused."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import safetensors.torch
import torch

from freehold.errors import CheckpointError, DiskFull, InvalidRequest
from freehold.headers import SINGLE_NAME, CheckpointIndex
from freehold.model.checkpoint_files import verify_manifest
from freehold.model.config import GlmConfig
from freehold.model.inspect import inspect
from freehold.model.names import tensor_specs
from freehold.model.quantize import Scheme, quantize_checkpoint
from freehold.model.quantize_report import REPORT_NAME, by_kind
from freehold.model.sizes import size_config
from freehold.model.tiny import MARKER_NAME, make_tiny, write_random_checkpoint
from freehold.model.weights import read_tensor

SCHEMES: tuple[Scheme, ...] = ("int8", "int4", "fp8")
SHARD = 400_000
Q_A = "model.layers.4.self_attn.q_a_proj.weight"


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("nano") / "source"
    make_tiny(directory, "nano", seed=5)
    (directory / "LICENSE").write_text("mine")
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    return directory


def stored(directory: Path) -> dict[str, bytes]:
    """Files by name, but the report, which says how often a run was resumed."""
    return {file.name: file.read_bytes() for file in directory.iterdir() if file.name != REPORT_NAME}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_tensor_is_there_and_the_errors_are_as_reported(tmp_path: Path, scheme: Scheme, dtype: str) -> None:
    write_random_checkpoint(size_config("nano"), tmp_path / "in", 5, dtype=dtype)
    report = quantize_checkpoint(tmp_path / "in", tmp_path / "out", scheme, max_shard_bytes=SHARD)
    assert inspect(tmp_path / "out").problems == ()
    config = GlmConfig.from_file(tmp_path / "in")
    before, after = CheckpointIndex.open(tmp_path / "in"), CheckpointIndex.open(tmp_path / "out")
    errors = {error.name: error for error in report.errors}
    for spec in tensor_specs(config):
        original = read_tensor(before, spec.name).double()
        noise = read_tensor(after, spec.name, torch.float32).double() - original
        error = errors.pop(spec.name, None)
        if error is None:
            assert after.tensors[spec.name].dtype == before.tensors[spec.name].dtype
            assert not noise.any(), spec.name
            continue
        copy = original + noise
        assert error.weights == spec.size
        assert error.relative_rms == pytest.approx(float(noise.norm() / original.norm()), rel=1e-5)
        assert error.max_abs == pytest.approx(float(noise.abs().max()), rel=1e-5)
        assert error.cosine == pytest.approx(float((original * copy).sum() / original.norm() / copy.norm()), rel=1e-6)
        low, high = {"int8": (0.004, 0.008), "fp8": (0.02, 0.03), "int4": (0.004, 0.1)}[scheme]
        assert low < error.relative_rms < high
    assert not errors
    assert report.total_bytes == after.total_bytes
    assert (report.shards, report.kept_shards) == (len(after.shards), 0)


def test_int4_loses_more_than_int8(nano: Path, tmp_path: Path) -> None:
    pooled = {}
    for scheme in SCHEMES:
        report = quantize_checkpoint(nano, tmp_path / scheme, scheme)
        pooled[scheme] = {kind.part: kind.relative_rms for kind in by_kind(report.errors)}
        raw = json.loads((tmp_path / scheme / REPORT_NAME).read_text())
        assert raw["source"] == "source"
        found = [tensor["relative_rms"] for tensor in raw["tensors"]]
        assert found == sorted(found, reverse=True)
        assert len(found) == len(report.errors)
        assert {kind["part"] for kind in raw["kinds"]} == pooled[scheme].keys()
    assert pooled["int8"]["routed_expert"] < pooled["fp8"]["routed_expert"] < pooled["int4"]["routed_expert"]
    assert pooled["int8"]["mtp"] == pooled["int4"]["mtp"]


def test_small_files_are_copied_and_ours_are_not(nano: Path, tmp_path: Path) -> None:
    quantize_checkpoint(nano, tmp_path / "out", "int8", max_shard_bytes=SHARD)
    files = {file.name for file in (tmp_path / "out").iterdir()}
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (nano / name).read_bytes()
    assert MARKER_NAME not in files  # `freehold tiny` would take the directory for its own
    assert SINGLE_NAME not in files
    shards = [shard.path for shard in CheckpointIndex.open(tmp_path / "out").shards]
    assert verify_manifest(tmp_path / "out", shards) == len(shards) > 1
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_an_fp8_source_is_quantised_from_its_exact_weights(tmp_path: Path, scheme: Scheme) -> None:
    write_random_checkpoint(size_config("nano"), tmp_path / "fp8", 5, fp8=True)
    report = quantize_checkpoint(tmp_path / "fp8", tmp_path / "out", scheme)
    assert inspect(tmp_path / "out").problems == ()
    before, after = CheckpointIndex.open(tmp_path / "fp8"), CheckpointIndex.open(tmp_path / "out")
    for error in report.errors:
        original = read_tensor(before, error.name, torch.float32).double()
        noise = read_tensor(after, error.name, torch.float32).double() - original
        assert error.relative_rms == pytest.approx(float(noise.norm() / original.norm()), rel=1e-5)
    kv_b = "model.layers.4.self_attn.kv_b_proj.weight"
    assert after.tensors[kv_b].dtype == "BF16"
    assert torch.equal(read_tensor(after, kv_b), read_tensor(before, kv_b))
    assert not any(name.endswith("_scale_inv") for name in after.tensors)


STOPPED = """
import os, signal, sys
from pathlib import Path
from freehold.model.quantize import quantize_checkpoint

def progress(done, total):
    if done > total * 0.6:
        os.kill(os.getpid(), signal.SIGKILL)

quantize_checkpoint(sys.argv[1], sys.argv[2], "int8", max_shard_bytes=400_000, progress=progress)
"""


def run(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def killed(nano: Path, out: Path) -> None:
    assert run(STOPPED, nano, out).returncode == -signal.SIGKILL
    assert not out.exists()


def test_a_killed_run_leaves_nothing_that_looks_complete_and_is_resumed(nano: Path, tmp_path: Path) -> None:
    quantize_checkpoint(nano, tmp_path / "whole", "int8", max_shard_bytes=SHARD)
    killed(nano, tmp_path / "out")
    partial = tmp_path / "out.partial"
    assert not (partial / "checkpoint" / "config.json").exists()
    first = partial / "checkpoint" / "model-00001-of-00005.safetensors"
    before = first.stat().st_mtime_ns
    report = quantize_checkpoint(nano, tmp_path / "out", "int8", max_shard_bytes=SHARD)
    assert (report.shards, report.kept_shards) == (5, 2)
    assert (tmp_path / "out" / first.name).stat().st_mtime_ns == before
    assert stored(tmp_path / "out") == stored(tmp_path / "whole")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "whole"]
    whole, resumed = (json.loads((tmp_path / name / REPORT_NAME).read_text()) for name in ("whole", "out"))
    assert resumed["tensors"] == whole["tensors"]


def test_what_was_changed_meanwhile_is_made_again(nano: Path, tmp_path: Path) -> None:
    quantize_checkpoint(nano, tmp_path / "whole", "int8", max_shard_bytes=SHARD)
    killed(nano, tmp_path / "out")
    shard = tmp_path / "out.partial" / "checkpoint" / "model-00002-of-00005.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert quantize_checkpoint(nano, tmp_path / "out", "int8", max_shard_bytes=SHARD).kept_shards == 1
    assert stored(tmp_path / "out") == stored(tmp_path / "whole")


def test_another_scheme_or_source_starts_afresh(nano: Path, tmp_path: Path) -> None:
    killed(nano, tmp_path / "out")
    assert quantize_checkpoint(nano, tmp_path / "out", "int4", max_shard_bytes=SHARD).kept_shards == 0
    shutil.rmtree(tmp_path / "out")
    source = tmp_path / "source"
    shutil.copytree(nano, source)
    killed(source, tmp_path / "out")
    os.utime(source / SINGLE_NAME, ns=(0, 0))
    assert quantize_checkpoint(source, tmp_path / "out", "int8", max_shard_bytes=SHARD).kept_shards == 0


def test_only_one_run_writes_a_directory(nano: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    descriptor = os.open(tmp_path / "out.partial", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(InvalidRequest, match=r"out\.partial: another run is writing it"):
            quantize_checkpoint(nano, tmp_path / "out", "int8")
    finally:
        os.close(descriptor)
    quantize_checkpoint(nano, tmp_path / "out", "int8")


def test_files_of_others_are_not_touched(nano: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(InvalidRequest, match="already there, and never overwritten"):
        quantize_checkpoint(nano, tmp_path / "out", "int8")
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "thesis.txt").write_text("mine")
    with pytest.raises(InvalidRequest, match=r"new\.partial: not made by `freehold quantize`"):
        quantize_checkpoint(nano, tmp_path / "new", "int8")
    assert [file.name for file in (tmp_path / "new.partial").iterdir()] == ["thesis.txt"]
    with pytest.raises(InvalidRequest, match="already there"):
        quantize_checkpoint(nano, tmp_path / "out" / "thesis.txt", "int8")
    (tmp_path / "empty").mkdir()
    quantize_checkpoint(nano, tmp_path / "empty", "int8")
    assert (tmp_path / "empty" / "config.json").exists()


def test_a_place_that_nothing_can_be_renamed_to_is_refused_before_the_work(nano: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("link", "dangling"):
        with pytest.raises(InvalidRequest, match=f"{name}: a link or a mount point cannot become the copy"):
            quantize_checkpoint(nano, tmp_path / name, "int8")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["dangling", "link", "real"]


def test_the_current_directory_can_be_filled(nano: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    quantize_checkpoint(nano, ".", "int8")
    assert [file.name for file in tmp_path.iterdir()] == ["here"]
    assert (tmp_path / "here" / "config.json").exists()


def test_a_quantised_source_is_refused(nano: Path, tmp_path: Path) -> None:
    quantize_checkpoint(nano, tmp_path / "int8", "int8")
    quantize_checkpoint(nano, tmp_path / "fp8", "fp8")
    for source, scheme in (("int8", "int4"), ("int8", "fp8"), ("fp8", "fp8")):
        with pytest.raises(InvalidRequest, match="is quantised already"):
            quantize_checkpoint(tmp_path / source, tmp_path / "out", scheme)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="choose int8, int4 or fp8"):
        quantize_checkpoint(nano, tmp_path / "out", "int2")  # type: ignore[arg-type]
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_weight_that_is_no_number_is_named(nano: Path, tmp_path: Path, scheme: Scheme) -> None:
    shutil.copytree(nano, tmp_path / "in")
    tensors = safetensors.torch.load_file(tmp_path / "in" / SINGLE_NAME)
    tensors[Q_A][3, 5] = float("nan")
    safetensors.torch.save_file(tensors, tmp_path / "in" / SINGLE_NAME)
    with pytest.raises(CheckpointError, match=f"'{Q_A}' has a weight that is NaN or infinite"):
        quantize_checkpoint(tmp_path / "in", tmp_path / "out", scheme)
    assert not (tmp_path / "out").exists()


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_too_little_space_is_found_before_anything_is_written(
    nano: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 40, 1 << 40, 1_000_000))
    with pytest.raises(DiskFull, match=r"1,789,824 bytes are to be written, but 1,000,000 are free"):
        quantize_checkpoint(nano, tmp_path / "out", "int8")
    assert not (tmp_path / "out").exists()


FULL = """
import resource, signal, sys
from freehold.cli.main import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
sys.exit(main(["quantize", sys.argv[1], sys.argv[2], "--scheme", "int8"]))
"""


def test_a_disk_that_fills_up_is_one_line(nano: Path, tmp_path: Path) -> None:
    result = run(FULL, nano, tmp_path / "out")
    assert result.returncode == DiskFull.exit_code
    assert result.stderr.count("\n") == 1
    assert "no space left on the disk" in result.stderr
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("*.safetensors*"))


MEASURE = """
import sys
from freehold.model.quantize import quantize_checkpoint
from tests.private_memory import Peak

with Peak() as peak:
    quantize_checkpoint(sys.argv[1], sys.argv[2], sys.argv[3], max_shard_bytes=50_000_000)
print(peak.bytes)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_memory_does_not_grow_with_the_checkpoint(tmp_path_factory: pytest.TempPathFactory, scheme: Scheme) -> None:
    """The source has 259 MB, a sparse layer of it 27 MB, its largest matrix 8 MB."""
    base = tmp_path_factory.getbasetemp() / "small"
    if not base.exists():
        make_tiny(base, "small", max_shard_bytes=100_000_000)
    result = run(MEASURE, base, tmp_path_factory.mktemp("out") / scheme, scheme)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 40_000_000
