"""8-bit index keys: quantisation against its definition, and the native kernels against their PyTorch twins."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from freehold.model.index_keys import Fp8Keys, quantise
from freehold.model.inputs import Span
from freehold.model.ops.reference import ReferenceOps
from tests.native_cases import ALL_ISAS, SUPPORTED, generator, native, needs_native

REFERENCE = ReferenceOps()
# Every finite E4M3 number; and what a key may have besides: zeros, tiny and huge numbers, and what is not finite.
FINITE = torch.arange(256).to(torch.uint8)[(torch.arange(256) & 0x7F) != 0x7F]
VALUES = FINITE.view(torch.float8_e4m3fn).float()
SPECIALS = [0.0, -0.0, 448.0, 449.0, 1e-39, -3e-38, 3.3e38, float("nan"), float("inf"), float("-inf")]
KERNELS = st.builds(native, st.sampled_from(SUPPORTED or ("none",)), st.sampled_from([1, 2]))


def random_keys(seed: int, rows: int, dim: int, specials: list[float]) -> Tensor:
    """bf16 [rows, dim], each row with a magnitude of its own, some values replaced by special ones."""
    g = generator(seed)
    keys = torch.randn(rows, dim, generator=g) * torch.exp2(torch.randint(-140, 120, (rows, 1), generator=g))
    keys = keys.bfloat16()
    for value in specials:
        keys[int(torch.randint(0, rows, (1,), generator=g)), int(torch.randint(0, dim, (1,), generator=g))] = value
    return keys


def empty_keys(slots: int, dim: int) -> Fp8Keys:
    return Fp8Keys(torch.full((slots, dim), 0x55, dtype=torch.uint8), torch.full((slots,), 7.0))


@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 140), st.lists(st.sampled_from(SPECIALS), max_size=4))
def test_a_scale_is_the_least_power_of_two_that_fits(seed: int, rows: int, dim: int, specials: list[float]) -> None:
    keys = random_keys(seed, rows, dim, specials)
    values, scales = quantise(keys)
    for key, value, scale in zip(keys.double(), values, scales.tolist(), strict=True):
        most = float(key.abs().max())
        number = value.view(torch.float8_e4m3fn).double()
        if not math.isfinite(most):
            assert math.isnan(scale)
            assert not bool(value.any())
            continue
        assert most / scale <= 448
        assert scale == (1.0 if most == 0 else max(2.0 ** math.ceil(math.log2(most / 448)), 2.0**-126))
        # To the nearest of all E4M3 numbers.
        nearest = (key[:, None] / scale - VALUES.double()).abs().amin(-1)
        assert torch.equal((key / scale - number).abs(), nearest)


@needs_native
@given(
    KERNELS,
    st.integers(0, 2**31),
    st.integers(1, 20),
    st.integers(2, 140),
    st.lists(st.sampled_from(SPECIALS)),
    st.data(),
)
def test_written_keys_are_the_reference(
    ops: ReferenceOps, seed: int, rows: int, dim: int, specials: list[float], data: st.DataObject
) -> None:
    """Norms and rotations that round differently would hide the quantisation: here they change nothing."""
    g = generator(seed)
    x = random_keys(seed, rows, dim, specials)
    pairs = data.draw(st.integers(1, dim // 2))
    slots = torch.randperm(rows + 9, generator=g)[:rows]
    cos, sin = torch.ones(rows, pairs), torch.zeros(rows, pairs)
    nothing = torch.empty(0, dtype=torch.bfloat16)
    written = []
    for twin in (ops, REFERENCE):
        keys = empty_keys(rows + 9, dim)
        twin.write_cache(x, nothing, None, 1e-6, cos, sin, True, 0, keys, slots)
        written.append(keys)
    # Infinity times a sine of 0 is NaN: a rotated row is then not finite, in both.
    assert torch.equal(written[0].values_SD & 0x7F, written[1].values_SD & 0x7F)
    assert torch.equal(written[0].scales_S.isnan(), written[1].scales_S.isnan())
    assert torch.equal(written[0].scales_S.nan_to_num(), written[1].scales_S.nan_to_num())
    zero = (written[0].values_SD & 0x7F) == 0
    assert torch.equal(written[0].values_SD[~zero], written[1].values_SD[~zero])


@pytest.mark.parametrize("isa", ALL_ISAS)
@pytest.mark.parametrize("rows", [1, 40])
def test_every_byte_is_its_number(isa: str, rows: int) -> None:
    """Scores of keys with one byte each: the order of E4M3 numbers, denormal ones included."""
    size = len(FINITE)
    keys = Fp8Keys(torch.zeros(size + 2, 4, dtype=torch.uint8), torch.ones(size + 2))
    keys.values_SD[:size, 1] = FINITE
    query = torch.zeros(rows, 2, 4, dtype=torch.bfloat16)
    query[:, 0, 1] = 1.0
    query[:, 1, 1] = -1.0
    weight = torch.tensor([[1.0, -1.0]]).expand(rows, 2)  # relu(x) - relu(-x) = x
    span = (Span(0, rows, size - rows, torch.arange(16)),)
    for topk in range(1, size - rows):
        expected = REFERENCE.select(query, weight, keys, span, 16, topk)
        assert torch.equal(
            native(isa).select(query, weight, keys, span, 16, topk).sort(-1).values, expected.sort(-1).values
        )


@needs_native
@settings(max_examples=150)
@given(KERNELS, st.integers(0, 2**31), st.booleans(), st.data())
def test_selection_is_the_same_set(ops: ReferenceOps, seed: int, not_finite: bool, data: st.DataObject) -> None:
    """Whole numbers and powers of two: scores are exact, with many ties, and the lowest position has to win."""
    g = generator(seed)
    block_size, heads = data.draw(st.sampled_from([1, 3, 16, 64])), data.draw(st.integers(1, 20))
    dim, topk = 2 * data.draw(st.integers(1, 64)), data.draw(st.integers(1, 200))
    spans, row = [], 0
    for _ in range(data.draw(st.integers(1, 3))):
        start, length = data.draw(st.integers(0, 400)), data.draw(st.sampled_from([1, 1, 2, 16, 17, 90]))
        blocks = (start + length + block_size - 1) // block_size
        spans.append(Span(row, length, start, torch.randperm(600, generator=g)[:blocks]))
        row += length
    slots = 600 * block_size
    width = dim + data.draw(st.sampled_from([0, 5]))
    numbers = torch.randint(-3, 4, (slots, width), generator=g).float().to(torch.float8_e4m3fn).view(torch.uint8)
    keys = Fp8Keys(numbers[:, :dim], torch.exp2(torch.randint(-2, 3, (slots,), generator=g).float()))
    if not_finite:
        keys.scales_S[torch.randint(0, slots, (20,), generator=g)] = float("nan")
    query = torch.randint(-2, 3, (row, heads, dim), generator=g).bfloat16()
    weight = torch.randint(-2, 3, (row, heads), generator=g).float()
    chosen = ops.select(query, weight, keys, tuple(spans), block_size, topk)
    expected = REFERENCE.select(query, weight, keys, tuple(spans), block_size, topk)
    assert torch.equal(chosen.sort(-1).values, expected.sort(-1).values)


@pytest.mark.parametrize("eight_bits", [False, True])
@pytest.mark.parametrize("isa", ALL_ISAS)
def test_a_selection_does_not_depend_on_the_rows_beside_it(isa: str, eight_bits: bool) -> None:
    """Speculation must choose for a row what decoding it alone would.

    The keys are permutations of one, and a query is the same in every dimension: scores differ in their rounding only.
    """
    g = generator(11)
    key = torch.randn(32, generator=g).bfloat16()
    raw = torch.stack([key[torch.randperm(32, generator=g)] for _ in range(3000)])
    keys = Fp8Keys(*quantise(raw)) if eight_bits else raw
    query = (torch.rand(16, 9, 1, generator=g) * key.float().sum().sign()).bfloat16().expand(16, 9, 32)
    weight = torch.rand(16, 9, generator=g)
    table = torch.randperm(3000 // 20, generator=g)
    alone = []
    for i in range(16):
        span = Span(0, 1, 2900 + i, table)
        one = native(isa).select(query[i : i + 1], weight[i : i + 1], keys, (span,), 20, 64)
        alone.append(one.sort(-1).values)
    for rows in range(1, 17):
        for threads in (1, 3):
            together = native(isa, threads).select(query, weight, keys, (Span(0, rows, 2900, table),), 20, 64)
            assert torch.equal(together.sort(-1).values, torch.cat(alone[:rows]))
