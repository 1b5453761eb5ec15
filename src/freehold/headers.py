"""Safetensors headers and indexes, read and checked without reading weights. Torch-free.

A safetensors file is an 8-byte little-endian length, that many bytes of JSON (name -> dtype, shape, byte range), and
the data. Several files make a checkpoint through `model.safetensors.index.json` (name -> file). Everything that can be
wrong with them is found here, before a byte of weights is read, and said in one line that names file and tensor.

Source: the format description of the `safetensors` library.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from freehold.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000  # the library's own limit
DTYPE_BITS: Mapping[str, int] = MappingProxyType(
    {
        "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4,
        "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
        "I32": 32, "U32": 32, "F32": 32,
        "I64": 64, "U64": 64, "F64": 64,
    }
)  # fmt: skip
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: `nbytes` bytes of `file` from `offset` (from the start of the file)."""

    name: str
    dtype: str  # as safetensors spells it: BF16, F16, F32, F8_E4M3, ...
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file: its tensors in the order of their data."""

    path: Path
    file_bytes: int
    tensors: tuple[TensorEntry, ...]
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class CheckpointIndex:
    """The tensors of a checkpoint directory, each in exactly one shard.

    unlisted: safetensors files in the directory that the index does not name; nothing reads them.
    """

    directory: Path
    shards: tuple[Shard, ...]
    tensors: Mapping[str, TensorEntry]
    unlisted: tuple[Path, ...] = field(default=())

    @property
    def total_bytes(self) -> int:
        """Bytes of tensor data."""
        return sum(entry.nbytes for entry in self.tensors.values())

    @property
    def file_bytes(self) -> int:
        """Bytes of the shards on disk, headers included."""
        return sum(shard.file_bytes for shard in self.shards)

    @classmethod
    def open(cls, directory: str | Path) -> CheckpointIndex:
        """Read the index and every shard's header. Raises CheckpointError naming what is wrong, and where."""
        directory = Path(directory)
        if not directory.is_dir():
            raise CheckpointError(f"{directory}: not a directory; expected one with config.json and safetensors shards")
        if (directory / INDEX_NAME).is_file():
            weight_map = _read_weight_map(directory / INDEX_NAME)
            files = list(dict.fromkeys(weight_map.values()))
            shards = tuple(_shard_of_index(directory, file) for file in sorted(files))
            tensors = _merge(shards)
            _check_weight_map(weight_map, tensors)
        elif (directory / SINGLE_NAME).is_file():
            shards = (read_shard(directory / SINGLE_NAME),)
            tensors = _merge(shards)
        else:
            raise CheckpointError(_nothing_to_load(directory))
        listed = {shard.path.name for shard in shards}
        unlisted = tuple(sorted(path for path in directory.glob("*.safetensors") if path.name not in listed))
        return cls(directory, shards, MappingProxyType(tensors), unlisted)


def read_shard(path: str | Path) -> Shard:
    """Read and check one file's header. Raises CheckpointError if it is truncated, damaged or not safetensors."""
    path = Path(path)
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if file_bytes < 8:
                raise CheckpointError(f"{path}: {file_bytes} bytes is too short for a safetensors file; copy it again")
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path}: its header claims {length:,} bytes (limit {MAX_HEADER_BYTES:,}); not a safetensors file"
                )
            if 8 + length > file_bytes:
                raise CheckpointError(
                    f"{path}: truncated inside its header, which needs {8 + length:,} bytes; copy it again"
                )
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    header = _parse_object(raw, path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or any(not isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ must map strings to strings")
    start = 8 + length
    entries = sorted((_entry(path, name, value, start) for name, value in header.items()), key=_by_offset)
    _check_coverage(path, entries, start, file_bytes)
    return Shard(path, file_bytes, tuple(entries), MappingProxyType(metadata))


def encode_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The first bytes of a safetensors file that holds (name, dtype, shape) in this order, up to its data."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, dtype, shape in tensors:
        nbytes = math.prod(shape) * DTYPE_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)  # so that the data starts aligned
    return len(text).to_bytes(8, "little") + text


def _by_offset(entry: TensorEntry) -> tuple[int, int]:
    return entry.offset, entry.nbytes


def _parse_object(raw: bytes, path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f"{path}: names {twice!r} twice")
        return result

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON where JSON must be ({error}); the file is damaged") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return value


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _entry(path: Path, name: str, value: Any, start: int) -> TensorEntry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{path}: tensor {name!r}: expected dtype, shape and data_offsets")
    dtype, shape, span = value["dtype"], value["shape"], value["data_offsets"]
    bits = DTYPE_BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        raise CheckpointError(f"{path}: tensor {name!r}: unknown dtype {dtype!r}")
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise CheckpointError(f"{path}: tensor {name!r}: shape {shape!r} is not a list of sizes")
    if not isinstance(span, list) or len(span) != 2 or not all(map(_is_count, span)) or span[0] > span[1]:
        raise CheckpointError(f"{path}: tensor {name!r}: data_offsets {span!r} is not a byte range")
    nbytes = span[1] - span[0]
    if math.prod(shape) * bits != nbytes * 8:
        raise CheckpointError(
            f"{path}: tensor {name!r}: {dtype} {shape} needs {math.prod(shape) * bits // 8:,} bytes, "
            f"but data_offsets give it {nbytes:,}"
        )
    return TensorEntry(name, dtype, tuple(shape), path, start + span[0], nbytes)


def _check_coverage(path: Path, entries: list[TensorEntry], start: int, file_bytes: int) -> None:
    """The data must be the tensors, one after the other, and nothing else."""
    end = start
    for entry in entries:
        if entry.offset != end:
            kind = "overlaps the tensor before it" if entry.offset < end else "leaves a hole before it"
            raise CheckpointError(f"{path}: tensor {entry.name!r} {kind} (starts at byte {entry.offset}, not {end})")
        end += entry.nbytes
    if file_bytes < end:
        raise CheckpointError(f"{path}: truncated: {file_bytes:,} bytes, but its tensors end at {end:,}; copy it again")
    if file_bytes > end:
        raise CheckpointError(f"{path}: {file_bytes - end:,} bytes after the last tensor belong to none; it is damaged")


def _read_weight_map(path: Path) -> dict[str, str]:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    weight_map = _parse_object(raw, path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: no weight_map (tensor name -> shard file)")
    for name, file in weight_map.items():
        # A plain file name only: an index must not make us open files elsewhere.
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{path}: tensor {name!r}: {file!r} is not the name of a .safetensors file beside it")
    return weight_map


def _shard_of_index(directory: Path, file: str) -> Shard:
    if not (directory / file).exists():
        raise CheckpointError(f"{directory / file}: missing, but {INDEX_NAME} names it; fetch the shard")
    return read_shard(directory / file)


def _merge(shards: Iterable[Shard]) -> dict[str, TensorEntry]:
    tensors: dict[str, TensorEntry] = {}
    for shard in shards:
        for entry in shard.tensors:
            if entry.name in tensors:
                other = tensors[entry.name].file.name
                raise CheckpointError(f"{shard.path}: tensor {entry.name!r} is also in {other}; it must be in one")
            tensors[entry.name] = entry
    return tensors


def _check_weight_map(weight_map: Mapping[str, str], tensors: Mapping[str, TensorEntry]) -> None:
    for name, file in weight_map.items():
        entry = tensors.get(name)
        if entry is None:
            raise CheckpointError(f"{file}: tensor {name!r} is not in it, but {INDEX_NAME} says so")
        if entry.file.name != file:
            raise CheckpointError(f"{entry.file}: has tensor {name!r}, which {INDEX_NAME} places in {file}")
    for name, entry in tensors.items():
        if name not in weight_map:
            raise CheckpointError(f"{entry.file}: tensor {name!r} is not in {INDEX_NAME}; they do not match")


def _nothing_to_load(directory: Path) -> str:
    pickled = sorted(path.name for path in directory.iterdir() if path.suffix in _PICKLED)
    if pickled:
        return (
            f"{directory / pickled[0]}: pickled weights are never loaded (unpickling runs code from the file); "
            "convert the checkpoint to safetensors"
        )
    others = sorted(path.name for path in directory.glob("*.safetensors"))
    if others:
        return f"{directory}: has {others[0]} but neither {INDEX_NAME} nor {SINGLE_NAME}; fetch the index"
    return f"{directory}: no weights: neither {INDEX_NAME} nor {SINGLE_NAME}"
