"""What a run needs to go on: weights, optimiser state, random state and a few facts, in one safetensors file.

One file, written under another name and renamed: after a kill at any moment it is the one before or the new one, whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from freehold.errors import CheckpointError
from freehold.headers import encode_header
from freehold.model.checkpoint_files import atomic_write

CHECKPOINT_NAME = "checkpoint.safetensors"
_FACTS = "freehold_training"
_DTYPES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def save(path: Path, groups: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, Any]) -> None:
    """Write groups of tensors by name, and facts that JSON can hold. Raises DiskFull and CheckpointError; the file
    that was there then stays."""
    tensors = {f"{group}/{name}": tensor for group, held in groups.items() for name, tensor in held.items()}
    entries = [(name, _DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]
    with atomic_write(path) as file:
        file.write(encode_header(entries, {_FACTS: json.dumps(facts)}))
        for tensor in tensors.values():
            if tensor.numel():
                file.write(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)


def facts(path: Path) -> dict[str, Any]:
    """The facts of a file. Raises CheckpointError if it is not one that `save` wrote, whole."""
    with _opened(path) as file:
        held: dict[str, Any] = json.loads((file.metadata() or {})[_FACTS])
    return held


def load(path: Path, group: str) -> dict[str, Tensor]:
    """The tensors of one group. Raises CheckpointError if the file is damaged; empty if it has no such group."""
    with _opened(path) as file:
        prefix = f"{group}/"
        return {name.removeprefix(prefix): file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118


def load_into(path: Path, group: str, targets: Mapping[str, Tensor]) -> None:
    """Fill tensors by name. Raises CheckpointError unless the group has exactly these, in these shapes."""
    held = load(path, group)
    if held.keys() != targets.keys():
        name = min(held.keys() ^ targets.keys())
        raise CheckpointError(f"{path}: {group}: {name} is in {'the file' if name in held else 'the model'} only")
    with torch.no_grad():
        for name, target in targets.items():
            if target.shape != held[name].shape:
                raise CheckpointError(
                    f"{path}: {group}: {name} is {list(held[name].shape)}, expected {list(target.shape)}"
                )
            target.copy_(held[name])


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            if _FACTS not in (file.metadata() or {}):
                raise CheckpointError(f"{path}: not the checkpoint of a training run")
            yield file
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged, or cannot be read: {error}") from None
