"""Merge an adapter into a checkpoint: a new one in the published layout, W + s · B A in place of each W it changes.

The checkpoint is read and written tensor by tensor, so it need not fit in memory. A quantised one is dequantised on
the way, and the new one is not quantised: `freehold quantize` does that again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from freehold.headers import CheckpointIndex
from freehold.model.adapters import merged_tensor, read_adapter
from freehold.model.checkpoint_files import Progress, copy_small_files, write_json
from freehold.model.config import GlmConfig
from freehold.model.quantize import NOT_OF_A_COPY
from freehold.model.storage import check
from freehold.model.weights import read_tensor
from freehold.train.publish import MAX_SHARD_BYTES, check_written, read_config, staged, write_tensors

_FLOATS = ("BF16", "F16", "F32")


@dataclass(frozen=True, slots=True)
class Merged:
    """changed: tensors that the adapter changed, of `tensors`. dequantised: the source was quantised, and this is
    not."""

    directory: Path
    tensors: int
    changed: int
    data_bytes: int
    dequantised: bool


def merge_adapter(
    source: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    replace: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> Merged:
    """Write the checkpoint `source` with the adapter merged into it to `out`.

    Every tensor keeps the dtype of its file; of a quantised checkpoint it gets the config's. Tokenizer, template and
    other small files are copied; the model card is not, since it tells of other weights. progress is called with
    (bytes done, bytes in all). Raises what `read_adapter` and `publish.staged` raise, CheckpointError and DiskFull.
    """
    source = Path(source)
    config, raw = GlmConfig.from_file(source), read_config(source)
    index = CheckpointIndex.open(source)
    check(config, index)
    read = read_adapter(adapter, config)
    raw.pop("quantization_config", None)
    plain = GlmConfig.from_dict(raw)

    def tensor(name: str) -> Tensor:
        return merged_tensor(index, read, name) if name in read.factors else read_tensor(index, name)

    dtypes = {name: entry.dtype for name, entry in index.tensors.items() if entry.dtype in _FLOATS}
    with staged(out, replace=replace) as work:
        count, total = write_tensors(
            work, plain, tensor, dtypes=dtypes, max_shard_bytes=max_shard_bytes, progress=progress
        )
        copy_small_files(source, work, NOT_OF_A_COPY | {"README.md"})
        write_json(work / "config.json", raw)
        check_written(work)
    return Merged(Path(out), count, len(read.factors), total, config.quantization is not None)
