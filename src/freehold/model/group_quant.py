"""Symmetric integer weights with a scale for each group of a row: quantisation, its inverse, and packing into int32.

A weight is code * scale. A code has at most 8 significant bits and a bf16 scale 8, so fp32 holds the product exactly
and dequantising rounds once. The scale is rounded to bf16 first and the codes are chosen against the rounded scale.

8 bits: scale = amax / 127, codes -127 .. 127; no weight is off by more than half a scale.
4 bits: codes -8 .. 7 have one more step on the negative side, so the weight of largest magnitude, m, is best put at -8
by a scale of its opposite sign (a scale may be negative). Each group takes the scale with the least squared error among
amax / 7, m / -8 and m / -8.5; the last clips m and is finer for all others. On normal weights in groups of 32 that
leaves a relative RMS error of 8.3%; amax / 7 alone leaves 9.7%, the first two 8.5%, and 28 candidates 8.1%.

Source of the packing: `compressed-tensors` "pack-quantized": code + 2^(bits-1) as an unsigned number, the first code of
a row in the lowest bits of the first int32.

Shape legend: O rows (out features), I columns (in features), G groups of a row, W int32 words of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from freehold.errors import CheckpointError

_BAND = 1 << 18  # weights worked on at a time: their fp32 copies stay near the core's cache
_RANGE = {8: (-127, 127), 4: (-8, 7)}
_LEAST_SCALE = torch.finfo(torch.bfloat16).tiny  # smaller ones lose bits, or become 0


@dataclass(frozen=True, slots=True)
class GroupQuantized:
    """A matrix [O, I] as codes_OI int8 and scale_OG bf16, one scale (of either sign) for `group` weights of a row.

    bits: 8 or 4. quantize_groups makes 8-bit codes of -127 .. 127 only; another writer's file may have -128.
    Raises CheckpointError if shapes and dtypes do not fit.
    """

    codes_OI: torch.Tensor
    scale_OG: torch.Tensor
    bits: int
    group: int

    def __post_init__(self) -> None:
        rows, columns = self.codes_OI.shape
        if self.bits not in (4, 8) or self.group < 1 or columns % self.group:
            raise CheckpointError(f"{columns} columns are not whole groups of {self.group} weights of 4 or 8 bits")
        if tuple(self.scale_OG.shape) != (rows, columns // self.group):
            raise CheckpointError(f"codes {[rows, columns]} have scales {list(self.scale_OG.shape)}: not one a group")
        if self.codes_OI.dtype != torch.int8 or self.scale_OG.dtype != torch.bfloat16:
            raise CheckpointError(f"codes must be int8 and scales bf16: {self.codes_OI.dtype}, {self.scale_OG.dtype}")

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.codes_OI.shape
        return rows, columns


def quantize_groups(weight_OI: torch.Tensor, bits: int, group: int, *, name: str = "weight") -> GroupQuantized:
    """Quantise a float matrix; a group of zeros gets scale 1. name is used in errors only.

    Raises CheckpointError, naming the tensor, for a matrix whose rows are not whole groups, and for NaN or infinity.
    """
    if weight_OI.ndim != 2 or weight_OI.shape[1] % group:
        raise CheckpointError(f"{name!r} {list(weight_OI.shape)}: not a matrix of whole groups of {group}")
    rows, columns = weight_OI.shape
    codes_OI = torch.empty(rows, columns, dtype=torch.int8)
    scale_OG = torch.empty(rows, columns // group, dtype=torch.bfloat16)
    for band in _bands(rows, columns):
        x_BGg = weight_OI[band].to(torch.float32).reshape(-1, columns // group, group)
        high_BG, low_BG = x_BGg.amax(-1, keepdim=True), x_BGg.amin(-1, keepdim=True)
        largest_BG = torch.maximum(high_BG, -low_BG)
        if not bool(torch.isfinite(largest_BG).all()):  # NaN counts as the largest
            raise CheckpointError(f"{name!r} has a weight that is NaN or infinite; it cannot be quantised")
        if bits == 8:
            scale_BG = _scale(largest_BG / 127)
        else:
            scale_BG = _best_scale(x_BGg, largest_BG, torch.where(high_BG >= -low_BG, high_BG, low_BG))
        codes_BGg = (x_BGg / scale_BG).round_().clamp_(*_RANGE[bits])
        codes_OI[band] = codes_BGg.flatten(1).to(torch.int8)
        scale_OG[band] = scale_BG.squeeze(-1).to(torch.bfloat16)
    return GroupQuantized(codes_OI, scale_OG, bits, group)


def dequantize_groups(quantized: GroupQuantized, dtype: torch.dtype) -> torch.Tensor:
    """The matrix [O, I] in a float dtype, each weight rounded once."""
    out_OI = torch.empty(quantized.shape, dtype=dtype)
    dequantize_groups_into(quantized, out_OI)
    return out_OI


def dequantize_groups_into(quantized: GroupQuantized, out_OI: torch.Tensor) -> None:
    """Write the weights into out_OI (any float dtype and strides), each rounded once, with little extra memory."""
    if tuple(out_OI.shape) != quantized.shape:
        raise CheckpointError(f"a weight {list(quantized.shape)} cannot be put into {list(out_OI.shape)}")
    groups = quantized.scale_OG.shape[1]
    for band in _bands(*quantized.shape):
        codes_BGg = quantized.codes_OI[band].to(torch.float32).reshape(-1, groups, quantized.group)
        out_OI[band].copy_(codes_BGg.mul_(quantized.scale_OG[band].to(torch.float32).unsqueeze(-1)).flatten(1))


def pack_codes(codes_OI: torch.Tensor, bits: int) -> torch.Tensor:
    """int8 codes [O, I] to int32 [O, I * bits / 32]."""
    unsigned_OI = (codes_OI + (1 << (bits - 1))).view(torch.uint8)  # wraps for 8 bits, which is what is wanted
    if bits == 4:
        unsigned_OI = unsigned_OI[:, ::2] | (unsigned_OI[:, 1::2] << 4)
    return unsigned_OI.contiguous().view(torch.int32)  # little-endian, as safetensors


def unpack_codes(packed_OW: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [O, W] to int8 codes [O, W * 32 / bits], in memory of their own."""
    unsigned = packed_OW.contiguous().view(torch.uint8)
    if bits == 4:
        unsigned = torch.stack((unsigned & 15, unsigned >> 4), dim=-1).flatten(1)
        return unsigned.view(torch.int8) - 8
    return (unsigned ^ 128).view(torch.int8)


def _best_scale(x_BGg: torch.Tensor, largest_BG: torch.Tensor, extreme_BG: torch.Tensor) -> torch.Tensor:
    """The 4-bit scale [B, G, 1] of the candidate with the least squared error in each group.

    Errors are compared in units of the group's largest weight: squares of very small weights would all be 0.
    """
    unit_BG = torch.where(largest_BG > 0, largest_BG, 1.0)
    best_BG = _scale(largest_BG / 7)
    error_BG = _squared_error(x_BGg, best_BG, unit_BG)
    for divisor in (-8.0, -8.5):
        scale_BG = _scale(extreme_BG / divisor)
        other_BG = _squared_error(x_BGg, scale_BG, unit_BG)
        best_BG = torch.where(other_BG < error_BG, scale_BG, best_BG)
        error_BG = torch.minimum(error_BG, other_BG)
    return best_BG


def _squared_error(x_BGg: torch.Tensor, scale_BG: torch.Tensor, unit_BG: torch.Tensor) -> torch.Tensor:
    exact_BGg = x_BGg / scale_BG
    codes_BGg = exact_BGg.round().clamp_(-8, 7)
    return exact_BGg.sub_(codes_BGg).square_().sum(-1, keepdim=True) * (scale_BG / unit_BG).square()


def _scale(wanted_BG: torch.Tensor) -> torch.Tensor:
    """Rounded to bf16 (kept in fp32), away from the subnormals, 1 where a group is all zeros."""
    scale_BG = wanted_BG.to(torch.bfloat16).to(torch.float32)
    scale_BG = torch.copysign(scale_BG.abs().clamp_(min=_LEAST_SCALE), scale_BG)
    return torch.where(wanted_BG == 0, 1.0, scale_BG)


def _bands(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, _BAND // max(columns, 1))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))
