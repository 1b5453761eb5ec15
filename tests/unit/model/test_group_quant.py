"""Group quantisation: rounding bounds, exact inverses, the packing by another definition, and refusals."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from freehold.errors import CheckpointError
from freehold.model.group_quant import (
    GroupQuantized,
    dequantize_groups,
    dequantize_groups_into,
    pack_codes,
    quantize_groups,
    unpack_codes,
)

FORMATS = [(8, 64), (8, 128), (4, 32), (4, 128)]


def weights(rows: int, columns: int, seed: int, spread: int = 0) -> torch.Tensor:
    """Normal weights; with `spread`, each row has a magnitude of its own, up to 2^spread from 0.02."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-spread, spread + 1, (rows, 1), generator=generator)
    return torch.ldexp(torch.randn(rows, columns, generator=generator) * 0.02, exponents)


def by_group(matrix: torch.Tensor, group: int) -> torch.Tensor:
    """float64 [O, G, group]."""
    return matrix.double().unflatten(1, (-1, group))


matrices = st.builds(
    weights, st.integers(1, 5), st.sampled_from([128, 256]), st.integers(0, 1 << 30), st.sampled_from([0, 30, 110])
)


@given(matrices, st.booleans(), st.data())
def test_8_bit_weights_are_within_half_a_scale(weight: torch.Tensor, zeros: bool, data: st.DataObject) -> None:
    group = data.draw(st.sampled_from([64, 128]))
    if zeros:
        weight[:, :group] = 0
    quantized = quantize_groups(weight, 8, group)
    scale = by_group(quantized.scale_OG, 1)
    exact = by_group(quantized.codes_OI, group) * scale
    assert int(quantized.codes_OI.abs().max()) <= 127
    assert bool((scale > 0).all())
    assert bool(((exact - by_group(weight, group)).abs() <= scale / 2 * (1 + 1e-6)).all())


@given(matrices, st.data())
def test_4_bit_codes_are_the_nearest_and_no_group_is_worse_than_by_plain_rounding(
    weight: torch.Tensor, data: st.DataObject
) -> None:
    group = data.draw(st.sampled_from([32, 128]))
    quantized = quantize_groups(weight, 4, group)
    wanted, scale = by_group(weight, group), by_group(quantized.scale_OG, 1)
    codes = by_group(quantized.codes_OI, group)
    assert int(quantized.codes_OI.min()) >= -8
    assert int(quantized.codes_OI.max()) <= 7
    assert bool(((wanted / scale).clamp(-8, 7) - codes).abs().le(0.5 * (1 + 1e-6)).all())
    plain = (wanted.abs().amax(-1, keepdim=True) / 7).bfloat16().double().clamp(min=2.0**-126)
    plain_error = ((wanted / plain).round().clamp(-8, 7) * plain - wanted).square().sum(-1)
    error = (codes * scale - wanted).square().sum(-1)
    assert bool((error <= plain_error * (1 + 1e-5)).all())


def test_the_search_for_a_scale_pays() -> None:
    """The figures of the module's docstring."""
    weight = weights(1024, 1024, 0)

    def error(exact: torch.Tensor) -> float:
        return float((exact - weight).square().sum().div(weight.square().sum()).sqrt())

    grouped = weight.unflatten(1, (-1, 32))
    plain = (grouped.abs().amax(-1, keepdim=True) / 7).bfloat16().float()
    assert error(((grouped / plain).round() * plain).flatten(1)) == pytest.approx(0.097, abs=0.001)
    assert error(dequantize_groups(quantize_groups(weight, 4, 32), torch.float32)) == pytest.approx(0.083, abs=0.001)


@pytest.mark.parametrize(("bits", "group"), FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dequantising_rounds_the_exact_product_once(bits: int, group: int, dtype: torch.dtype) -> None:
    quantized = quantize_groups(weights(3, 256, 1), bits, group)
    found = dequantize_groups(quantized, dtype)
    for row in range(3):
        for column in range(256):
            code, scale = quantized.codes_OI[row, column], quantized.scale_OG[row, column // group]
            exact = Fraction(int(code)) * Fraction(float(scale))
            value = found[row, column]
            above = torch.nextafter(value, torch.tensor(math.inf, dtype=dtype))
            below = torch.nextafter(value, torch.tensor(-math.inf, dtype=dtype))
            error = abs(Fraction(float(value)) - exact)
            assert all(error <= abs(Fraction(float(other)) - exact) for other in (above, below))


@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_what_came_out_goes_in_again_unchanged(bits: int, group: int) -> None:
    """Quantising a dequantised matrix gives the same weights: a copy of a copy loses nothing more."""
    once = dequantize_groups(quantize_groups(weights(64, 256, 2), bits, group), torch.float32)
    twice = dequantize_groups(quantize_groups(once, bits, group), torch.float32)
    different = (once != twice).double().mean()
    assert different == 0 if bits == 8 else different < 0.2  # a 4-bit group may find a better scale


@pytest.mark.parametrize("bits", [8, 4])
def test_zeros_and_the_smallest_numbers(bits: int) -> None:
    weight = torch.zeros(4, 128)
    weight[1] = 1e-45  # the least fp32 number
    weight[2] = -(2.0**-126)
    weight[3, ::2] = 3e37
    quantized = quantize_groups(weight, bits, 64)
    assert bool((quantized.scale_OG[0] == 1).all())
    assert bool((quantized.codes_OI[0] == 0).all())
    back = dequantize_groups(quantized, torch.float32)
    assert bool(back.isfinite().all())
    assert bool(((back - weight).abs() <= quantized.scale_OG.float().abs().repeat_interleave(64, 1) / 2).all())


def test_the_scale_is_rounded_before_the_codes_are_chosen() -> None:
    """amax / 127 = 1 + 2^-8 - a little lies between two bf16 numbers; the codes must follow the one that is kept."""
    weight = torch.full((1, 64), 63.6)
    weight[0, 0] = 127 * (1 + 2.0**-8 - 2.0**-16)
    quantized = quantize_groups(weight, 8, 64)
    assert quantized.scale_OG.item() == 1.0
    assert quantized.codes_OI[0, :2].tolist() == [127, 64]  # by the scale before rounding, 63.6 would be 63


@pytest.mark.parametrize("bits", [8, 4])
def test_packing_is_as_defined(bits: int) -> None:
    """Bit by bit, in Python integers."""
    generator = torch.Generator().manual_seed(3)
    low = -(1 << (bits - 1))
    codes = torch.randint(low, -low, (5, 64), generator=generator, dtype=torch.int8)
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.int32
    assert tuple(packed.shape) == (5, 64 * bits // 32)
    for row, words in zip(codes.tolist(), packed.numpy().view(np.uint32).tolist(), strict=True):
        together = sum((code - low) << (bits * i) for i, code in enumerate(row))
        assert words == [(together >> (32 * i)) & 0xFFFFFFFF for i in range(len(words))]
    assert torch.equal(unpack_codes(packed, bits), codes)


def test_a_view_of_a_larger_parameter_is_filled_in_place() -> None:
    whole = torch.full((2, 8, 128), 7.0, dtype=torch.bfloat16)
    quantized = quantize_groups(weights(4, 128, 4), 8, 64)
    dequantize_groups_into(quantized, whole[1, 4:])
    assert torch.equal(whole[1, 4:], dequantize_groups(quantized, torch.bfloat16))
    assert bool((whole[0] == 7).all())
    assert bool((whole[1, :4] == 7).all())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("bits", [8, 4])
def test_weights_that_are_no_numbers_are_refused_by_name(bits: int, value: float) -> None:
    weight = weights(3, 64, 5)
    weight[1, 7] = value
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' has a weight that is NaN or infinite"):
        quantize_groups(weight, bits, 32, name="lm_head.weight")


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"'w' \[3, 65\]: not a matrix of whole groups of 64"):
        quantize_groups(torch.zeros(3, 65), 8, 64, name="w")
    with pytest.raises(CheckpointError, match="not a matrix"):
        quantize_groups(torch.zeros(64), 8, 64)
    codes, scale = torch.zeros(2, 64, dtype=torch.int8), torch.ones(2, 1, dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match="not one a group"):
        GroupQuantized(codes, scale, 8, 32)
    with pytest.raises(CheckpointError, match="whole groups of 48"):
        GroupQuantized(codes, scale, 8, 48)
    with pytest.raises(CheckpointError, match="scales bf16"):
        GroupQuantized(codes, scale.float(), 8, 64)
    with pytest.raises(CheckpointError, match="cannot be put into"):
        dequantize_groups_into(GroupQuantized(codes, scale, 8, 64), torch.zeros(2, 63))
