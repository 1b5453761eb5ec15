"""How the tensors of a checkpoint that is being written are spread over files. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from freehold.headers import DTYPE_BITS, INDEX_NAME, SINGLE_NAME
from freehold.model.checkpoint_files import write_json
from freehold.model.stored import StoredTensor


def tensor_bytes(tensor: StoredTensor) -> int:
    """Bytes of a tensor's data."""
    return math.prod(tensor.shape) * DTYPE_BITS[tensor.dtype] // 8


def plan_shards(tensors: Iterable[StoredTensor], max_bytes: int) -> list[list[StoredTensor]]:
    """Fill shards in order; a weight and its scales stay together. A tensor larger than max_bytes is alone."""
    shards: list[list[StoredTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        nbytes = tensor_bytes(tensor)
        if shards[-1] and filled + nbytes > max_bytes and not tensor.is_scale:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += nbytes
    return shards


def shard_name(number: int, count: int) -> str:
    """File name of shard `number` (from 1) of `count`, as published checkpoints have it."""
    return SINGLE_NAME if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def write_index(directory: Path, shards: Sequence[Sequence[StoredTensor]]) -> None:
    """Write the index of more than one shard; a single file needs none."""
    if len(shards) == 1:
        return
    files = {tensor.name: shard_name(number, len(shards)) for number, shard in enumerate(shards, 1) for tensor in shard}
    total = sum(tensor_bytes(tensor) for shard in shards for tensor in shard)
    write_json(directory / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))})
