"""Load a safetensors checkpoint into a model: mapped files, one tensor at a time, every tensor used exactly once.

Files are mapped, never read whole and never unpickled; a tensor goes from the mapping straight into the parameter (or
the view of one) that it belongs to, converted on the way. Private memory is that of the model plus one FP8 band.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch

from freehold.errors import CheckpointError
from freehold.headers import CheckpointIndex, TensorEntry
from freehold.model.checkpoint_files import Progress, verify_manifest
from freehold.model.config import GlmConfig
from freehold.model.held import Destination
from freehold.model.names import SCALE_SUFFIX, tensor_specs
from freehold.model.quant import BlockQuantized, dequantize_blocks
from freehold.model.storage import check

_TORCH_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
}


class Loadable(Protocol):
    """What can be loaded: a model with its config, that says which tensor of it each published name is."""

    config: GlmConfig

    def checkpoint_tensors(self) -> dict[str, Destination]:
        """Published name -> the parameter, or view of one, that holds it."""
        ...


def load_weights(
    model: Loadable, directory: str | Path, *, progress: Progress | None = None, verify: bool = False
) -> CheckpointIndex:
    """Fill the model's tensors from a checkpoint directory, and return the checkpoint's index.

    BF16, FP16, FP32 and block-scaled FP8 are converted to the dtype of each tensor of the model with one rounding.
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
                target = targets.get(entry.name)
                if target is not None:  # else it is a scale, read with its weight
                    _load(entry, data, target, index)
                done += entry.nbytes
                if progress is not None:
                    progress(done, total)
    return index


def read_tensor(index: CheckpointIndex, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """One tensor of a checkpoint by its published name, dequantised if it is FP8; dtype defaults to the file's.

    Raises CheckpointError if the checkpoint has no such tensor.
    """
    entry = index.tensors.get(name)
    if entry is None:
        raise CheckpointError(f"{index.directory}: no tensor {name!r}")
    if dtype is None:
        dtype = torch.bfloat16 if entry.dtype == "F8_E4M3" else _TORCH_DTYPES[entry.dtype]
    target = torch.empty(entry.shape, dtype=dtype)
    with _mapped(entry.file) as data:
        _load(entry, data, target, index)
    return target


@torch.no_grad()
def _load(entry: TensorEntry, data: mmap.mmap, target: Destination, index: CheckpointIndex) -> None:
    source = _view(entry, data)
    if entry.dtype != "F8_E4M3":
        target.copy_(source) if isinstance(target, torch.Tensor) else target.load(source)
        return
    scale_entry = index.tensors[entry.name + SCALE_SUFFIX]
    if scale_entry.file == entry.file:
        scale = _view(scale_entry, data).clone()
    else:
        with _mapped(scale_entry.file) as other:
            scale = _view(scale_entry, other).clone()
    if isinstance(target, torch.Tensor):
        dequantize_blocks(source, scale, target)
    else:
        target.load(BlockQuantized(source, scale))


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


def _check_targets(config: GlmConfig, targets: dict[str, Destination]) -> None:
    """The model must hold exactly the published tensors, in the published shapes."""
    specs = {spec.name: spec for spec in tensor_specs(config)}
    for name, target in targets.items():
        spec = specs.pop(name, None)
        if spec is None or tuple(target.shape) != spec.shape:
            raise CheckpointError(f"the model's tensor {name!r} {list(target.shape)} is not one that checkpoints have")
        if spec.dtype == "float32" and target.dtype != torch.float32:
            raise CheckpointError(f"the model keeps {name!r} as {target.dtype}; it must be float32")
    if specs:
        raise CheckpointError(f"the model has no place for tensor {next(iter(specs))!r} of its checkpoint")
