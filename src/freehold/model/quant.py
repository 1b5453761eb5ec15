"""FP8 E4M3 weights with 128x128 block scales: exact dequantisation, and quantisation for test checkpoints.

A dequantised weight is round(float64(w) * float64(scale)) to the target dtype, rounded once. The product has at most
4 + 24 significant bits, so float64 holds it exactly; multiplying in fp32 and then rounding to bf16 would round twice
and sometimes differ in the last bit. An E4M3 byte has 256 values, so a block needs only 256 exact products, and the
block's weights are looked up among them.

Shape legend: O rows (out features), I columns (in features), R and C block rows and columns, B = 128.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from freehold.errors import CheckpointError
from freehold.model.storage_fp8 import BLOCK, scale_shape

E4M3_MAX = 448.0
_LEAST_SCALE = torch.finfo(torch.float32).tiny  # smaller ones lose bits, or become 0


@dataclass(frozen=True, slots=True)
class BlockQuantized:
    """A matrix [O, I] as float8_e4m3fn and a float32 scale for each 128x128 block, as FP8 checkpoints hold it."""

    weight_OI: torch.Tensor
    scale_RC: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.weight_OI.shape
        return rows, columns


def dequantize_blocks(weight_OI: torch.Tensor, scale_RC: torch.Tensor, out_OI: torch.Tensor) -> None:
    """Write weight * scale, rounded once to out's dtype, into out; 128 rows at a time, so little memory is taken.

    weight_OI: float8_e4m3fn, contiguous. scale_RC: float32 [ceil(O/128), ceil(I/128)]. out_OI: any float dtype and
    strides, on the CPU. Raises CheckpointError if shapes or dtypes do not fit.
    """
    rows, columns = weight_OI.shape
    if weight_OI.dtype != torch.float8_e4m3fn or scale_RC.dtype != torch.float32:
        raise CheckpointError(f"FP8 weights must be E4M3 with F32 scales, found {weight_OI.dtype} and {scale_RC.dtype}")
    if tuple(scale_RC.shape) != scale_shape((rows, columns)) or out_OI.shape != weight_OI.shape:
        raise CheckpointError(f"FP8 weight {[rows, columns]} has scales {list(scale_RC.shape)}: not one for each block")
    bytes_OI = weight_OI.view(torch.uint8)
    # Where each column's block starts in a table of one row of blocks: [I]
    table_start_I = (torch.arange(columns, dtype=torch.int32) // BLOCK) * 256
    for block_row, start in enumerate(range(0, rows, BLOCK)):
        stop = min(start + BLOCK, rows)
        table = _products(scale_RC[block_row], out_OI.dtype)
        index = bytes_OI[start:stop].to(torch.int32).add_(table_start_I)
        out_OI[start:stop].copy_(table.index_select(0, index.view(-1)).view(stop - start, columns))


def quantize_blocks(weight_OI: torch.Tensor, *, name: str = "weight") -> tuple[torch.Tensor, torch.Tensor]:
    """(float8_e4m3fn [O, I], float32 scales [R, C]) with scale = amax / 448 of each block, 1 for a block of zeros.

    Raises CheckpointError, with the name, for NaN or infinity.
    """
    rows, columns = weight_OI.shape
    quantized_OI = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    scale_RC = torch.empty(scale_shape((rows, columns)), dtype=torch.float32)
    for block_row, start in enumerate(range(0, rows, BLOCK)):
        band = weight_OI[start : start + BLOCK].float()
        amax_C = torch.stack([band[:, left : left + BLOCK].abs().amax() for left in range(0, columns, BLOCK)])
        if not bool(torch.isfinite(amax_C).all()):  # NaN counts as the largest
            raise CheckpointError(f"{name!r} has a weight that is NaN or infinite; it cannot be quantised")
        scale_C = torch.where(amax_C > 0, (amax_C / E4M3_MAX).clamp(min=_LEAST_SCALE), 1.0)
        scale_RC[block_row] = scale_C
        scaled = band / scale_C.repeat_interleave(BLOCK)[:columns]
        quantized_OI[start : start + BLOCK] = scaled.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return quantized_OI, scale_RC


def round_once(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float64 to dtype with one rounding, to nearest even.

    torch converts float64 to a 16-bit type through float32, which rounds twice. Rounding to float32 "to odd" first
    (truncate, then set the last bit if anything was lost) keeps what the second rounding needs to know.
    """
    if dtype in (torch.float64, torch.float32):
        return exact.to(dtype)
    nearest = exact.to(torch.float32)
    bits = nearest.view(torch.int32)
    inexact = nearest.double() != exact
    too_far = inexact & (nearest.double().abs() > exact.abs())  # rounded away from zero: step back
    bits = torch.where(inexact, (bits - too_far.to(torch.int32)) | 1, bits)
    return bits.view(torch.float32).to(dtype)


def _products(scale_C: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[C * 256]: for each block of a block row, each of the 256 E4M3 values times the block's scale."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    return round_once(scale_C.double()[:, None] * values, dtype).view(-1)
