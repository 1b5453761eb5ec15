"""Load a safetensors checkpoint into a model: mapped files, one tensor at a time, every tensor used exactly once.

Files are mapped, never read whole and never unpickled; a tensor goes from the mapping straight into the parameter (or
the view of one) that it belongs to, converted on the way. Private memory is that of the model plus some rows, or the
codes of one group-quantised matrix.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeAlias

import torch

from freehold.errors import CheckpointError
from freehold.headers import CheckpointIndex, TensorEntry, read_shard
from freehold.model.checkpoint_files import Progress, verify_manifest
from freehold.model.config import GlmConfig
from freehold.model.group_quant import GroupQuantized, dequantize_groups_into, unpack_codes
from freehold.model.names import SCALE_SUFFIX, tensor_specs
from freehold.model.quant import BlockQuantized, dequantize_blocks
from freehold.model.storage import check
from freehold.model.storage_groups import PACKED, SCALE, SHAPE

_TORCH_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "I32": torch.int32,
    "I64": torch.int64,
}
Source: TypeAlias = torch.Tensor | BlockQuantized | GroupQuantized
"""A matrix as its file has it."""


class Target(Protocol):
    """A matrix of a model that is not a tensor: it takes what the file has and keeps it in a form of its own."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def wanted(self) -> bool:
        """False if it has its weights already, from elsewhere."""
        ...

    def load(self, source: Source, name: str) -> None:
        """Take the weights. The source's tensors may be views of a file that is unmapped afterwards: copy them. name:
        the published one, for errors."""
        ...


class Loadable(Protocol):
    """What can be loaded: a model with its config, that says which tensor of it each published name is."""

    config: GlmConfig

    def checkpoint_tensors(self) -> Mapping[str, torch.Tensor | Target]:
        """Published name -> the parameter, view of one, or target that holds it."""
        ...


def load_weights(
    model: Loadable, directory: str | Path, *, progress: Progress | None = None, verify: bool = False
) -> CheckpointIndex:
    """Fill the model's tensors from a checkpoint directory, and return the checkpoint's index.

    BF16, FP16, FP32, block-scaled FP8, and int8 and int4 in groups are converted to the dtype of each tensor of the
    model with one rounding; a target gets them as they are.
    progress is called with (bytes done, bytes of tensor data in all). verify first checks the SHA-256 manifest.
    Raises CheckpointError, before anything is loaded, for a missing, truncated or damaged file and for a missing,
    unexpected or mistyped tensor; ConfigError for a quantisation that is not supported.
    """
    index = CheckpointIndex.open(directory)
    check(model.config, index)
    targets = model.checkpoint_tensors()
    _check_targets(model.config, targets)
    if verify:
        verify_manifest(index.directory, (shard.path for shard in index.shards))
    total, done = index.total_bytes, 0
    for shard in index.shards:
        with _mapped(shard.path) as data:
            for entry in shard.tensors:
                name = entry.name.removesuffix(PACKED)
                target = targets.get(name)
                # None: a scale or a shape, read with its weight.
                if target is not None and (isinstance(target, torch.Tensor) or target.wanted):
                    _put(_source(name, entry, data, index), target, name)
                    _forget(data, entry)
                done += entry.nbytes
                if progress is not None:
                    progress(done, total)
    return index


def read_tensor(index: CheckpointIndex, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """One tensor of a checkpoint by its published name, dequantised if need be.

    dtype defaults to the file's, and to bf16 for a quantised matrix. Raises CheckpointError if there is no such tensor.
    """
    with open_tensor(index, name) as source:
        stored = source.dtype if isinstance(source, torch.Tensor) else torch.bfloat16
        target = torch.empty(source.shape, dtype=dtype or stored)
        _put(source, target, name)
    return target


def read_file(path: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, copy of the tensor) of everything in one safetensors file, in the file's dtypes.

    Raises CheckpointError for a damaged file, and for a dtype that weights are not stored in.
    """
    shard = read_shard(path)
    with _mapped(shard.path) as data:
        for entry in shard.tensors:
            if entry.dtype not in _TORCH_DTYPES:
                raise CheckpointError(f"{path}: tensor {entry.name!r} is {entry.dtype}, which is not read here")
            yield entry.name, _view(entry, data).clone()


@contextmanager
def open_tensor(index: CheckpointIndex, name: str) -> Iterator[Source]:
    """A tensor as its file has it, by its published name: a view of the file that must not be used afterwards."""
    entry = index.tensors.get(name) or index.tensors.get(name + PACKED)
    if entry is None:
        raise CheckpointError(f"{index.directory}: no tensor {name!r}")
    with _mapped(entry.file) as data:
        yield _source(name, entry, data, index)


@torch.no_grad()
def _put(source: Source, target: torch.Tensor | Target, name: str) -> None:
    if tuple(source.shape) != tuple(target.shape):  # a weight_shape that denies what the headers say
        raise CheckpointError(f"tensor {name!r} is a matrix {list(source.shape)}, expected {list(target.shape)}")
    if not isinstance(target, torch.Tensor):
        target.load(source, name)
    elif isinstance(source, BlockQuantized):
        dequantize_blocks(source.weight_OI, source.scale_RC, target)
    elif isinstance(source, GroupQuantized):
        dequantize_groups_into(source, target)
    else:
        target.copy_(source)


def _source(name: str, entry: TensorEntry, data: mmap.mmap, index: CheckpointIndex) -> Source:
    """What the file has for `name`, partly as views of the mapping `data`. The headers have been checked."""
    if entry.name != name:
        return _grouped(name, entry, data, index)
    if entry.dtype == "F8_E4M3":
        return BlockQuantized(_view(entry, data), _scales(name + SCALE_SUFFIX, entry, data, index))
    return _view(entry, data)


def _grouped(name: str, entry: TensorEntry, data: mmap.mmap, index: CheckpointIndex) -> GroupQuantized:
    scale_OG = _scales(name + SCALE, entry, data, index)
    shape = _companion(name + SHAPE, entry, data, index).tolist()
    packed_OW = _view(entry, data)
    (rows, words), groups = packed_OW.shape, scale_OG.shape[1]
    columns = shape[1] if len(shape) == 2 else 0
    bits = next((bits for bits in (4, 8) if columns * bits == 32 * words), 0)
    if not bits or not groups or shape[0] != rows or scale_OG.shape[0] != rows or columns % groups:
        raise CheckpointError(
            f"{entry.file}: tensor {name + SHAPE!r} says {shape}, which {entry.name!r} {list(packed_OW.shape)} with "
            f"scales {list(scale_OG.shape)} is not"
        )
    return GroupQuantized(unpack_codes(packed_OW, bits), scale_OG, bits, columns // groups)


def _scales(name: str, entry: TensorEntry, data: mmap.mmap, index: CheckpointIndex) -> torch.Tensor:
    scales = _companion(name, entry, data, index)
    if not bool(torch.isfinite(scales).all()):
        raise CheckpointError(f"{entry.file}: tensor {name!r} has a scale that is NaN or infinite")
    return scales


def _companion(name: str, entry: TensorEntry, data: mmap.mmap, index: CheckpointIndex) -> torch.Tensor:
    """A copy of a tensor that belongs to `entry`, which is in the mapping `data`; it may be in another file."""
    companion = index.tensors.get(name)
    if companion is None:
        raise CheckpointError(f"{entry.file}: tensor {entry.name!r} needs {name!r}, which is missing")
    if companion.file == entry.file:
        return _view(companion, data).clone()
    with _mapped(companion.file) as other:
        return _view(companion, other).clone()


def _view(entry: TensorEntry, data: mmap.mmap) -> torch.Tensor:
    """The tensor in the mapping, without a copy. It must not outlive the mapping."""
    if entry.nbytes == 0:
        return torch.empty(entry.shape, dtype=_TORCH_DTYPES[entry.dtype])
    dtype = _TORCH_DTYPES[entry.dtype]
    if entry.offset % dtype.itemsize:  # a header that is not padded; frombuffer wants aligned data
        raw = torch.frombuffer(data, dtype=torch.uint8, count=entry.nbytes, offset=entry.offset)
        return raw.clone().view(dtype).view(entry.shape)
    return torch.frombuffer(data, dtype=dtype, count=entry.size, offset=entry.offset).view(entry.shape)


@contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    """Map a file. Private and writable in name only (torch refuses read-only buffers silently); nothing writes."""
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be mapped: {error.strerror or error}") from None
    if hasattr(data, "madvise"):
        data.madvise(mmap.MADV_SEQUENTIAL)
    try:
        yield data  # torch keeps a reference, not a lock: no view may be used after the mapping is closed
    finally:
        data.close()


def _forget(data: mmap.mmap, entry: TensorEntry) -> None:
    """Give back the memory that reading a tensor took: pages of its file, which count as this process's until then."""
    if hasattr(data, "madvise"):
        first = -(-entry.offset // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages, none of a neighbour
        size = (entry.offset + entry.nbytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
        if size > 0:
            data.madvise(mmap.MADV_DONTNEED, first, size)


def _check_targets(config: GlmConfig, targets: Mapping[str, torch.Tensor | Target]) -> None:
    """The model must hold exactly the published tensors, in the published shapes."""
    specs = {spec.name: spec for spec in tensor_specs(config)}
    for name, target in targets.items():
        spec = specs.pop(name, None)
        if spec is None or tuple(target.shape) != spec.shape:
            raise CheckpointError(f"the model's tensor {name!r} {list(target.shape)} is not one that checkpoints have")
        if spec.dtype == "float32" and (not isinstance(target, torch.Tensor) or target.dtype != torch.float32):
            kind = target.dtype if isinstance(target, torch.Tensor) else type(target).__name__
            raise CheckpointError(f"the model keeps {name!r} as {kind}; it must be float32")
    if specs:
        raise CheckpointError(f"the model has no place for tensor {next(iter(specs))!r} of its checkpoint")
