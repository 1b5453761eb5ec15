"""Write a quantised copy of a checkpoint: one matrix (of a large one, some rows) in memory at a time.

Everything is made in OUT.partial and renamed to OUT when it is complete, so OUT is either absent or whole. A shard
that is finished is recorded with its SHA-256 and its errors: the same command, given again after it was stopped, keeps
the shards that are still what was recorded and makes the others. If the source or the scheme is another, it starts
afresh.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from freehold.errors import CheckpointError, DiskFull, InvalidRequest
from freehold.headers import INDEX_NAME, CheckpointIndex, encode_header
from freehold.model.checkpoint_files import (
    MANIFEST_NAME,
    Progress,
    atomic_write,
    copy_small_files,
    write_json,
    write_manifest,
)
from freehold.model.config import GlmConfig
from freehold.model.inspect import inspect
from freehold.model.quantize_report import (
    REPORT_NAME,
    QuantizationReport,
    TensorError,
    error_from_json,
    source_name,
)
from freehold.model.quantize_tensors import TensorQuantizer
from freehold.model.shards import plan_shards, shard_name, tensor_bytes, write_index
from freehold.model.storage import check, dtype_name, quantization_scheme, stored_tensors
from freehold.model.storage_fp8 import Fp8Scheme, fp8_quantization
from freehold.model.storage_groups import group_quantization
from freehold.model.stored import StoredTensor
from freehold.model.tiny import MARKER_NAME

Scheme = Literal["int8", "int4", "fp8"]
MAX_SHARD_BYTES = 2 << 30
_STATE = "quantize.json"  # in OUT.partial: what is being made, and of what
_CHECKPOINT = "checkpoint"  # in OUT.partial: what becomes OUT
_FORMAT = 1  # of the state, and of how weights are quantised; a change starts afresh
NOT_OF_A_COPY = frozenset(("config.json", INDEX_NAME, MANIFEST_NAME, MARKER_NAME, REPORT_NAME))
"""Files beside the weights that tell of those very weights: a checkpoint of other weights has its own, or none."""


@dataclass(frozen=True, slots=True)
class _Job:
    """What is to be written, decided before anything is."""

    index: CheckpointIndex
    config: GlmConfig  # of the source
    raw: Mapping[str, Any]  # config.json to write
    shards: list[list[StoredTensor]]
    scheme: Scheme
    out: Path

    @property
    def work(self) -> Path:
        return self.out.with_name(self.out.name + ".partial")

    @property
    def target(self) -> Path:
        return self.work / _CHECKPOINT

    @property
    def total_bytes(self) -> int:
        return sum(tensor_bytes(tensor) for shard in self.shards for tensor in shard)


def quantize_checkpoint(
    source: str | Path,
    out: str | Path,
    scheme: Scheme,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> QuantizationReport:
    """Write the checkpoint in `source` (BF16, FP16, FP32 or FP8) to `out` as scheme says, and report the errors.

    int8, int4: see `group_quantization`. fp8: what the published FP8 builds convert. Tokenizer, template and other
    small files are copied; config.json, index, SHA256SUMS and quantization-report.json are written. progress is called
    with (bytes done, bytes in all) of the output. Raises InvalidRequest if `out` has something in it or the source is
    quantised already, CheckpointError, DiskFull, ConfigError.
    """
    job = _plan(Path(source), Path(os.path.abspath(out)), scheme, max_shard_bytes)
    with _workspace(job), _workers() as workers:
        digests, errors, kept = _write_shards(job, workers, progress)
        write_index(job.target, job.shards)
        write_manifest(job.target, digests)
        copy_small_files(job.index.directory, job.target, NOT_OF_A_COPY)
        write_json(job.target / "config.json", job.raw)
        written = inspect(job.target)
        if written.problems:
            raise CheckpointError(f"what was written is not right, which is a defect: {written.problems[0]}")
        report = QuantizationReport(
            source=source_name(source),
            scheme=scheme,
            source_bytes=job.index.total_bytes,
            total_bytes=job.total_bytes,
            bits_per_weight=written.bits_per_weight,
            shards=len(job.shards),
            kept_shards=kept,
            errors=tuple(errors),
        )
        write_json(job.target / REPORT_NAME, report.as_dict())
        _finish(job)
    return report


def _plan(source: Path, out: Path, scheme: Scheme, max_shard_bytes: int) -> _Job:
    if scheme not in ("int8", "int4", "fp8"):
        raise InvalidRequest(f"scheme {scheme!r} does not exist; choose int8, int4 or fp8", param="scheme")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InvalidRequest(f"{out}: already there, and never overwritten; choose another, or remove it")
    if out.is_symlink() or out.is_mount():  # nothing can be renamed to it, which would be found out at the very end
        raise InvalidRequest(f"{out}: a link or a mount point cannot become the copy; choose a new directory in it")
    config = GlmConfig.from_file(source)
    index = CheckpointIndex.open(source)
    check(config, index)
    had = quantization_scheme(config.quantization)
    if had is not None and (scheme == "fp8" or not isinstance(had, Fp8Scheme)):
        raise InvalidRequest(f"{source}: is quantised already; quantise the checkpoint that it was made of")
    quantization = (
        fp8_quantization(config) if scheme == "fp8" else group_quantization(config, 8 if scheme == "int8" else 4)
    )
    raw = json.loads((source / "config.json").read_text(encoding="utf-8"))
    raw["quantization_config"] = quantization
    tensors = [_as_in_source(tensor, config, index) for tensor in stored_tensors(GlmConfig.from_dict(raw))]
    return _Job(index, config, raw, plan_shards(tensors, max_shard_bytes), scheme, out)


def _as_in_source(tensor: StoredTensor, config: GlmConfig, index: CheckpointIndex) -> StoredTensor:
    """A tensor that is not quantised keeps the dtype that its file has; FP8 becomes the model's."""
    if tensor.is_scale or tensor.name != tensor.spec.name or tensor.dtype == "F8_E4M3":
        return tensor
    stored = index.tensors[tensor.name].dtype
    return replace(tensor, dtype=dtype_name(config.dtype) if stored == "F8_E4M3" else stored)


@contextmanager
def _workspace(job: _Job) -> Iterator[None]:
    """OUT.partial, for this process alone, with the state of this very job in it."""
    wanted = {"made_by": "freehold quantize", "format": _FORMAT, "scheme": job.scheme, "of": _fingerprint(job)}
    try:
        job.work.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(job.work, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"{job.work}: cannot be made: {error.strerror or error}") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InvalidRequest(f"{job.work}: another run is writing it; wait for it, or stop it") from None
        _keep_or_clear(job.work, wanted)
        job.target.mkdir(exist_ok=True)
        write_json(job.work / _STATE, wanted)
        yield
    finally:
        os.close(descriptor)


def _keep_or_clear(work: Path, wanted: Mapping[str, Any]) -> None:
    """Keep what an interrupted run of the same job left; remove what one of another job left."""
    try:
        state = json.loads((work / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        state = None
    if state == wanted:
        return
    ours = isinstance(state, dict) and state.get("made_by") == wanted["made_by"]
    for path in work.iterdir():
        if not ours:
            raise InvalidRequest(f"{work}: not made by `freehold quantize`; remove it, or choose another directory")
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _fingerprint(job: _Job) -> str:
    """Of the source and of the plan: its config, its files' names, sizes and times, and the shards to be made."""
    facts: list[Any] = [dict(job.raw), (job.index.directory / "config.json").read_text(encoding="utf-8")]
    for shard in job.index.shards:
        status = shard.path.stat()
        facts.append((shard.path.name, status.st_size, status.st_mtime_ns))
    facts.append([[(tensor.name, tensor.dtype) for tensor in shard] for shard in job.shards])
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _write_shards(
    job: _Job, workers: Executor, progress: Progress | None
) -> tuple[dict[str, str], list[TensorError], int]:
    """(SHA-256 by file, errors in order, shards that were there already)."""
    names = [shard_name(number, len(job.shards)) for number in range(1, len(job.shards) + 1)]
    done = 0

    def wrote(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, job.total_bytes)

    kept = {name: record for name in names if (record := _finished(job, name)) is not None}
    missing = sum(sum(map(tensor_bytes, s)) for name, s in zip(names, job.shards, strict=True) if name not in kept)
    free = shutil.disk_usage(job.work).free
    if free < missing:
        raise DiskFull(f"{job.out}: {missing:,} bytes are to be written, but {free:,} are free on its disk")
    digests: dict[str, str] = {}
    errors: list[TensorError] = []
    for name, shard in zip(names, job.shards, strict=True):
        if name in kept:
            digests[name], found = kept[name]
            wrote(sum(map(tensor_bytes, shard)))
        else:
            digests[name], found = _write_shard(job, name, shard, workers, wrote)
        errors.extend(found)
    return digests, errors, len(kept)


def _write_shard(
    job: _Job, name: str, shard: list[StoredTensor], workers: Executor, wrote: Callable[[int], None]
) -> tuple[str, list[TensorError]]:
    quantizer = TensorQuantizer(job.config, job.index, workers)
    with atomic_write(job.target / name) as file:
        file.write(encode_header(((t.name, t.dtype, t.shape) for t in shard), {"format": "pt"}))
        for tensor in shard:
            for piece in quantizer.pieces(tensor):
                file.write(piece)
                wrote(len(piece))
    record = {"sha256": file.digest, "errors": [asdict(error) for error in quantizer.errors]}
    write_json(job.work / (name + ".json"), record)
    return file.digest, quantizer.errors


@contextmanager
def _workers() -> Iterator[Executor]:
    """As many threads as torch had; torch's own would wait for one another after every small operation."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, "quantize") as workers:
            yield workers
    finally:
        torch.set_num_threads(threads)


def _finished(job: _Job, name: str) -> tuple[str, list[TensorError]] | None:
    """What is recorded of a shard, if the file is still what was recorded."""
    try:
        record = json.loads((job.work / (name + ".json")).read_text(encoding="utf-8"))
        with (job.target / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        errors = [error_from_json(error) for error in record["errors"]]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return (digest, errors) if record["sha256"] == digest else None


def _finish(job: _Job) -> None:
    """Rename what is complete to OUT; what is left of OUT.partial is no longer needed."""
    try:
        job.target.rename(job.out)
    except OSError as error:
        raise CheckpointError(f"{job.out}: cannot be made: {error.strerror or error}") from None
    shutil.rmtree(job.work, ignore_errors=True)
