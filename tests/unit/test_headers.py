"""Safetensors headers and indexes: what the library wrote is read, and every kind of damage is named in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from freehold.errors import CheckpointError
from freehold.headers import INDEX_NAME, SINGLE_NAME, CheckpointIndex, encode_header, read_shard


def write(path: Path, tensors: dict[str, Any], data: bytes | None = None, header: bytes | None = None) -> None:
    """A safetensors file from a header as it stands, right or wrong."""
    text = json.dumps(tensors).encode() if header is None else header
    if data is None:
        data = bytes(max((value["data_offsets"][1] for name, value in tensors.items() if name[0] != "_"), default=0))
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def index(directory: Path, weight_map: dict[str, str]) -> None:
    (directory / INDEX_NAME).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))


def one_line(error: pytest.ExceptionInfo[CheckpointError]) -> None:
    assert "\n" not in error.value.message


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(5, dtype=np.float16),
        "scalar": np.array(3, dtype=np.int64),
        "empty": np.zeros((0, 4), dtype=np.uint8),
    }
    safetensors.numpy.save_file(arrays, tmp_path / SINGLE_NAME, metadata={"format": "pt"})
    found = CheckpointIndex.open(tmp_path)
    assert found.shards[0].metadata == {"format": "pt"}
    assert {name: (e.dtype, e.shape, e.nbytes) for name, e in found.tensors.items()} == {
        "a": ("F32", (2, 3), 24), "b": ("F16", (5,), 10), "scalar": ("I64", (), 8), "empty": ("U8", (0, 4), 0)
    }  # fmt: skip
    raw = (tmp_path / SINGLE_NAME).read_bytes()
    for name, array in arrays.items():
        e = found.tensors[name]
        assert raw[e.offset : e.offset + e.nbytes] == array.tobytes()
    assert found.total_bytes == 42
    assert found.file_bytes == len(raw)


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    header = encode_header([("x", "F32", (2, 2)), ("y", "I16", (3,))], {"format": "pt"})
    x, y = np.arange(4, dtype=np.float32).reshape(2, 2), np.array([7, 8, 9], dtype=np.int16)
    (tmp_path / SINGLE_NAME).write_bytes(header + x.tobytes() + y.tobytes())
    assert len(header) % 8 == 0
    loaded = safetensors.numpy.load_file(tmp_path / SINGLE_NAME)
    assert np.array_equal(loaded["x"], x)
    assert np.array_equal(loaded["y"], y)
    assert [e.name for e in read_shard(tmp_path / SINGLE_NAME).tensors] == ["x", "y"]


GOOD = {"a": entry("F32", [2], 0, 8), "b": entry("BF16", [4], 8, 16)}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": entry("F32", [2], 0, 8), "b": entry("BF16", [4], 4, 12)}, "'b' overlaps"),
        ({"a": entry("F32", [2], 0, 8), "b": entry("BF16", [4], 12, 20)}, "'b' leaves a hole"),
        ({"a": entry("F32", [2], 4, 12)}, "'a' leaves a hole"),
        ({"a": entry("F32", [3], 0, 8)}, r"'a': F32 \[3\] needs 12 bytes, but data_offsets give it 8"),
        ({"a": entry("F31", [2], 0, 8)}, "'a': unknown dtype 'F31'"),
        ({"a": {**entry("F32", [2], 0, 8), "dtype": ["F32"]}}, "'a': unknown dtype"),
        ({"a": entry("F32", [-2], 0, 8)}, "'a': shape"),
        ({"a": {**entry("F32", [2], 0, 8), "shape": 2}}, "'a': shape"),
        ({"a": {**entry("F32", [2], 0, 8), "shape": [2.0]}}, "'a': shape"),
        ({"a": {**entry("F32", [2], 0, 8), "data_offsets": [8, 0]}}, "'a': data_offsets"),
        ({"a": {**entry("F32", [2], 0, 8), "data_offsets": [0]}}, "'a': data_offsets"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "'a': expected dtype, shape and data_offsets"),
        ({"a": 3}, "'a': expected dtype, shape and data_offsets"),
        ({"__metadata__": {"format": 1}, **GOOD}, "__metadata__"),
    ],
)
def test_a_damaged_header_is_named(tmp_path: Path, tensors: dict[str, Any], message: str) -> None:
    write(tmp_path / SINGLE_NAME, tensors, bytes(16))
    with pytest.raises(CheckpointError, match=message) as caught:
        CheckpointIndex.open(tmp_path)
    assert SINGLE_NAME in caught.value.message
    one_line(caught)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "expected a JSON object"),
        (b'{"a\xff": 1}', "not valid JSON"),
        (b"[" * 200_000, "not valid JSON"),
        (b'{"a": 1, "a": 2}', "names 'a' twice"),
    ],
    ids=["empty", "cut", "list", "utf8", "deep", "twice"],
)
def test_a_header_that_is_not_a_json_object(tmp_path: Path, header: bytes, message: str) -> None:
    write(tmp_path / SINGLE_NAME, {}, b"", header)
    with pytest.raises(CheckpointError, match=message) as caught:
        CheckpointIndex.open(tmp_path)
    one_line(caught)


def test_every_truncation_is_found(tmp_path: Path) -> None:
    path = tmp_path / SINGLE_NAME
    write(path, GOOD)
    whole = path.read_bytes()
    assert len(read_shard(path).tensors) == 2
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"truncated|too short|belong to none|JSON"):
            read_shard(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(CheckpointError, match="1 bytes after the last tensor"):
        read_shard(path)


def test_a_huge_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    (tmp_path / SINGLE_NAME).write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        CheckpointIndex.open(tmp_path)


def shards(directory: Path) -> None:
    write(directory / "model-1.safetensors", {"a": entry("F32", [2], 0, 8)})
    write(directory / "model-2.safetensors", {"b": entry("F32", [2], 0, 8)})


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "model-1.safetensors", "b": "model-3.safetensors"}, "model-3.safetensors: missing"),
        ({"a": "model-1.safetensors", "b": "model-1.safetensors"}, "model-1.safetensors: tensor 'b' is not in it"),
        ({"a": "model-1.safetensors", "c": "model-2.safetensors"}, "tensor 'c' is not in it"),
        ({"a": "model-2.safetensors", "b": "model-1.safetensors"}, "'a', which .* places in model-2"),
        ({"a": "../model-1.safetensors"}, "is not the name of"),
        ({"a": "/etc/passwd"}, "is not the name of"),
        ({"a": "weights.bin"}, "is not the name of"),
        ({"a": 1}, "is not the name of"),
        ({}, "no weight_map"),
    ],
)
def test_an_index_that_does_not_fit_its_shards(tmp_path: Path, weight_map: dict[str, Any], message: str) -> None:
    shards(tmp_path)
    index(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match=message) as caught:
        CheckpointIndex.open(tmp_path)
    one_line(caught)


def test_tensors_that_the_index_forgot_or_that_come_twice(tmp_path: Path) -> None:
    shards(tmp_path)
    write(tmp_path / "model-2.safetensors", {"b": entry("F32", [2], 0, 8), "c": entry("F32", [2], 8, 16)})
    index(tmp_path, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    with pytest.raises(CheckpointError, match=f"'c' is not in {INDEX_NAME}"):
        CheckpointIndex.open(tmp_path)
    write(tmp_path / "model-2.safetensors", {"b": entry("F32", [2], 0, 8), "a": entry("F32", [2], 8, 16)})
    with pytest.raises(CheckpointError, match=r"'a' is also in model-1\.safetensors"):
        CheckpointIndex.open(tmp_path)


def test_shards_in_any_number_and_files_that_nothing_names(tmp_path: Path) -> None:
    shards(tmp_path)
    index(tmp_path, {"b": "model-2.safetensors", "a": "model-1.safetensors"})
    write(tmp_path / "other.safetensors", GOOD)
    found = CheckpointIndex.open(tmp_path)
    assert [shard.path.name for shard in found.shards] == ["model-1.safetensors", "model-2.safetensors"]
    assert [path.name for path in found.unlisted] == ["other.safetensors"]


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: pickled weights are never loaded"):
        CheckpointIndex.open(tmp_path)


def test_directories_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no weights"):
        CheckpointIndex.open(tmp_path)
    with pytest.raises(CheckpointError, match="not a directory"):
        CheckpointIndex.open(tmp_path / "nothing")
    write(tmp_path / "model-00001-of-00002.safetensors", GOOD)
    with pytest.raises(CheckpointError, match="fetch the index"):
        CheckpointIndex.open(tmp_path)


def test_torch_is_not_imported() -> None:
    modules = "freehold.headers, freehold.model.inspect, freehold.model.storage, freehold.model.tiny"
    code = f"import sys; import {modules}, freehold.model.tokenizer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
