"""Latents in 8 bits: FP8 E4M3 with a scale for each 128 values, and the rope key in bf16, as serving engines have it.

A slot is one record, read in one piece: kv_lora_rank bytes of E4M3, an fp32 scale for each 128 of them (the last group
may be shorter), and qk_rope_head_dim bf16 values: 656 bytes for GLM-5.2, where bf16 takes 1,152.

Scales are powers of two: a number of 4 bits times a power of two is a bf16 number, so reading a latent back rounds
nothing, and attention over 8-bit latents is, bit for bit, attention over the bf16 latents that they stand for. Scales
of amax / 448 would round E4M3's numbers little better, as it is a floating-point format: by 4 % of the error
(benchmarks/cache_formats.py). Engines that multiply by the stored scale read the same values.

Source: vLLM 0.32 `flashmla_sparse.py` and SGLang 0.5.23 (the layout, there with scales of amax / 448); DeepSeek-V3.2
for power-of-two scales. Shape suffixes: S cache slots, T rows, B bytes of a record, V kv_lora_rank, G its groups,
Q rope dims, L = V + Q.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from freehold.errors import ConfigError
from freehold.model.index_keys import quantise

LATENT_GROUP = 128
"""Values that share a scale."""

_LEAST_EXPONENT = -117  # with it, E4M3's least number, 2^-9, is a normal bf16 number


@dataclass(frozen=True, slots=True)
class Fp8Latents:
    """records_SB: uint8, contiguous; rank and rope: values of a record that are 8 bits and bf16.

    A scale is a power of two, or NaN where one of its values was not finite: all of them are then read as NaN.
    Raises ConfigError for a rank that is not a multiple of 4 (scales lie at multiples of 4 bytes) or an odd rope.
    """

    records_SB: Tensor
    rank: int
    rope: int

    def __post_init__(self) -> None:
        if self.rank % 4 or self.rope % 2:
            raise ConfigError(
                "a latent cache in fp8 needs kv_lora_rank divisible by 4 and an even qk_rope_head_dim; "
                f"this model has {self.rank} and {self.rope}"
            )

    @classmethod
    def record_bytes(cls, rank: int, rope: int) -> int:
        return rank + 4 * -(-rank // LATENT_GROUP) + 2 * rope

    @property
    def nbytes(self) -> int:
        return self.records_SB.nbytes

    @property
    def shape(self) -> tuple[int, int]:
        """(slots, values of a latent with its rope key)."""
        return self.records_SB.shape[0], self.rank + self.rope

    @property
    def values_SV(self) -> Tensor:
        """uint8, the bytes of finite E4M3 numbers: a view."""
        return self.records_SB[:, : self.rank]

    @property
    def scales_SG(self) -> Tensor:
        """fp32: a view."""
        return self.records_SB[:, self.rank : self.records_SB.shape[1] - 2 * self.rope].view(torch.float32)

    @property
    def rope_SQ(self) -> Tensor:
        """bf16: a view."""
        return self.records_SB[:, self.records_SB.shape[1] - 2 * self.rope :].view(torch.bfloat16)

    def rows(self, slots: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The latents of some slots, [.., L]; exact in fp32 and in bf16."""
        values = self.values_SV[slots].view(torch.float8_e4m3fn).float()
        scales = self.scales_SG[slots].repeat_interleave(LATENT_GROUP, dim=-1)[..., : self.rank]
        return torch.cat(((values * scales).to(dtype), self.rope_SQ[slots].to(dtype)), dim=-1)

    def write(self, slots_T: Tensor, latent_TL: Tensor) -> None:
        """Store rows at slots_T."""
        latent_TV, rope_TQ = torch.split(latent_TL, [self.rank, self.rope], dim=-1)
        groups = torch.split(latent_TV, LATENT_GROUP, dim=-1)
        values, scales = zip(*(quantise(group, _LEAST_EXPONENT) for group in groups), strict=True)
        self.values_SV[slots_T] = torch.cat(values, dim=-1)
        self.scales_SG[slots_T] = torch.stack(scales, dim=-1)
        self.rope_SQ[slots_T] = rope_TQ.to(torch.bfloat16)


Latents = Tensor | Fp8Latents
"""The latent cache of one layer: [S, L] as they are, or in 8 bits."""


def latent_rows(latents: Latents, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """The latents of some slots, [.., L]; 8-bit ones as `dtype`, others as they are."""
    return latents.rows(slots, dtype) if isinstance(latents, Fp8Latents) else latents[slots]
