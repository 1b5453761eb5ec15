"""Weights as the native kernels hold them: panels of 16 outputs, in bf16, int8, int4 or FP8.

The layout is that of `native/matrix.h`: one vector register holds an input pair of 16 outputs, so a product reads a
panel as one stream and sums nothing across lanes. Codes of 8 and 4 bits have a bf16 scale for each group of inputs of
an output; FP8 keeps the fp32 scales of its blocks. A weight is packed as it is loaded, so it is in memory once.

Shape suffixes: M matrices of a stack, O outputs, I inputs, P panels, G groups of inputs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from freehold.model.group_quant import GroupQuantized, dequantize_groups, quantize_groups
from freehold.model.quant import BlockQuantized, dequantize_blocks, quantize_blocks
from freehold.model.storage_fp8 import BLOCK
from freehold.model.storage_groups import GROUP_SIZE

Kind = Literal["bf16", "int8", "int4", "fp8"]
KINDS: tuple[Kind, ...] = ("bf16", "int8", "int4", "fp8")
"""In the order of Kind in native/matrix.h."""

PANEL = 16
CHUNK = 8
"""Inputs that codes of 4 bits are interleaved over; inner sizes are multiples of it."""

GROUPS: Mapping[str, int] = {"int8": GROUP_SIZE[8], "int4": GROUP_SIZE[4]}
"""Inputs that share a scale, where codes are integers."""

_BAND = 1 << 20  # weights packed at a time: the copies on the way are of these, not of a whole matrix

_BITS = {"bf16": 16, "int8": 8, "int4": 4, "fp8": 8}

Source = Tensor | GroupQuantized | BlockQuantized
"""What a weight can be loaded from: floats, or codes with scales as checkpoints store them."""


class _Matrix(ctypes.Structure):
    """`Matrix` of native/matrix.h."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("outputs", ctypes.c_int64),
        ("inner", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("kind", ctypes.c_int64),
        ("paged", ctypes.c_void_p),
    )


class PackedWeight(nn.Module):
    """`count` matrices [outputs, inner] of one kind, packed. Uninitialised until `load`.

    group: inputs that share a scale, a multiple of 8; default that of the kind. Raises ValueError if inner is not a
    multiple of 8, or of the group for int8 and int4.
    """

    codes: Tensor  # uint8 [M * P, bytes of a panel]
    scales: Tensor | None  # [M * P, G, 16], bf16, or fp32 for fp8

    def __init__(self, outputs: int, inner: int, kind: Kind, *, count: int = 1, group: int | None = None) -> None:
        super().__init__()
        self.outputs, self.inner, self.kind, self.count = outputs, inner, kind, count
        self.group = default_group(kind, inner) if group is None else group
        if inner % CHUNK or self.group % CHUNK or (kind in GROUPS and inner % self.group):
            raise ValueError(f"{inner} inputs cannot be packed as {kind} in groups of {self.group}")
        self.panels = -(-outputs // PANEL)
        self.panel_bytes = inner * PANEL * _BITS[kind] // 8
        self._hold()

    def _hold(self, codes: Tensor | None = None, scales: Tensor | None = None) -> None:
        """Take these as what is held; new memory for what is None."""
        panels = self.count * self.panels
        self.codes = torch.empty(panels, self.panel_bytes, dtype=torch.uint8) if codes is None else codes
        if scales is None and self.kind != "bf16":
            scales = torch.empty(panels, -(-self.inner // self.group), PANEL, dtype=self.scale_dtype)
        self.scales = scales
        self._describe(self.codes.data_ptr(), None if scales is None else scales.data_ptr(), None)

    def _describe(self, codes: int | None, scales: int | None, paged: int | None) -> None:
        """Make the C struct, of addresses."""
        self._matrix = _Matrix(codes, scales, self.outputs, self.inner, self.group, KINDS.index(self.kind), paged)
        self.handle = ctypes.addressof(self._matrix)
        """Address of the C struct, valid as long as this object."""

    @property
    def scale_dtype(self) -> torch.dtype:
        return torch.float32 if self.kind == "fp8" else torch.bfloat16

    def wants(self, index: int, first: int) -> bool:
        """Whether rows first .. of matrix `index` are still to be loaded."""
        return True

    @property
    def shape(self) -> tuple[int, ...]:
        """(O, I), or (M, O, I) for a stack."""
        return (self.outputs, self.inner) if self.count == 1 else (self.count, self.outputs, self.inner)

    def like(self, other: PackedWeight) -> bool:
        """Whether both are held alike: the kernels read such a pair, a gate and an up matrix, together."""
        return (self.kind, self.group, self.shape) == (other.kind, other.group, other.shape)

    @property
    def num_bytes(self) -> int:
        scales = 0 if self.scales is None else self.scales.numel() * self.scales.element_size()
        return self.codes.numel() + scales

    @torch.no_grad()
    def load(self, source: Source, index: int = 0, first: int = 0, *, name: str = "weight") -> None:
        """Rows first .. of matrix `index` ← source [rows, I]. first is a multiple of 16, and so are the rows unless
        they are the last. Floats are quantised on the way; codes of another kind are dequantised first.

        Raises CheckpointError, with the name, for NaN or infinity where it is to be quantised.
        """
        rows, step = source.shape[0], max(1, _BAND // (BLOCK * self.inner)) * BLOCK
        if first % PANEL or (rows % PANEL and first + rows != self.outputs):
            raise ValueError(f"rows {first} to {first + rows} do not begin and end with panels")
        if rows > step:
            for start in range(0, rows, step):
                self.load(_rows(source, start, min(start + step, rows)), index, first + start, name=name)
            return
        start = index * self.panels + first // PANEL
        stop = start + -(-rows // PANEL)
        if self.kind == "bf16":
            self.codes[start:stop] = _pairs(_floats(source)).view(torch.uint8).view(stop - start, -1)
            return
        self._put(start, *self._codes(source, name))

    def _codes(self, source: Source, name: str) -> tuple[Tensor, Tensor]:
        """(codes [O, I] of one byte, scales [O, G]) of this weight's kind and group."""
        if self.kind == "fp8":
            if isinstance(source, Tensor):
                source = BlockQuantized(*quantize_blocks(source, name=name))
            elif isinstance(source, GroupQuantized):
                source = BlockQuantized(*quantize_blocks(dequantize_groups(source, torch.float32)))
            return source.weight_OI.view(torch.uint8), _row_scales(source, self.group)
        if not (isinstance(source, GroupQuantized) and source.bits == _BITS[self.kind] and source.group == self.group):
            source = quantize_groups(_floats(source, torch.float32), _BITS[self.kind], self.group, name=name)
        return source.codes_OI, source.scale_OG

    @torch.no_grad()
    def load_codes(self, codes_OI: Tensor, scale_OG: Tensor, index: int) -> None:
        """FP8 bytes [O, I] and a scale for each of their groups [O, G] into matrix `index`."""
        assert self.kind == "fp8"
        self._put(index * self.panels, codes_OI, scale_OG)

    def _put(self, start: int, codes_OI: Tensor, scale_OG: Tensor) -> None:
        """Panels start .. ← codes of one byte with the scales of their groups."""
        assert self.scales is not None
        rows, groups = scale_OG.shape
        stop = start + -(-rows // PANEL)
        pack = _nibbles if self.kind == "int4" else _pairs
        self.codes[start:stop] = pack(codes_OI).view(torch.uint8).view(stop - start, -1)
        self.scales[start:stop] = _padded(scale_OG).view(-1, PANEL, groups).transpose(1, 2)

    def dequantize(self, index: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Matrix `index` as floats [O, I]: what every kernel computes with, for the plain twin of the kernels."""
        codes = self.codes[index * self.panels : (index + 1) * self.panels]
        if self.kind == "bf16":
            return _from_pairs(codes.view(torch.bfloat16), self.inner)[: self.outputs].to(dtype)
        assert self.scales is not None
        if self.kind == "int4":
            values = _from_nibbles(codes.view(torch.int16), self.inner).float()
        elif self.kind == "int8":
            values = _from_pairs(codes.view(torch.int8), self.inner).float()
        else:
            values = _from_pairs(codes, self.inner).view(torch.float8_e4m3fn).float()
        scales = self.scales[index * self.panels : (index + 1) * self.panels].float()
        scale_OI = scales.transpose(1, 2).flatten(0, 1).repeat_interleave(self.group, dim=1)[:, : self.inner]
        return (values * scale_OI)[: self.outputs].to(dtype)


class PackedHeads(nn.Module):
    """The two halves of kv_b, for the absorbed form: stacks of one matrix a head.

    up_key: [N, V, C] = W_UK transposed (C = nope); up_value: [N, O, V] = W_UV.
    """

    def __init__(self, up_key: PackedWeight, up_value: PackedWeight) -> None:
        super().__init__()
        self.up_key, self.up_value = up_key, up_value

    @property
    def num_bytes(self) -> int:
        return self.up_key.num_bytes + self.up_value.num_bytes

    @torch.no_grad()
    def load(self, source: Source, *, name: str = "weight") -> None:
        """source: kv_b [N * (nope + v), V], for each head its rows of W_UK and then those of W_UV. See
        `PackedWeight.load`."""
        heads, nope, value = self.up_key.count, self.up_key.inner, self.up_value.outputs
        if self.up_key.kind == "fp8":
            # Quantised whole, as checkpoints are: the blocks of a scale straddle heads.
            if not isinstance(source, BlockQuantized):
                source = BlockQuantized(*quantize_blocks(_floats(source, torch.float32), name=name))
            codes = source.weight_OI.view(torch.uint8).view(heads, nope + value, -1)
            scale = _row_scales(source, 1).view(heads, nope + value, -1)
            group = self.up_key.group
            for head in range(heads):
                # Along W_UK's rows a scale holds for a whole group: `fp8_group` chose the group so.
                key_scale = scale[head, :nope:group].T
                self.up_key.load_codes(codes[head, :nope].T.contiguous(), key_scale, head)
                self.up_value.load_codes(
                    codes[head, nope:].contiguous(), scale[head, nope:, :: self.up_value.group], head
                )
            return
        floats = _floats(source).view(heads, nope + value, -1)
        for head in range(heads):
            self.up_key.load(floats[head, :nope].T.contiguous(), head, name=name)
            self.up_value.load(floats[head, nope:], head, name=name)

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """kv_b [N * (nope + v), V]."""
        parts = []
        for head in range(self.up_key.count):
            parts += [self.up_key.dequantize(head, dtype).T, self.up_value.dequantize(head, dtype)]
        return torch.cat(parts)


def default_group(kind: Kind, inner: int) -> int:
    """Inputs that share a scale."""
    return {"bf16": inner, "fp8": BLOCK, **GROUPS}[kind]


def fp8_group(head_rows: int, nope: int) -> int | None:
    """The largest group of W_UK's rows that no block of kv_b's scales divides, None if there is none."""
    for group in (128, 64, 32, 16, CHUNK):
        if head_rows % group == 0 and nope % group == 0:
            return group
    return None


def _rows(source: Source, start: int, stop: int) -> Source:
    """Some rows of a source; start is a multiple of a block's rows."""
    match source:
        case Tensor():
            return source[start:stop]
        case GroupQuantized(codes_OI, scale_OG, bits, group):
            return GroupQuantized(codes_OI[start:stop], scale_OG[start:stop], bits, group)
        case BlockQuantized(weight_OI, scale_RC):
            return BlockQuantized(weight_OI[start:stop], scale_RC[start // BLOCK : -(-stop // BLOCK)])


def _floats(source: Source, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    if isinstance(source, Tensor):
        return source.to(dtype)
    if isinstance(source, GroupQuantized):
        return dequantize_groups(source, dtype)
    out = torch.empty(source.weight_OI.shape, dtype=dtype)
    dequantize_blocks(source.weight_OI, source.scale_RC, out)
    return out


def _row_scales(source: BlockQuantized, group: int) -> Tensor:
    """The scale of each group of each row: fp32 [O, I / group]; group divides 128."""
    rows, columns = source.weight_OI.shape
    scale = source.scale_RC.repeat_interleave(BLOCK, dim=0)[:rows]
    return scale.repeat_interleave(BLOCK // group, dim=1)[:, : -(-columns // group)]


def _padded(values_OI: Tensor) -> Tensor:
    """With rows of zeros up to whole panels."""
    missing = -values_OI.shape[0] % PANEL
    if missing == 0:
        return values_OI.contiguous()
    return torch.cat((values_OI, values_OI.new_zeros(missing, values_OI.shape[1])))


_PAIR = {1: torch.int16, 2: torch.int32}


def _pairs(values_OI: Tensor) -> Tensor:
    """[O, I] → [P, I/2, 16, 2], as pairs of one integer each: [P, I/2, 16]."""
    pairs = _padded(values_OI).view(_PAIR[values_OI.element_size()])
    return pairs.view(-1, PANEL, pairs.shape[1]).transpose(1, 2).contiguous()


def _from_pairs(packed: Tensor, inner: int) -> Tensor:
    """[P, I/2 * 16 * 2] → [P * 16, I]."""
    return packed.view(-1, inner // 2, PANEL, 2).transpose(1, 2).reshape(-1, inner)


def _nibbles(codes_OI: Tensor) -> Tensor:
    """Codes -8 .. 7 [O, I] → 16-bit words [P, I/8, 16, 2], input pair j in bits 4j .. 4j + 3."""
    codes = _padded(codes_OI).to(torch.int32).add_(8)
    split = codes.view(-1, PANEL, codes.shape[1] // CHUNK, 4, 2).permute(0, 2, 1, 4, 3)
    shifts = torch.tensor([0, 4, 8, 12], dtype=torch.int32)
    return (split << shifts).sum(-1).to(torch.int16)


def _from_nibbles(words: Tensor, inner: int) -> Tensor:
    """[P, I/8 * 16 * 2] → int32 codes [P * 16, I]."""
    words = words.view(-1, inner // CHUNK, PANEL, 2).to(torch.int32)
    split = torch.stack([(words >> shift) & 15 for shift in (0, 4, 8, 12)], dim=-1) - 8  # [P, C, 16, 2, 4]
    return split.permute(0, 2, 1, 4, 3).reshape(-1, inner)
