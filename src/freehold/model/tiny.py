"""Random-weight checkpoints in GLM-5.2's on-disk layout, for tests, benchmarks and a first try without a download.

Written as a stream: one tensor (of a large one, some rows) in memory at a time. Each tensor's values depend on the
seed and its name only, so they are the same whatever the shard size, and stay the same when other tensors change.
Needs numpy alone; FP8 checkpoints also need torch.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from freehold.errors import CheckpointError, DiskFull, InvalidRequest
from freehold.headers import INDEX_NAME, SINGLE_NAME, encode_header
from freehold.model.checkpoint_files import (
    MANIFEST_NAME,
    Progress,
    atomic_write,
    read_manifest,
    write_json,
    write_manifest,
)
from freehold.model.config import GlmConfig
from freehold.model.random_tensors import RandomTensors
from freehold.model.shards import plan_shards, shard_name, tensor_bytes, write_index
from freehold.model.sizes import size_config
from freehold.model.storage import quantization_scheme, stored_tensors
from freehold.model.storage_fp8 import fp8_quantization
from freehold.model.storage_groups import GroupScheme
from freehold.model.tokenizer import TOY_RESERVED, Tokenizer

MARKER_NAME = "freehold-tiny.json"  # says that this directory is ours to replace
MAX_SHARD_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Written:
    """What a call wrote: where, how many tensors and bytes of them, in how many shards."""

    directory: Path
    tensors: int
    data_bytes: int
    shards: int


def make_tiny(
    directory: str | Path,
    size: str,
    seed: int = 0,
    *,
    fp8: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    force: bool = False,
    progress: Progress | None = None,
) -> Written:
    """Write the random-weight test model `nano`, `small` or `medium`.

    An empty directory, or one that an earlier call made, is (re)written; another one only with force, which replaces
    files of the same names and leaves the rest. Raises InvalidRequest, DiskFull or CheckpointError.
    """
    made = {"made_by": "freehold tiny", "size": size, "seed": seed, "fp8": fp8}
    return write_random_checkpoint(
        size_config(size), directory, seed, fp8=fp8, max_shard_bytes=max_shard_bytes, force=force, made=made,
        progress=progress,
    )  # fmt: skip


def write_random_checkpoint(
    config: Mapping[str, Any],
    directory: str | Path,
    seed: int = 0,
    dtype: str | None = None,
    *,
    fp8: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    force: bool = False,
    made: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Written:
    """Write a random checkpoint of any config.json content.

    dtype (bfloat16, float16, float32) replaces the config's. fp8 adds a quantization_config; a config that has one
    is written as it says, `modules_to_not_convert` honoured. The toy tokenizer is written if vocab_size has room for
    one (320). progress is called with (bytes done, bytes in all).
    """
    raw = dict(config)
    if dtype is not None:
        raw["dtype"] = dtype
    if fp8 and raw.get("quantization_config") is None:
        raw["quantization_config"] = fp8_quantization(GlmConfig.from_dict(raw))
    parsed = GlmConfig.from_dict(raw)
    if isinstance(quantization_scheme(parsed.quantization), GroupScheme):
        raise InvalidRequest("random checkpoints are BF16, FP16, FP32 or FP8; `freehold quantize` makes int8 and int4")
    tensors = list(stored_tensors(parsed))
    total = sum(map(tensor_bytes, tensors))
    path = Path(directory)
    _prepare(path, total, force)
    marker = {"made_by": "freehold", "seed": seed, **(made or {})}
    write_json(path / MARKER_NAME, {**marker, "complete": False})
    done = 0

    def wrote(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    shards = plan_shards(tensors, max_shard_bytes)
    digests: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = shard_name(number, len(shards))
        with atomic_write(path / name) as file:
            file.write(encode_header(((t.name, t.dtype, t.shape) for t in shard), {"format": "pt"}))
            encoder = RandomTensors(parsed, seed)
            for tensor in shard:
                for piece in encoder.pieces(tensor):
                    file.write(piece)
                    wrote(len(piece))
            digests[name] = file.digest
    write_index(path, shards)
    write_json(path / "config.json", raw)
    write_json(path / "generation_config.json", _generation_config(raw))
    if parsed.vocab_size >= 256 + TOY_RESERVED:
        Tokenizer.toy(parsed.vocab_size).save(path)
    write_manifest(path, digests)
    write_json(path / MARKER_NAME, {**marker, "complete": True})
    return Written(path, len(tensors), total, len(shards))


def made_before(directory: str | Path, size: str, seed: int, fp8: bool = False) -> bool:
    """Whether the directory already holds exactly what make_tiny would write there, completely."""
    return _marker(Path(directory)) == {
        "made_by": "freehold tiny", "size": size, "seed": seed, "fp8": fp8, "complete": True
    }  # fmt: skip


def _prepare(path: Path, data_bytes: int, force: bool) -> None:
    if path.exists() and not path.is_dir():
        raise InvalidRequest(f"{path}: is a file; name a directory to write the checkpoint to")
    if path.is_dir() and any(path.iterdir()):
        if _marker(path) is not None:
            _remove_own(path)
        elif not force:
            raise InvalidRequest(f"{path}: not empty, and not made by `freehold tiny`; choose another, or pass --force")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be made: {error.strerror or error}") from None
    free = shutil.disk_usage(path).free
    if free < data_bytes:
        raise DiskFull(f"{path}: the checkpoint takes {data_bytes:,} bytes, but {free:,} are free on its disk")


def _marker(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads((path / MARKER_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _remove_own(path: Path) -> None:
    """Remove the shards and the index of an earlier call: a new shard count must not leave old shards beside it."""
    try:
        shards = list(read_manifest(path))
    except CheckpointError:  # an earlier call was interrupted before it wrote the manifest
        shards = [file.name for file in path.glob("model-*-of-*.safetensors")]
    shards += [file.name for file in path.glob("model*.safetensors.tmp")]  # of a call that was killed
    for name in (*shards, SINGLE_NAME, INDEX_NAME, MANIFEST_NAME):
        (path / name).unlink(missing_ok=True)


def _generation_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """As published with GLM-5.2; the token ids are the config's."""
    kept = ("eos_token_id", "pad_token_id", "transformers_version")
    return {**{key: raw[key] for key in kept if key in raw}, "temperature": 1.0, "top_p": 0.95}
