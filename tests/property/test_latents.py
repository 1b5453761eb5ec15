"""8-bit latents: quantisation against its definition, and the native kernels against their PyTorch twins.

Reading an 8-bit latent back rounds nothing, so attention over 8-bit latents must be, bit for bit, attention over the
bf16 latents that they stand for: that is tested, and leaves to the tests of bf16 attention whether it is right.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from freehold.errors import ConfigError
from freehold.model.inputs import Span
from freehold.model.latents import LATENT_GROUP, Fp8Latents
from freehold.model.ops.native import NativeOps
from freehold.model.ops.reference import ReferenceOps
from tests.native_cases import ALL_ISAS, SUPPORTED, generator, native, needs_native, normal, packed_heads

REFERENCE = ReferenceOps()
FINITE = torch.arange(256).to(torch.uint8)[(torch.arange(256) & 0x7F) != 0x7F]
NUMBERS = FINITE.view(torch.float8_e4m3fn).double()
SPECIALS = [0.0, -0.0, 448.0, 449.0, 1e-39, -3e-38, 3.3e38, float("nan"), float("inf"), float("-inf")]
KERNELS = st.builds(native, st.sampled_from(SUPPORTED or ("none",)), st.sampled_from([1, 2]))
RANKS = st.sampled_from([4, 60, 128, 132, 256, 500, 512])
ROPES = st.sampled_from([2, 10, 32, 64])


def random_latents(seed: int, rows: int, width: int, specials: list[float]) -> Tensor:
    """bf16 [rows, width], each row with a magnitude of its own, some values replaced by special ones."""
    g = generator(seed)
    latents = torch.randn(rows, width, generator=g) * torch.exp2(torch.randint(-140, 120, (rows, 1), generator=g))
    latents = latents.bfloat16()
    for value in specials:
        row, column = (int(torch.randint(0, size, (1,), generator=g)) for size in (rows, width))
        latents[row, column] = value
    return latents


def empty(slots: int, rank: int, rope: int) -> Fp8Latents:
    """With bytes that no latent has (E4M3's NaN), so that what is not written shows."""
    return Fp8Latents(torch.full((slots, Fp8Latents.record_bytes(rank, rope)), 0x7F, dtype=torch.uint8), rank, rope)


def filled(g: torch.Generator, slots: int, rank: int, rope: int) -> Fp8Latents:
    held = empty(slots, rank, rope)
    held.write(torch.arange(slots), normal(g, slots, rank + rope))
    return held


def same(a: Tensor, b: Tensor) -> bool:
    """Equal, NaN to NaN."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


@given(st.integers(0, 2**31), st.integers(1, 5), RANKS, ROPES, st.lists(st.sampled_from(SPECIALS), max_size=4))
def test_a_latent_is_stored_as_its_definition_says(
    seed: int, rows: int, rank: int, rope: int, specials: list[float]
) -> None:
    latents = random_latents(seed, rows, rank + rope, specials)
    held = empty(rows + 1, rank, rope)
    held.write(torch.arange(rows), latents)
    assert bool((held.records_SB[rows] == 0x7F).all())
    assert same(held.rope_SQ[:rows], latents[:, rank:])
    assert same(held.rows(torch.arange(rows))[:, rank:], latents[:, rank:].float())
    for row in range(rows):
        for group, exact in enumerate(latents[row, :rank].double().split(LATENT_GROUP)):
            most, scale = float(exact.abs().max()), float(held.scales_SG[row, group])
            at = slice(group * LATENT_GROUP, group * LATENT_GROUP + len(exact))
            if not math.isfinite(most):
                assert math.isnan(scale)
                assert bool(held.rows(torch.tensor([row]))[0, at].isnan().all())
                continue
            assert scale == (1.0 if most == 0 else max(2.0 ** math.ceil(math.log2(most / 448)), 2.0**-117))
            number = held.values_SV[row, at].view(torch.float8_e4m3fn).double()
            nearest = (exact[:, None] / scale - NUMBERS).abs().amin(-1)
            assert torch.equal((exact / scale - number).abs(), nearest)


@given(st.integers(0, 2**31), st.integers(1, 5), RANKS, ROPES)
def test_reading_rounds_nothing(seed: int, rows: int, rank: int, rope: int) -> None:
    held = empty(rows, rank, rope)
    held.write(torch.arange(rows), random_latents(seed, rows, rank + rope, []))
    exact = held.rows(torch.arange(rows))
    assert torch.equal(held.rows(torch.arange(rows), torch.bfloat16).float(), exact)
    products = (
        held.values_SV.view(torch.float8_e4m3fn).double() * held.scales_SG.double().repeat_interleave(128, 1)[:, :rank]
    )
    assert torch.equal(exact[:, :rank].double(), products.float().double())


@needs_native
@given(
    KERNELS,
    st.integers(0, 2**31),
    st.integers(1, 20),
    RANKS,
    ROPES,
    st.lists(st.sampled_from(SPECIALS), max_size=4),
)
def test_written_latents_are_the_reference(
    ops: NativeOps, seed: int, rows: int, rank: int, rope: int, specials: list[float]
) -> None:
    """Norms and rotations that round differently would hide the quantisation: here they change nothing."""
    g = generator(seed)
    x = random_latents(seed, rows, rank + rope, specials)
    slots = torch.randperm(rows + 9, generator=g)[:rows]
    cos, sin = torch.ones(rows, rope // 2), torch.zeros(rows, rope // 2)
    nothing = torch.empty(0, dtype=torch.bfloat16)
    written = []
    for twin in (ops, REFERENCE):
        held = empty(rows + 9, rank, rope)
        twin.write_cache(x, nothing, None, 1e-6, cos, sin, True, rank, held, slots)
        written.append(held)
    # Infinity times a sine of 0 is NaN, in both; NaN and zeros may have either sign.
    assert same(written[0].scales_SG, written[1].scales_SG)
    everywhere = torch.arange(rows + 9)
    wrote = torch.isin(everywhere, slots)
    assert same(written[0].rows(everywhere[wrote]), written[1].rows(everywhere[wrote]))
    assert torch.equal(written[0].records_SB[~wrote], written[1].records_SB[~wrote])
    read = ops.read_latents(written[0], slots)
    assert same(read.float(), written[0].rows(slots))


@needs_native
def test_norms_and_rotations_come_before_quantising() -> None:
    """Against the same row as the bf16 cache has it, for every instruction set."""
    g = generator(4)
    rows, rank, rope = 7, 256, 32
    x, weight = normal(g, rows, rank + rope), normal(g, rank)
    angles = torch.randn(rows, rope // 2, generator=g)
    for isa in SUPPORTED:
        plain = torch.zeros(rows, rank + rope, dtype=torch.bfloat16)
        held, expected = empty(rows, rank, rope), empty(rows, rank, rope)
        for cache in (plain, held):
            native(isa).write_cache(
                x, weight, None, 1e-5, angles.cos(), angles.sin(), True, rank, cache, torch.arange(rows)
            )
        expected.write(torch.arange(rows), plain)
        assert torch.equal(held.records_SB, expected.records_SB)


@pytest.mark.parametrize("isa", ALL_ISAS)
def test_every_byte_with_every_scale_is_its_number(isa: str) -> None:
    """From the least scale on, up to where 448 is still finite; and NaN."""
    for exponent in (*range(-117, 120), None):
        held = empty(1, 256, 2)
        held.values_SV[0] = 0
        held.values_SV[0, : len(FINITE)] = FINITE
        held.scales_SG[0] = float("nan") if exponent is None else 2.0**exponent
        held.rope_SQ[0] = 1.0
        read = native(isa).read_latents(held, torch.zeros(1, dtype=torch.int64))
        if exponent is None:
            assert bool(read[0, :256].isnan().all())
            continue
        numbers = NUMBERS * 2.0**exponent
        assert torch.equal(read[0, : len(FINITE)].double(), numbers)
        assert torch.equal(read[0, : len(FINITE)].signbit(), numbers.signbit())


@needs_native
@settings(max_examples=60)
@given(KERNELS, st.integers(0, 2**31), RANKS, ROPES, st.booleans(), st.data())
def test_attention_is_that_over_the_latents_as_they_are_read(
    ops: NativeOps, seed: int, rank: int, rope: int, not_finite: bool, data: st.DataObject
) -> None:
    """Bit for bit, in the native kernels and in the reference, whatever lies in slots that nobody chose."""
    g = generator(seed)
    rows, heads, slots = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 20)), 300
    held = filled(g, slots, rank, rope)
    if not_finite:
        held.scales_SG[slots - 5 :] = float("nan")
    plain = held.rows(torch.arange(slots), torch.bfloat16)
    chosen = torch.stack([torch.randperm(slots - 5, generator=g) for _ in range(rows)])
    chosen = chosen[:, : data.draw(st.sampled_from([1, 3, 63, 64, 65, 200]))].contiguous()
    chosen[torch.rand(chosen.shape, generator=g) < 0.1] = -1
    chosen[:, 0] = chosen[:, 0].clamp(min=0)
    query = normal(g, rows, heads, rank + rope)
    for twin in (ops, REFERENCE):
        eight = twin.sparse_attention(query, held, chosen, rank, 0.1)
        assert torch.equal(eight, twin.sparse_attention(query, plain, chosen, rank, 0.1))
        assert bool(eight.isfinite().all())


@needs_native
@settings(max_examples=30)
@given(KERNELS, st.integers(0, 2**31), st.integers(1, 40), st.integers(0, 100))
def test_expanded_attention_is_that_over_the_latents_as_they_are_read(
    ops: NativeOps, seed: int, rows: int, start: int
) -> None:
    g = generator(seed)
    heads, nope, value, rank, rope, block_size = 3, 16, 8, 64, 10, 16
    table = torch.randperm(20, generator=g)[: -(-(start + rows) // block_size)]
    held = filled(g, 20 * block_size, rank, rope)
    plain = held.rows(torch.arange(20 * block_size), torch.bfloat16)
    query, kv_b = normal(g, rows + 2, heads, nope + rope), normal(g, heads * (nope + value), rank)
    span = Span(1, rows, start, table)
    for twin, weight in ((ops, packed_heads(kv_b, heads, nope, "bf16")), (REFERENCE, kv_b)):
        eight = twin.dense_attention(query, held, weight, span, block_size, nope, 0.1)
        assert torch.equal(eight, twin.dense_attention(query, plain, weight, span, block_size, nope, 0.1))


@pytest.mark.parametrize("isa", ALL_ISAS)
def test_attention_does_not_depend_on_the_rows_beside_it(isa: str) -> None:
    g = generator(9)
    held, rank = filled(g, 400, 256, 32), 256
    query = normal(g, 16, 5, 288)
    chosen = torch.stack([torch.randperm(400, generator=g)[:150] for _ in range(16)])
    alone = [native(isa).sparse_attention(query[i : i + 1], held, chosen[i : i + 1], rank, 0.1) for i in range(16)]
    for rows in range(1, 17):
        for threads in (1, 3):
            together = native(isa, threads).sparse_attention(query[:rows], held, chosen[:rows], rank, 0.1)
            assert torch.equal(together, torch.cat(alone[:rows]))


@pytest.mark.parametrize(("rank", "rope"), [(130, 32), (128, 3)])
def test_sizes_that_do_not_lie_evenly_are_refused(rank: int, rope: int) -> None:
    with pytest.raises(ConfigError, match=f"this model has {rank} and {rope}"):
        Fp8Latents(torch.zeros(1, Fp8Latents.record_bytes(rank, rope), dtype=torch.uint8), rank, rope)
