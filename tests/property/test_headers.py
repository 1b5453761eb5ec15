"""Whatever the bytes of a safetensors file or an index, reading them gives tensors that fit, or a CheckpointError."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from freehold.errors import CheckpointError
from freehold.headers import DTYPE_BITS, INDEX_NAME, SINGLE_NAME, CheckpointIndex, Shard, encode_header, read_shard

names = st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
tensors = st.lists(
    st.tuples(names, st.sampled_from(["F32", "BF16", "U8"]), shapes), max_size=4, unique_by=lambda tensor: tensor[0]
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def check(path: Path) -> None:
    """Read it; if that works, the tensors are the file's data, one after the other."""
    try:
        shard = read_shard(path)
    except CheckpointError as error:
        message = error.message
    else:
        assert_covers(shard)
        return
    assert "\n" not in message
    assert path.name in message


def assert_covers(shard: Shard) -> None:
    end = shard.file_bytes - sum(entry.nbytes for entry in shard.tensors)
    for entry in shard.tensors:
        assert entry.offset == end
        assert entry.nbytes * 8 == entry.size * DTYPE_BITS[entry.dtype]
        end += entry.nbytes


@settings(deadline=None)
@given(tensors, st.data())
def test_one_changed_or_missing_byte(wanted: list[tuple[str, str, tuple[int, ...]]], data: st.DataObject) -> None:
    size = sum(math.prod(shape) * DTYPE_BITS[dtype] // 8 for _, dtype, shape in wanted)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / SINGLE_NAME
        raw = bytearray(encode_header(wanted, {}) + bytes(size))
        path.write_bytes(raw)
        assert [(e.name, e.dtype, e.shape) for e in read_shard(path).tensors] == wanted
        position = data.draw(st.integers(0, len(raw) - 1))
        if data.draw(st.booleans()):
            raw[position] = data.draw(st.integers(0, 255))
        else:
            del raw[position:]
        path.write_bytes(raw)
        check(path)


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=4), anything, max_size=3), st.binary(max_size=16))
def test_any_json(header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / SINGLE_NAME
        path.write_bytes(len(text).to_bytes(8, "little") + text + data)
        check(path)


@settings(deadline=None)
@given(anything | st.dictionaries(st.just("weight_map"), anything))
def test_any_index(content: Any) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / INDEX_NAME).write_text(json.dumps(content))
        with pytest.raises(CheckpointError) as caught:  # there are no shards, so this cannot be a checkpoint
            CheckpointIndex.open(directory)
        assert "\n" not in caught.value.message
