"""Index keys in 8 bits: FP8 E4M3 values with one power-of-two scale a token, the layout that serving engines use.

Half the memory and half the reading of bf16 keys; scores then carry FP8's rounding (3 mantissa bits), so a selection
may differ from the bf16 one among near-equals. Source: DeepGEMM's and SGLang 0.5.23's index cache (128 values and an
fp32 scale, 132 bytes); Micikevicius et al. 2022, "FP8 Formats for Deep Learning".

Shape suffixes: S cache slots, T rows, D index_head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FP8_GROUP = 128
"""Values that share a scale: a key may have no more, because a score is scaled once."""

_LEAST_EXPONENT = -126  # the scale is a normal fp32 number


@dataclass(frozen=True, slots=True)
class Fp8Keys:
    """values_SD: uint8, the bytes of finite E4M3 numbers; scales_S: fp32. Key s is values[s] · scales[s].

    A scale is positive, or NaN where the key was not finite: such a key scores NaN, the largest of scores.
    """

    values_SD: Tensor
    scales_S: Tensor

    @property
    def nbytes(self) -> int:
        return self.values_SD.nbytes + self.scales_S.nbytes

    @property
    def shape(self) -> tuple[int, int]:
        """(slots, values of a key)."""
        return self.values_SD.shape[0], self.values_SD.shape[1]

    def rows(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """(values, scales) of some slots, values as fp32."""
        return self.values_SD[slots].view(torch.float8_e4m3fn).float(), self.scales_S[slots]

    def write(self, slots_T: Tensor, key_TD: Tensor) -> None:
        """Store rows at slots_T."""
        self.values_SD[slots_T], self.scales_S[slots_T] = quantise(key_TD)


IndexKeys = Tensor | Fp8Keys
"""The index-key cache of one full layer: [S, D] as they are, or in 8 bits."""


def quantise(key_TD: Tensor, least_exponent: int = _LEAST_EXPONENT) -> tuple[Tensor, Tensor]:
    """(bytes uint8 [T, D], scales fp32 [T]): scale = 2^ceil(log2(amax / 448)), 1 for zeros, NaN unless all is finite.

    Exact in the scale, which is found from the exponent (448 is 0.875 · 2^9), and at least 2^least_exponent; values are
    rounded to nearest, to even on ties.
    """
    key = key_TD.float()
    most_T = key.abs().amax(-1)
    finite_T = most_T.isfinite()
    mantissa, exponent = torch.frexp(torch.where(finite_T, most_T, 1.0))  # in [0.5, 1)
    exponent = (exponent - 9 + (mantissa > 0.875)).clamp(min=least_exponent)
    one = torch.ones_like(most_T)
    scale_T = torch.where(most_T == 0, one, torch.ldexp(one, exponent))
    scaled = torch.where(finite_T[:, None], key / scale_T[:, None], 0.0)
    return scaled.to(torch.float8_e4m3fn).view(torch.uint8), torch.where(finite_T, scale_T, torch.nan)
