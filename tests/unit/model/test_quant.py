"""FP8 blocks: dequantised weights equal a float64 reference after one rounding, bit for bit."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from freehold.errors import CheckpointError
from freehold.model.quant import dequantize_blocks, quantize_blocks, round_once
from freehold.model.storage_fp8 import scale_shape

SHAPES = [(128, 128), (576, 6144), (448, 512), (1, 1), (127, 129), (130, 5), (3, 300)]
PRECISION = {torch.bfloat16: (8, -133), torch.float16: (11, -24), torch.float32: (24, -149)}  # bits, least exponent


def random_weight(shape: tuple[int, int], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every finite E4M3 value, and scales with full fp32 significands over many magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    raw[(raw & 0x7F) == 0x7F] = 0  # NaN
    exponents = torch.randint(-40, 10, scale_shape(shape), generator=generator)
    scale = torch.ldexp(1 + torch.rand(scale_shape(shape), generator=generator), exponents)
    return raw.view(torch.float8_e4m3fn), scale.float()


def exact_product(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float64, exact: 4 significant bits times 24."""
    rows, columns = weight.shape
    spread = scale.double().repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    return weight.double() * spread


def round_bfloat16(exact: torch.Tensor) -> torch.Tensor:
    """float64 to bfloat16 (normal numbers), to nearest even, on the bits of the float64: independent of casts."""
    bits = exact.view(torch.int64)
    dropped = 52 - 7
    half, odd = 1 << (dropped - 1), (bits >> dropped) & 1
    rounded = (bits + half - 1 + odd) >> dropped << dropped
    return rounded.view(torch.float64).to(torch.bfloat16)


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_equals_the_float64_reference(shape: tuple[int, int]) -> None:
    weight, scale = random_weight(shape, seed=math.prod(shape))
    out = torch.empty(shape, dtype=torch.bfloat16)
    dequantize_blocks(weight, scale, out)
    assert torch.equal(out, round_bfloat16(exact_product(weight, scale)))


def test_rounding_twice_would_be_wrong() -> None:
    """The bar is real: with these scales, going through fp32 gives another last bit."""
    scales = (1 + torch.arange(1 << 21, dtype=torch.float64) * 2.0**-23).float()
    exact = scales.double() * 1.875
    twice = exact.float().bfloat16()
    hard = scales[twice != round_bfloat16(exact)]
    assert len(hard) > 3
    for scale in hard.tolist():
        weight = torch.full((1, 1), 1.875).to(torch.float8_e4m3fn)
        out = torch.empty(1, 1, dtype=torch.bfloat16)
        dequantize_blocks(weight, torch.full((1, 1), scale), out)
        assert out == round_bfloat16(torch.tensor([[1.875 * scale]], dtype=torch.float64))
        assert out != (weight.float() * scale).bfloat16()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_targets(dtype: torch.dtype) -> None:
    weight, scale = random_weight((300, 200), seed=2)
    out = torch.empty(weight.shape, dtype=dtype)
    dequantize_blocks(weight, scale, out)
    exact = exact_product(weight, scale)
    for value, wanted in zip(out.flatten()[::97].tolist(), exact.flatten()[::97].tolist(), strict=True):
        assert Fraction(value) == nearest(Fraction(wanted), dtype)


def nearest(exact: Fraction, dtype: torch.dtype) -> Fraction:
    """The multiple of the last place nearest to `exact`, ties to even; by exact arithmetic."""
    if exact == 0:
        return exact
    bits, least = PRECISION[dtype]
    exponent = max(math.frexp(float(exact))[1] - bits, least)
    return round(exact / Fraction(2) ** exponent) * Fraction(2) ** exponent


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_round_once_at_ties_and_among_subnormals(dtype: torch.dtype) -> None:
    bits, least = PRECISION[dtype]
    tie = 1 + 2.0**-bits  # halfway between 1 and the next number
    hard = [tie, tie * (1 + 2**-40), tie * (1 - 2**-40), -tie * (1 + 2**-40), 1 - 2.0 ** -(bits + 1), 0.0, -0.0]
    tiny = [2.0**least * k * (1 + e) for k in (0.5, 1.5, 2.5, 100.5) for e in (0, 2**-40, -(2**-40))]
    values = torch.tensor(hard + tiny, dtype=torch.float64)
    found = round_once(values, dtype)
    assert [Fraction(v) for v in found.tolist()] == [nearest(Fraction(v), dtype) for v in values.tolist()]
    assert math.copysign(1, found[6].item()) == -1


def test_every_e4m3_value_keeps_its_sign_and_nan() -> None:
    weight = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(2, 128)
    out = torch.empty(2, 128, dtype=torch.bfloat16)
    dequantize_blocks(weight, torch.ones(1, 1), out)
    assert torch.equal(out.isnan(), weight.float().isnan())
    numbers = ~out.isnan()
    assert torch.equal(out[numbers].view(torch.int16), weight.to(torch.bfloat16)[numbers].view(torch.int16))


def test_a_view_of_a_larger_parameter_is_filled_in_place() -> None:
    weight, scale = random_weight((130, 140), seed=3)
    whole = torch.full((2, 260, 140), 7.0, dtype=torch.bfloat16)
    dequantize_blocks(weight, scale, whole[1, 130:])
    assert torch.equal(whole[1, 130:], round_bfloat16(exact_product(weight, scale)))
    assert bool((whole[0] == 7).all())
    assert bool((whole[1, :130] == 7).all())


@pytest.mark.parametrize("shape", SHAPES)
def test_quantised_blocks_use_their_range_and_come_back_close(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(4)
    weight = (torch.randn(shape, generator=generator) * 0.02).bfloat16()
    quantized, scale = quantize_blocks(weight)
    assert tuple(scale.shape) == scale_shape(shape)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = (slice(i * 128, (i + 1) * 128), slice(j * 128, (j + 1) * 128))
            assert scale[i, j] == weight[block].float().abs().max() / 448
            assert quantized[block].float().abs().max() == 448
    back = torch.empty(shape, dtype=torch.float32)
    dequantize_blocks(quantized, scale, back)
    error = (back - weight.float()).abs()
    step = scale.repeat_interleave(128, 0)[: shape[0]].repeat_interleave(128, 1)[:, : shape[1]]
    assert bool((error <= torch.maximum(weight.float().abs() / 16, step * 2.0**-9)).all())  # 3 bits, or a subnormal's


def test_a_block_of_zeros() -> None:
    quantized, scale = quantize_blocks(torch.zeros(130, 130))
    assert bool((scale == 1).all())
    assert bool((quantized.float() == 0).all())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers_are_refused_by_name(value: float) -> None:
    weight = torch.ones(130, 140)
    weight[129, 139] = value
    with pytest.raises(CheckpointError, match="'some name' has a weight that is NaN or infinite"):
        quantize_blocks(weight, name="some name")


def test_the_smallest_numbers_become_zeros_and_not_nan() -> None:
    weight = torch.zeros(2, 3)
    weight[0, 0] = 1e-44  # less than 448 times the smallest fp32 number: a scale of 0 would make NaN of the zeros
    quantized, scale = quantize_blocks(weight)
    assert scale[0, 0] > 0
    assert torch.equal(quantized.float(), torch.zeros(2, 3))


def test_what_does_not_fit_is_refused() -> None:
    weight, scale = random_weight((130, 140), seed=5)
    out = torch.empty(130, 140)
    with pytest.raises(CheckpointError, match="not one for each block"):
        dequantize_blocks(weight, scale[:1].contiguous(), out)
    with pytest.raises(CheckpointError, match="E4M3"):
        dequantize_blocks(weight.view(torch.float8_e5m2), scale, out)
    with pytest.raises(CheckpointError, match="F32 scales"):
        dequantize_blocks(weight, scale.bfloat16(), out)
