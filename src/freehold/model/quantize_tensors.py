"""Quantises the tensors of a checkpoint as a stream of bytes, some rows at a time, and measures what is lost.

Bands of rows are worked on by several threads, each with one torch thread, and come out in order.
Errors are measured on what a reader gets: the stored codes and rounded scales, dequantised to fp32, against the weights
of the source. Shape legend: O rows, I columns, B rows of a band.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass
from typing import TypeVar

import torch

from freehold.errors import CheckpointError
from freehold.headers import CheckpointIndex
from freehold.model.config import GlmConfig
from freehold.model.group_quant import GroupQuantized, dequantize_groups, pack_codes, quantize_groups
from freehold.model.names import SCALE_SUFFIX, TensorSpec
from freehold.model.quant import BlockQuantized, dequantize_blocks, quantize_blocks
from freehold.model.quantize_report import TensorError
from freehold.model.storage_fp8 import BLOCK
from freehold.model.storage_groups import GROUP_SIZE, SCALE, SHAPE, GroupFormat
from freehold.model.stored import StoredTensor
from freehold.model.weights import Source, open_tensor

_BAND = 1 << 18  # weights worked on at a time by a thread
_WAITING = 64  # bands that may be done before their turn
In = TypeVar("In")
Out = TypeVar("Out")
_TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class TensorQuantizer:
    """Makes the stored bytes of one shard's tensors, in order. `errors` grows by one for each quantised matrix."""

    def __init__(self, config: GlmConfig, index: CheckpointIndex, workers: Executor) -> None:
        self.errors: list[TensorError] = []
        self._config = config
        self._index = index
        self._workers = workers
        self._companions: dict[str, bytes] = {}  # scales and shape of the matrix made last

    def pieces(self, tensor: StoredTensor) -> Iterator[bytes]:
        """The tensor's bytes as they go into a file. Scales and shape must follow their weight.

        Raises CheckpointError for a weight that is NaN or infinite where it is to be quantised.
        """
        if tensor.is_scale:
            yield self._companions.pop(tensor.name)
            return
        with open_tensor(self._index, tensor.spec.name) as source:
            if tensor.dtype == "I32":
                yield from self._grouped(tensor, source)
            elif tensor.dtype == "F8_E4M3":
                yield from self._blocks(tensor, source)
            else:
                yield from _kept(source, _TORCH_DTYPES[tensor.dtype])

    def _grouped(self, tensor: StoredTensor, source: Source) -> Iterator[bytes]:
        spec = tensor.spec
        bits = 32 * tensor.shape[1] // spec.shape[1]
        form = GroupFormat(bits, GROUP_SIZE[bits])

        def work(rows: slice) -> _Band:
            band_BI = _rows(source, rows, torch.float32)
            quantized = quantize_groups(band_BI, bits, form.group, name=spec.name)
            sums = _Sums.of(band_BI, dequantize_groups(quantized, torch.float32))
            return _Band(_bytes(pack_codes(quantized.codes_OI, bits)), _bytes(quantized.scale_OG), sums)

        yield from self._run(work, source, spec, str(form), SCALE)
        self._companions[spec.name + SHAPE] = _bytes(torch.tensor(spec.shape, dtype=torch.int64))

    def _blocks(self, tensor: StoredTensor, source: Source) -> Iterator[bytes]:
        spec = tensor.spec

        def work(rows: slice) -> _Band:
            band_BI = _rows(source, rows, torch.float32)
            weight_BI, scale_RC = quantize_blocks(band_BI, name=spec.name)
            back_BI = torch.empty_like(band_BI)
            dequantize_blocks(weight_BI, scale_RC, back_BI)
            return _Band(_bytes(weight_BI), _bytes(scale_RC), _Sums.of(band_BI, back_BI))

        yield from self._run(work, source, spec, f"fp8 in {BLOCK}x{BLOCK} blocks", SCALE_SUFFIX)

    def _run(
        self, work: Callable[[slice], _Band], source: Source, spec: TensorSpec, stored: str, suffix: str
    ) -> Iterator[bytes]:
        """Yield the bands' weights; keep their scales for the tensor that follows, and add the matrix's error."""
        sums = _Sums()
        scales: list[bytes] = []
        for band in _in_order(self._workers, work, _bands(source)):
            sums += band.sums
            scales.append(band.scales)
            yield band.weights
        self._companions[spec.name + suffix] = b"".join(scales)
        part = "mtp" if spec.layer == self._config.num_hidden_layers else spec.part
        self.errors.append(sums.error(spec.name, part, stored))


@dataclass(frozen=True, slots=True)
class _Sums:
    """Sums of squares over some rows: of the original weights, of the stored ones, and of the difference."""

    count: int = 0
    original: float = 0.0
    stored: float = 0.0
    noise: float = 0.0
    largest: float = 0.0

    @classmethod
    def of(cls, original_BI: torch.Tensor, stored_BI: torch.Tensor) -> _Sums:
        original, stored = _square(original_BI), _square(stored_BI)
        noise_BI = stored_BI.sub_(original_BI)
        return cls(original_BI.numel(), original, stored, _square(noise_BI), float(noise_BI.abs().max()))

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(
            self.count + other.count,
            self.original + other.original,
            self.stored + other.stored,
            self.noise + other.noise,
            max(self.largest, other.largest),
        )

    def error(self, name: str, part: str, stored: str) -> TensorError:
        norms = math.sqrt(self.original) * math.sqrt(self.stored)
        product = (self.original + self.stored - self.noise) / 2  # <a, b>, from |a - b|² = |a|² + |b|² - 2<a, b>
        return TensorError(
            name=name,
            part=part,
            stored=stored,
            weights=self.count,
            rms=math.sqrt(self.original / self.count),
            relative_rms=math.sqrt(self.noise / self.original) if self.original else 0.0,
            max_abs=self.largest,
            cosine=min(1.0, product / norms) if norms else 1.0,
        )


@dataclass(frozen=True, slots=True)
class _Band:
    """Some rows as they are stored."""

    weights: bytes
    scales: bytes
    sums: _Sums


def _in_order(workers: Executor, work: Callable[[In], Out], items: Iterable[In]) -> Iterator[Out]:
    """Results in the order of items. However it ends, no work is under way afterwards: it reads a mapped file."""
    waiting: deque[Future[Out]] = deque()
    try:
        for item in items:
            waiting.append(workers.submit(work, item))
            if len(waiting) >= _WAITING:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
        wait(waiting)


def _kept(source: Source, dtype: torch.dtype) -> Iterator[bytes]:
    """A tensor that is not quantised: as it is, or, if the source has it as FP8, rounded once to the model's dtype."""
    for rows in _bands(source):
        yield _bytes(_rows(source, rows, dtype))


def _bands(source: Source) -> Iterator[slice]:
    """Some rows at a time, whole rows of FP8 blocks; a vector is one band."""
    rows = source.shape[0]
    step = rows if len(source.shape) == 1 else max(1, _BAND // (source.shape[1] * BLOCK)) * BLOCK
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def _rows(source: Source, rows: slice, dtype: torch.dtype) -> torch.Tensor:
    """Rows of a tensor in a float dtype."""
    if isinstance(source, GroupQuantized):
        raise CheckpointError("weights that are int8 or int4 already cannot be quantised again")
    if not isinstance(source, BlockQuantized):
        return source[rows].to(dtype)
    band_BI = torch.empty(rows.stop - rows.start, source.shape[1], dtype=dtype)
    scale_RC = source.scale_RC[rows.start // BLOCK : -(-rows.stop // BLOCK)].contiguous()
    dequantize_blocks(source.weight_OI[rows], scale_RC, band_BI)
    return band_BI


def _square(tensor_BI: torch.Tensor) -> float:
    return float(torch.linalg.vecdot(tensor_BI, tensor_BI).sum(dtype=torch.float64))


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
