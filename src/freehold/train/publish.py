"""Write a trained model as a checkpoint in the published layout: every loader of Freehold and `transformers` read it.

One tensor an expert and projection, weights in the dtype of the config (bf16 as published), correction biases in fp32,
the MTP layer as layer `num_hidden_layers`; config.json, generation_config.json, the tokenizer and a SHA-256 manifest.
Everything is made in OUT.partial and renamed to OUT when it is complete.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from freehold.errors import CheckpointError, ConfigError, DiskFull, InvalidRequest
from freehold.headers import encode_header
from freehold.model.checkpoint_files import Progress, atomic_write, write_json, write_manifest
from freehold.model.config import GlmConfig
from freehold.model.destinations import Destination
from freehold.model.glm import Glm
from freehold.model.inspect import inspect
from freehold.model.shards import plan_shards, shard_name, tensor_bytes, write_index
from freehold.model.storage import stored_tensors
from freehold.model.stored import StoredTensor
from freehold.model.tokenizer import Tokenizer

MAX_SHARD_BYTES = 2 << 30
_VOCABULARY_UNIT = 64  # rows, as published vocabularies are padded
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
ReadTensor = Callable[[str], Tensor]
"""Gives a tensor by its published name, in the shape of the checkpoint."""


@dataclass(frozen=True, slots=True)
class Published:
    """What was written: where, how many tensors, and bytes of their data (headers not counted)."""

    directory: Path
    tensors: int
    data_bytes: int


def write(
    model: Glm,
    tokenizer: Tokenizer,
    config: Mapping[str, Any],
    directory: str | Path,
    *,
    generation: Mapping[str, Any] | None = None,
    replace: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> Published:
    """Write `model` and what a server needs beside it.

    config: config.json's content; its dtype is that of the file, whatever the model was trained in. generation:
    defaults of sampling to put into generation_config.json in place of the published ones (temperature 1, top_p 0.95).
    directory must be new or empty; replace puts the new checkpoint in place of what is there, all of it.
    Raises InvalidRequest, ConfigError (the config is not the model's, or is quantised), CheckpointError (a weight is
    NaN or infinite, or cannot be written) and DiskFull.
    """
    parsed = GlmConfig.from_dict(config)
    if parsed.quantization is not None:
        raise ConfigError(
            "config.json: quantization_config: weights are published unquantised; `freehold quantize` them"
        )
    if tokenizer.vocab_size > parsed.vocab_size:
        raise ConfigError(f"the tokenizer has {tokenizer.vocab_size} ids, but vocab_size is {parsed.vocab_size}")
    held = model.checkpoint_tensors()
    _check_same_model(parsed, held)

    def read(name: str) -> Tensor:
        destination = held[name]
        if not isinstance(destination, Tensor):
            raise CheckpointError(f"tensor {name!r} is packed for inference; train and publish an unpacked model")
        return destination.detach()

    with staged(directory, replace=replace) as work:
        written = write_tensors(work, parsed, read, max_shard_bytes=max_shard_bytes, progress=progress)
        write_json(work / "config.json", config)
        write_json(work / "generation_config.json", generation_config(config, generation))
        tokenizer.save(work)
        check_written(work)
    return Published(Path(directory), *written)


def drop_unused_tokens(model: Glm, tokenizer: Tokenizer, config: Mapping[str, Any]) -> tuple[Tokenizer, dict[str, Any]]:
    """Leave out the rows of embedding and head that no token of the tokenizer has, down to a multiple of 64.

    Changes `model` in place; gives the tokenizer and config.json of the smaller vocabulary. Nothing else changes.
    """
    ids = Tokenizer(tokenizer.backend).vocab_size
    rows = min(-(-ids // _VOCABULARY_UNIT) * _VOCABULARY_UNIT, int(config["vocab_size"]))
    smaller = {**config, "vocab_size": rows}
    assert isinstance(model.lm_head.weight, Tensor)
    model.embed_tokens = nn.Parameter(model.embed_tokens.detach()[:rows].clone())
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach()[:rows].clone())
    model.config = GlmConfig.from_dict(smaller)
    return Tokenizer(tokenizer.backend, vocab_size=rows), smaller


def write_tensors(
    directory: Path,
    config: GlmConfig,
    read: ReadTensor,
    *,
    dtypes: Mapping[str, str] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> tuple[int, int]:
    """Write the shards, their index and the manifest into `directory`; one tensor in memory at a time.

    dtypes: safetensors' word for the dtype of some tensors, in place of the config's. Returns (tensors, bytes of data).
    Raises CheckpointError for a weight that is NaN or infinite in the dtype of the file; DiskFull.
    """
    other = dtypes or {}
    tensors = [
        StoredTensor(tensor.name, tensor.shape, other.get(tensor.name, tensor.dtype), tensor.spec)
        for tensor in stored_tensors(config)
    ]
    total, done = sum(map(tensor_bytes, tensors)), 0
    free = shutil.disk_usage(directory).free
    if free < total:
        raise DiskFull(f"{directory}: {total:,} bytes are to be written, but {free:,} are free on its disk")
    shards = plan_shards(tensors, max_shard_bytes)
    digests: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = shard_name(number, len(shards))
        with atomic_write(directory / name) as file:
            file.write(encode_header(((t.name, t.dtype, t.shape) for t in shard), {"format": "pt"}))
            for tensor in shard:
                data = _encode(read(tensor.name), tensor)
                file.write(data)
                done += len(data)
                if progress is not None:
                    progress(done, total)
        digests[name] = file.digest
    write_index(directory, shards)
    write_manifest(directory, digests)
    return len(tensors), total


def generation_config(config: Mapping[str, Any], sampling: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """As published with GLM-5.2, the token ids being the config's; `sampling` replaces temperature and top_p."""
    kept = ("eos_token_id", "pad_token_id", "transformers_version")
    defaults = {"temperature": 1.0, "top_p": 0.95} if sampling is None else dict(sampling)
    return {**{key: config[key] for key in kept if key in config}, **defaults}


def check_written(directory: Path) -> None:
    """Look at a checkpoint as a loader would; raises CheckpointError for the first thing that is wrong."""
    problems = inspect(directory).problems
    if problems:
        raise CheckpointError(f"what was written is not right, which is a defect: {problems[0]}")


@contextmanager
def staged(directory: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """Within it, fill the yielded directory; without an error it becomes `directory`, with one nothing is left.

    Raises InvalidRequest if there is something in `directory` and replace is not given.
    """
    out = Path(directory)
    refuse_existing(out, replace=replace)
    work, old = out.with_name(out.name + ".partial"), out.with_name(out.name + ".old")
    try:
        for left in (work, old):
            if left.exists():
                shutil.rmtree(left)
        work.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"{work}: cannot be made: {error.strerror or error}") from None
    try:
        yield work
        if out.exists():
            out.rename(old)
        try:
            work.rename(out)
        except OSError:
            if old.exists():
                old.rename(out)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(work, ignore_errors=True)
        if isinstance(error, OSError):
            raise CheckpointError(f"{out}: cannot be made: {error.strerror or error}") from None
        raise


def refuse_existing(out: Path, *, replace: bool = False) -> None:
    """Raise InvalidRequest if `out` cannot become a new directory: before the work that fills it is begun."""
    if out.is_symlink() or out.is_mount() or (out.exists() and not out.is_dir()):
        raise InvalidRequest(f"{out}: a file, a link or a mount point cannot be replaced; choose a new directory")
    if out.is_dir() and any(out.iterdir()) and not replace:
        raise InvalidRequest(f"{out}: already there, and never overwritten; choose another, or remove it")


def _check_same_model(config: GlmConfig, held: Mapping[str, Destination]) -> None:
    """Raise ConfigError unless the config calls for exactly the tensors that a model has."""
    wanted = {tensor.name: tensor.shape for tensor in stored_tensors(config)}
    for name, shape in wanted.items():
        if name not in held:
            raise ConfigError(f"config.json: asks for {name!r}, which the model has not")
        if tuple(held[name].shape) != shape:
            raise ConfigError(f"config.json: asks for {name!r} {list(shape)}; the model's is {list(held[name].shape)}")
    extra = next((name for name in held if name not in wanted), None)
    if extra is not None:
        raise ConfigError(f"config.json: has no {extra!r}, which is in the model")


def _encode(value: Tensor, tensor: StoredTensor) -> bytes:
    """Little-endian bytes in the dtype of the file, rounded once."""
    stored = value.to(_DTYPES[tensor.dtype]).contiguous()
    if not bool(torch.isfinite(stored).all()):
        raise CheckpointError(f"tensor {tensor.name!r} has a weight that is NaN or infinite in {tensor.dtype}")
    return stored.flatten().view(torch.uint8).numpy().tobytes()


def read_config(directory: str | Path) -> dict[str, Any]:
    """config.json of a checkpoint as it is, to be written beside other weights. Checked by `GlmConfig` first."""
    GlmConfig.from_file(directory)
    raw: dict[str, Any] = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
    return raw
