"""Packed weights: the layout that the kernels read, and that packing loses nothing of what a checkpoint has."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from freehold.model import packed as packed_module
from freehold.model.group_quant import GroupQuantized, dequantize_groups, quantize_groups
from freehold.model.packed import (
    KINDS,
    Kind,
    PackedHeads,
    PackedWeight,
    Source,
    default_group,
    fp8_group,
)
from freehold.model.quant import BlockQuantized, dequantize_blocks, quantize_blocks
from freehold.model.storage_fp8 import scale_shape
from tests.native_cases import generator, group_of, normal, packed

SHAPES = [(16, 8), (37, 200), (1, 64), (130, 264)]


def blocks(g: torch.Generator, rows: int, columns: int) -> BlockQuantized:
    """Every finite E4M3 value, and scales with full fp32 significands."""
    codes = torch.randint(0, 256, (rows, columns), generator=g).to(torch.uint8)
    codes[(codes & 127) == 127] = 0
    return BlockQuantized(codes.view(torch.float8_e4m3fn), torch.rand(scale_shape((rows, columns)), generator=g) + 0.1)


def floats_of(source: BlockQuantized) -> Tensor:
    out = torch.empty(source.shape)
    dequantize_blocks(source.weight_OI, source.scale_RC, out)
    return out


def slow_panels(codes: list[list[int]], kind: Kind) -> bytes:
    """native/matrix.h in words of Python: one value at a time, missing outputs zero."""
    outputs, inner = len(codes), len(codes[0])
    out = b""
    for panel in range(0, outputs, 16):
        rows = [codes[o] if o < outputs else [0] * inner for o in range(panel, panel + 16)]
        for chunk in range(0, inner, 8):
            if kind == "int4":  # [output][parity], pair j in bits 4j .. 4j + 3
                for row in rows:
                    for parity in (0, 1):
                        word = sum((row[chunk + 2 * j + parity] + 8) << (4 * j) for j in range(4))
                        out += struct.pack("<H", word)
            else:  # [pair][output][2]
                size = {"bf16": "<h", "int8": "<b", "fp8": "<B"}[kind]
                for pair in range(chunk, chunk + 8, 2):
                    for row in rows:
                        out += struct.pack(size, row[pair]) + struct.pack(size, row[pair + 1])
    return out


def slow_scales(scales: list[list[float]]) -> list[float]:
    """[panel][group][16]."""
    outputs, groups = len(scales), len(scales[0])
    return [
        scales[o][group] if o < outputs else 0.0
        for panel in range(0, outputs, 16)
        for group in range(groups)
        for o in range(panel, panel + 16)
    ]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_layout_is_that_of_matrix_h(kind: Kind, shape: tuple[int, int]) -> None:
    g = generator(shape[0])
    group = group_of(kind, shape[1])
    held = PackedWeight(*shape, kind, group=group)
    if kind == "bf16":
        source = normal(g, *shape)
        held.load(source)
        codes, scales = source.view(torch.int16), None
    elif kind == "fp8":
        quantised = blocks(g, *shape)
        held.load(quantised)
        codes = quantised.weight_OI.view(torch.uint8)
        columns = [column // 128 for column in range(0, shape[1], 128)]
        scales = [[float(quantised.scale_RC[row // 128, column]) for column in columns] for row in range(shape[0])]
    else:
        assert group is not None
        grouped = quantize_groups(normal(g, *shape), 8 if kind == "int8" else 4, group)
        held.load(grouped)
        codes, scales = grouped.codes_OI, grouped.scale_OG.tolist()
    assert held.codes.numpy().tobytes() == slow_panels(codes.tolist(), kind)
    if scales is None:
        assert held.scales is None
    else:
        assert held.scales is not None
        assert held.scales.dtype == (torch.float32 if kind == "fp8" else torch.bfloat16)
        assert held.scales.flatten().tolist() == slow_scales(scales)


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_comes_back_as_it_was(shape: tuple[int, int]) -> None:
    source = normal(generator(1), *shape)
    held = packed(source, "bf16")
    assert torch.equal(held.dequantize(), source)
    assert torch.equal(held.dequantize(dtype=torch.float32), source.float())
    assert held.num_bytes == -(-shape[0] // 16) * 16 * shape[1] * 2
    for dtype in (torch.float32, torch.float16):
        held.load(source.to(dtype))
        assert torch.equal(held.dequantize(), source.to(dtype).bfloat16())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_codes_in_groups_come_back_exactly(kind: Kind, shape: tuple[int, int]) -> None:
    bits, group = 8 if kind == "int8" else 4, group_of(kind, shape[1])
    assert group is not None
    source = normal(generator(2), *shape)
    grouped = quantize_groups(source, bits, group)
    held = PackedWeight(*shape, kind, group=group)
    held.load(grouped)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(held.dequantize(dtype=dtype), dequantize_groups(grouped, dtype))
    from_floats = packed(source, kind, group)  # are quantised as `freehold quantize` does
    assert torch.equal(from_floats.codes, held.codes)
    assert torch.equal(from_floats.dequantize(), held.dequantize())
    panels = -(-shape[0] // 16) * 16
    assert held.num_bytes == panels * (shape[1] * bits // 8 + shape[1] // group * 2)


@pytest.mark.parametrize("shape", [*SHAPES, (300, 392)])
def test_fp8_blocks_come_back_exactly(shape: tuple[int, int]) -> None:
    source = blocks(generator(3), *shape)
    held = PackedWeight(*shape, "fp8")
    held.load(source)
    assert torch.equal(held.dequantize(dtype=torch.float32), floats_of(source))
    assert torch.equal(held.dequantize(), floats_of(source).bfloat16())
    floats = normal(generator(4), *shape)
    held.load(floats)
    assert torch.equal(held.dequantize(dtype=torch.float32), floats_of(BlockQuantized(*quantize_blocks(floats))))


@pytest.mark.parametrize("kind", KINDS)
def test_codes_of_another_kind_become_the_nearest_of_this(kind: Kind) -> None:
    """An FP8 checkpoint held as int8, an int4 one as FP8, and so on: from the dequantised floats, in fp32."""
    g = generator(5)
    fp8, int4 = blocks(g, 40, 192), quantize_groups(normal(g, 40, 192), 4, 64)
    int8 = quantize_groups(normal(g, 40, 192), 8, 32)  # both in groups that are not the kind's own
    sources: list[tuple[Kind, Source, Tensor]] = [
        ("fp8", fp8, floats_of(fp8)),
        ("int4", int4, dequantize_groups(int4, torch.float32)),
        ("int8", int8, dequantize_groups(int8, torch.float32)),
    ]
    for of, source, floats in sources:
        held, again = PackedWeight(40, 192, kind), PackedWeight(40, 192, kind)
        held.load(source)
        again.load(floats)
        if not of == kind == "fp8":  # which are kept, and not quantised again
            assert torch.equal(held.codes, again.codes)
        bound = {"bf16": 2**-8, "int8": 2**-6, "fp8": 2**-3, "int4": 2**-2}[kind] * float(floats.abs().max())
        assert float((held.dequantize(dtype=torch.float32) - floats).abs().max()) <= bound


@pytest.mark.parametrize("kind", KINDS)
def test_a_stack_is_loaded_part_by_part(kind: Kind) -> None:
    """As experts are: gate and up are halves of one matrix, each with codes and scales of its own."""
    g, width, hidden = generator(6), 48, 136
    group = group_of(kind, hidden)
    stack = PackedWeight(2 * width, hidden, kind, count=3, group=group)
    assert stack.shape == (3, 2 * width, hidden)
    assert PackedWeight(5, 8, "bf16").shape == (5, 8)
    parts = {(index, half): normal(g, width, hidden) for index in range(3) for half in (0, 1)}
    for index, half in [(2, 1), (0, 0), (1, 1), (2, 0), (0, 1), (1, 0)]:
        source = parts[index, half]
        stack.load(BlockQuantized(*quantize_blocks(source)) if kind == "fp8" else source, index, half * width)
    for index in range(3):
        expected = [packed(parts[index, half], kind, group).dequantize(dtype=torch.float32) for half in (0, 1)]
        assert torch.equal(stack.dequantize(index, torch.float32), torch.cat(expected))


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_rows_may_be_part_of_a_panel(kind: Kind) -> None:
    source, group = normal(generator(7), 45, 64), group_of(kind, 64)
    if kind == "fp8":  # one block, so that the parts have the scale of the whole
        source[0, 0] = source[32, 0] = 9.0
    held = PackedWeight(45, 64, kind, group=group)
    held.load(source[:32], 0, 0)
    held.load(source[32:], 0, 32)
    assert torch.equal(held.dequantize(), packed(source, kind, group).dequantize())
    for first, rows in ((8, 16), (0, 17), (16, 13), (32, 12)):
        with pytest.raises(ValueError, match="do not begin and end with panels"):
            held.load(source[:rows], 0, first)


@pytest.mark.parametrize("given", ["floats", "int8", "int4", "fp8"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_large_matrix_is_packed_some_rows_at_a_time(kind: Kind, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights, and little memory on the way: none of it grows with the matrix."""
    floats = torch.randn(1000, 256, generator=generator(2)).bfloat16()
    source: Source = floats
    if given == "fp8":
        source = BlockQuantized(*quantize_blocks(floats))
    elif given != "floats":
        source = quantize_groups(floats, 8 if given == "int8" else 4, 32)
    held = []
    for band in (1 << 30, 1 << 15):  # all, and 128 rows
        monkeypatch.setattr(packed_module, "_BAND", band)
        held.append(PackedWeight(1000, 256, kind))
        held[-1].load(source)
    assert torch.equal(held[0].codes, held[1].codes)
    assert held[0].scales is None or torch.equal(held[0].scales, held[1].scales)  # type: ignore[arg-type]


MEASURE = """
import sys
import torch
from freehold.model.packed import PackedWeight
from tests.private_memory import Peak

source, held = torch.ones(32_000, 1024, dtype=torch.bfloat16), PackedWeight(32_000, 1024, sys.argv[1])
held.codes.zero_()
if held.scales is not None:
    held.scales.zero_()
with Peak() as peak:
    held.load(source)
print(peak.bytes)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("kind", KINDS)
def test_packing_takes_little_memory(kind: Kind) -> None:
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, kind], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 40_000_000  # the matrix has 66 MB, in fp32 131 MB


@pytest.mark.parametrize(
    ("kind", "inner", "group"),
    [("bf16", 12, None), ("fp8", 4, None), ("int8", 96, None), ("int4", 48, None), ("int8", 64, 12), ("int4", 64, 48)],
)
def test_sizes_that_cannot_be_packed_are_refused(kind: Kind, inner: int, group: int | None) -> None:
    with pytest.raises(ValueError, match=f"{inner} inputs cannot be packed as {kind}"):
        PackedWeight(16, inner, kind, group=group)


def test_default_groups() -> None:
    assert [default_group(kind, 640) for kind in KINDS] == [640, 64, 32, 128]


# (nope, v): GLM-5.2's heads of 448 rows, 3.5 blocks each; 7 · 64; 2.5 blocks; small heads; group of 8.
HEADS = [(192, 256), (64, 384), (192, 128), (32, 32), (24, 32)]


def heads_of(count: int, nope: int, value: int, rank: int, kind: Kind, group: int | None) -> PackedHeads:
    key = PackedWeight(rank, nope, kind, count=count, group=group)
    return PackedHeads(key, PackedWeight(value, rank, kind, count=count, group=group_of(kind, rank)))


@pytest.mark.parametrize("rank", [512, 72])
@pytest.mark.parametrize(("nope", "value"), HEADS)
def test_fp8_heads_whose_blocks_straddle_them_are_exact(nope: int, value: int, rank: int) -> None:
    group = fp8_group(nope + value, nope)
    assert group is not None
    count = 5
    source = blocks(generator(nope), count * (nope + value), rank)
    assert (nope + value) % 128, "blocks of a scale cross from one head to the next"
    held = heads_of(count, nope, value, rank, "fp8", group)
    held.load(source)
    assert torch.equal(held.dequantize(torch.float32), floats_of(source))
    assert held.num_bytes == held.up_key.num_bytes + held.up_value.num_bytes
    floats = normal(generator(8), count * (nope + value), rank)
    held.load(floats)  # gets the codes that a checkpoint written as FP8 has
    assert torch.equal(held.dequantize(torch.float32), floats_of(BlockQuantized(*quantize_blocks(floats))))


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
def test_heads_of_other_kinds(kind: Kind) -> None:
    nope, value, rank, count = 32, 20, 64, 3
    kv_b = normal(generator(9), count * (nope + value), rank)
    held = heads_of(count, nope, value, rank, kind, group_of(kind, nope))
    held.load(kv_b)
    by_head = kv_b.view(count, nope + value, rank)
    for head in range(count):
        key = packed(by_head[head, :nope].T.contiguous(), kind, group_of(kind, nope)).dequantize()
        assert torch.equal(held.up_key.dequantize(head), key)  # W_UK transposed, its groups along the head's dims
        rows = held.dequantize().view(count, nope + value, rank)[head]
        assert torch.equal(rows[:nope], key.T)
        assert torch.equal(rows[nope:], packed(by_head[head, nope:], kind, group_of(kind, rank)).dequantize())
    if kind == "bf16":
        assert torch.equal(held.dequantize(), kv_b)


@pytest.mark.parametrize(
    ("head_rows", "nope", "group"), [(448, 192, 64), (256, 128, 128), (320, 192, 64), (56, 24, 8), (68, 32, None)]
)
def test_the_group_of_fp8_heads(head_rows: int, nope: int, group: int | None) -> None:
    assert fp8_group(head_rows, nope) == group


def test_a_group_of_zeros_stays_zeros() -> None:
    source = torch.zeros(20, 64)
    for kind in KINDS:
        assert torch.equal(packed(source, kind).dequantize(), source.bfloat16())


def test_the_padding_of_a_panel_is_zeros() -> None:
    for kind in KINDS:
        held = packed(torch.ones(17, 64), kind)
        whole = PackedWeight(32, 64, kind, group=group_of(kind, 64))
        whole.codes, whole.scales = held.codes, held.scales
        assert torch.equal(whole.dequantize()[17:], torch.zeros(15, 64).bfloat16())


def test_a_grouped_source_with_other_bits_is_not_taken_for_this_kind() -> None:
    grouped = GroupQuantized(torch.full((16, 64), 100, dtype=torch.int8), torch.ones(16, 2).bfloat16(), 8, 32)
    held = PackedWeight(16, 64, "int4")
    held.load(grouped)
    assert float((held.dequantize().float() - 100).abs().max()) < 1
