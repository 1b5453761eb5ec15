"""What quantising did to a model's predictions, on given text: of two checkpoints with one tokenizer, or of one
checkpoint with its caches stored in 8 bits.

All run through the engine's own model code (chunked prefill, paged cache, the operations that serving uses), one after
the other, so that one model is in memory at a time. The logits of the first wait on disk in a temporary file, in the
dtype the model made them in; nothing is lost by that. The text is cut into windows that each start at position 0.

Positions are reported by how sparse their attention is: up to index_topk every position is attended, beyond that only
the index_topk that the indexer selects, and a wrong selection can be seen only there.

Shape suffixes: R rows, V vocabulary. KL is in nats.
"""

from __future__ import annotations

import errno
import gc
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import IO, Any, TypeAlias

import torch
from torch import Tensor

from freehold.engine.loading import EngineOptions, load_model
from freehold.errors import CheckpointError, ConfigError, DiskFull, EngineError, InvalidRequest
from freehold.model.cache import IndexCache, LatentCache, PagedCache, cache_bytes_per_token, cache_formats
from freehold.model.cache_layout import IndexFormat, LatentFormat
from freehold.model.config import GlmConfig
from freehold.model.glm import Glm
from freehold.model.inputs import single_sequence
from freehold.model.tokenizer import Tokenizer

_WINDOW = 4  # times index_topk: the length of a window
_CHUNK = 512  # tokens of one prefill chunk
_ROWS = 64  # rows of logits in memory at once
_BLOCK = 64  # tokens of a cache block
_LEAST_TOKENS = 16

Progress = Callable[[int, int], None]
"""Called with (tokens done, tokens in all), every run counted."""
Windows: TypeAlias = Sequence[Sequence[int]]
Ran: TypeAlias = Callable[[int], None]

CACHES: tuple[tuple[LatentCache, IndexCache], ...] = (("auto", "fp8"), ("fp8", "auto"), ("fp8", "fp8"))
"""How caches may be stored, other than as computed."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Predictions at positions start <= p < stop (None: without end), over all windows.

    kl_*: KL(original || other). top1: share of positions with the same most likely token. perplexity_*: of the text.
    """

    start: int
    stop: int | None
    positions: int
    kl_mean: float
    kl_median: float
    kl_p99: float
    top1: float
    perplexity: float
    perplexity_other: float

    @property
    def perplexity_change(self) -> float:
        """Relative: 0.01 is 1% worse."""
        return self.perplexity_other / self.perplexity - 1


@dataclass(frozen=True, slots=True)
class Comparison:
    """total: all positions; buckets: by context, those that the text reaches."""

    original: str
    other: str
    tokens: int
    windows: int
    index_topk: int
    total: Bucket
    buckets: tuple[Bucket, ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class CacheComparison:
    """One way to store the caches against storing them as computed. bytes_*: of a token in all layers' caches."""

    latent: LatentFormat
    index: IndexFormat
    bytes_per_token: int
    bytes_as_computed: int
    comparison: Comparison

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def compare_checkpoints(
    original: str | Path, other: str | Path, text: str, *, progress: Progress | None = None
) -> Comparison:
    """Compare the predictions of two checkpoints on a text.

    Raises ConfigError if their tokenizers differ, InvalidRequest if the text is too short, DiskFull if the temporary
    directory (TMPDIR) has no room for the logits, EngineError if a model's logits are not finite.
    """
    first, second = Path(original), Path(other)
    config, other_config = GlmConfig.from_file(first), GlmConfig.from_file(second)
    tokens = Tokenizer.from_dir(first).encode(text, special=False)
    if config.vocab_size != other_config.vocab_size or Tokenizer.from_dir(second).encode(text, special=False) != tokens:
        raise ConfigError(f"{second}: its tokenizer is not that of {first}; their predictions cannot be compared")
    windows, options = _windows(tokens, config), EngineOptions()
    ran = _counter(2, windows, progress)
    with tempfile.TemporaryFile(prefix="freehold-logits-") as file, torch.inference_mode():
        dtype = _store(load_model(first, config, options), options, windows, file, ran)
        gc.collect()  # modules refer to one another: without this, the first model would stay while the second loads
        found = _against(load_model(second, other_config, options), options, windows, file, dtype, ran)
    return _compared(first.resolve().name, second.resolve().name, config, windows, found)


def compare_caches(
    directory: str | Path, text: str, options: EngineOptions | None = None, *, progress: Progress | None = None
) -> tuple[CacheComparison, ...]:
    """Compare a checkpoint's predictions with its caches stored as each of CACHES with those as computed, on a text.

    Raises as `compare_checkpoints` does, and ConfigError if the model's sizes do not fit into 8-bit caches.
    """
    directory, options = Path(directory), options or EngineOptions()
    config = GlmConfig.from_file(directory)
    windows = _windows(Tokenizer.from_dir(directory).encode(text, special=False), config)
    ran = _counter(1 + len(CACHES), windows, progress)
    compared = []
    with tempfile.TemporaryFile(prefix="freehold-logits-") as file, torch.inference_mode():
        plain = replace(options, latent_cache="auto", index_cache="auto")
        model = load_model(directory, config, plain)
        stored = _store(model, plain, windows, file, ran)
        names = cache_formats(model.dtype)
        for latent_cache, index_cache in CACHES:
            other = replace(options, latent_cache=latent_cache, index_cache=index_cache)
            found = _against(model, other, windows, file, stored, ran)
            latent, index = cache_formats(model.dtype, index_cache, latent_cache)
            comparison = _compared(_name(*names), _name(latent, index), config, windows, found)
            per_token = cache_bytes_per_token(config, model.dtype, index_cache, latent_cache)
            as_computed = cache_bytes_per_token(config, model.dtype)
            compared.append(CacheComparison(latent, index, per_token, as_computed, comparison))
    return tuple(compared)


def _name(latent: LatentFormat, index: IndexFormat) -> str:
    return f"{latent} latents and {index} index keys"


def _windows(tokens: Sequence[int], config: GlmConfig) -> Windows:
    """The text in windows. Raises InvalidRequest if it is too short."""
    if len(tokens) < _LEAST_TOKENS:
        raise InvalidRequest(f"the text has {len(tokens)} tokens; a comparison needs {_LEAST_TOKENS} at least")
    length = min(_WINDOW * config.index_topk, config.max_position_embeddings)
    windows = [tokens[start : start + length] for start in range(0, len(tokens), length)]
    return [window for window in windows if len(window) > 1]


def _counter(runs: int, windows: Windows, progress: Progress | None) -> Ran:
    """To be called with each number of tokens that one of the runs has done."""
    total = runs * sum(map(len, windows))
    done = 0

    def ran(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    return ran


def _compared(original: str, other: str, config: GlmConfig, windows: Windows, found: _Found) -> Comparison:
    buckets = [(0, config.index_topk), (config.index_topk, 2 * config.index_topk), (2 * config.index_topk, None)]
    reached = tuple(bucket for span in buckets if (bucket := _bucket(found, *span)) is not None)
    total = _bucket(found, 0, None)
    assert total is not None  # there is a window of two tokens
    return Comparison(
        original=original,
        other=other,
        tokens=sum(map(len, windows)),
        windows=len(windows),
        index_topk=config.index_topk,
        total=total,
        buckets=reached,
    )


@dataclass(frozen=True, slots=True)
class _Found:
    """One value a position, all windows one after the other."""

    positions: Tensor  # int64
    kl: Tensor  # float64
    same: Tensor  # bool
    loss: Tensor  # float64, nats of the next token
    loss_other: Tensor


def _store(model: Glm, options: EngineOptions, windows: Windows, file: IO[bytes], ran: Ran) -> torch.dtype:
    """Write the logits of all windows; returns their dtype."""
    needed = sum(len(window) - 1 for window in windows) * model.config.vocab_size * model.dtype.itemsize
    where, free = tempfile.gettempdir(), shutil.disk_usage(tempfile.gettempdir()).free
    if free < needed:
        raise DiskFull(f"{where}: the logits take {needed:,} bytes, but {free:,} are free; set TMPDIR or cut the text")
    try:
        for window in windows:
            for _, logits_RV in _logits(model, options, window, ran):
                file.write(logits_RV.contiguous().view(torch.uint8).numpy().data)
        file.flush()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DiskFull(f"{where}: no space left for the logits; set TMPDIR, or take less text") from None
        raise CheckpointError(f"{where}: cannot be written: {error.strerror or error}") from None
    return model.dtype


def _against(
    model: Glm, options: EngineOptions, windows: Windows, file: IO[bytes], stored: torch.dtype, ran: Ran
) -> _Found:
    """What this model predicts, beside the logits in the file."""
    file.seek(0)
    parts: list[_Found] = []
    for window in windows:
        following = torch.tensor(window[1:])
        for start, logits_RV in _logits(model, options, window, ran):
            rows, vocab = logits_RV.shape
            raw = bytearray(file.read(rows * vocab * stored.itemsize))
            before_RV = torch.frombuffer(raw, dtype=stored).view(rows, vocab)
            p_RV, q_RV = before_RV.float().log_softmax(-1), logits_RV.float().log_softmax(-1)
            next_R1 = following[start : start + rows, None]
            parts.append(
                _Found(
                    positions=torch.arange(start, start + rows),
                    kl=(p_RV.exp() * (p_RV - q_RV)).sum(-1, dtype=torch.float64).clamp_(min=0),
                    same=before_RV.argmax(-1) == logits_RV.argmax(-1),
                    loss=-p_RV.gather(1, next_R1).squeeze(1).double(),
                    loss_other=-q_RV.gather(1, next_R1).squeeze(1).double(),
                )
            )
    return _Found(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(_Found)))


def _logits(model: Glm, options: EngineOptions, window: Sequence[int], ran: Ran) -> Iterator[tuple[int, Tensor]]:
    """(first position, logits [R, V]) of every position that predicts another token of the window."""
    cache = PagedCache(
        model.config,
        -(-len(window) // _BLOCK),
        _BLOCK,
        model.dtype,
        index_cache=options.index_cache,
        latent_cache=options.latent_cache,
    )
    for start in range(0, len(window), _CHUNK):
        chunk = window[start : start + _CHUNK]
        hidden_TH = model(single_sequence(chunk, start=start, block_size=_BLOCK), cache)
        last = min(len(chunk), len(window) - 1 - start)  # the last token of the window predicts none of it
        for row in range(0, last, _ROWS):
            logits_RV = model.logits(hidden_TH[row : min(row + _ROWS, last)])
            if not bool(torch.isfinite(logits_RV).all()):
                raise EngineError(f"the model's logits at position {start + row} or after are NaN or infinite")
            yield start + row, logits_RV
        ran(len(chunk))


def _bucket(found: _Found, start: int, stop: int | None) -> Bucket | None:
    """The positions start <= p < stop; None if there are none."""
    inside = found.positions >= start
    if stop is not None:
        inside &= found.positions < stop
    kl = found.kl[inside]
    if not len(kl):
        return None
    return Bucket(
        start=start,
        stop=stop,
        positions=len(kl),
        kl_mean=float(kl.mean()),
        kl_median=float(kl.quantile(0.5)),
        kl_p99=float(kl.quantile(0.99)),
        top1=float(found.same[inside].double().mean()),
        perplexity=math.exp(float(found.loss[inside].mean())),
        perplexity_other=math.exp(float(found.loss_other[inside].mean())),
    )
