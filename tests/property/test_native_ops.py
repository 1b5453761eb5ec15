"""Native kernels against their plain PyTorch twins over random shapes, strides, dtypes, NaN and infinities."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from freehold.model.group_quant import GroupQuantized
from freehold.model.inputs import Span
from freehold.model.ops.native import NativeOps
from freehold.model.ops.reference import ReferenceOps
from freehold.model.packed import KINDS, Kind, PackedWeight
from freehold.model.quant import BlockQuantized
from freehold.model.storage_fp8 import scale_shape
from tests.native_cases import (
    SUPPORTED,
    assert_close,
    assert_product,
    generator,
    native,
    needs_native,
    packed,
    packed_heads,
    terms_of,
    twin_weight,
)

pytestmark = needs_native
REFERENCE = ReferenceOps()

ROWS = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 13, 15, 16, 17, 18, 33])
SIZES = st.integers(1, 150)
INNER = st.integers(1, 38).map(lambda chunks: 8 * chunks)  # beyond two FP8 groups; the last is often ragged
WIDTHS = st.integers(1, 9).map(lambda panels: 16 * panels)
# Not together: a kernel may take a denormal for 0, and infinity times the one is not infinity times the other.
NOT_FINITE = [float("nan"), float("inf"), float("-inf"), 0.0, -0.0]
DENORMAL = [1e-39, -1e-40, 0.0, -0.0]


KIND = st.sampled_from(KINDS)


@st.composite
def weights(draw: st.DrawFn, kind: Kind, outputs: int, inner: int, count: int = 1) -> PackedWeight:
    """Random weights, a group's scale a power of two off its neighbours' now and then; int groups of any size."""
    group = None
    if kind in ("int8", "int4"):
        group = draw(st.sampled_from([group for group in range(8, inner + 1, 8) if inner % group == 0]))
    g = generator(draw(st.integers(0, 2**31)))
    values = torch.randn(count, outputs, inner, generator=g)
    values *= 2.0 ** torch.randint(-3, 4, (count, outputs, inner // 8), generator=g).repeat_interleave(8, 2)
    if draw(st.booleans()):
        values[:, :, : inner // 2] = 0  # whole groups of zeros
    return packed(values.bfloat16(), kind, group)


@st.composite
def kernels(draw: st.DrawFn) -> NativeOps:
    return native(draw(st.sampled_from(SUPPORTED)), draw(st.sampled_from([1, 2])))


class Maker:
    """Random tensors: sometimes views with padded rows, sometimes with a strided last dimension, sometimes with
    special values."""

    def __init__(self, seed: int, layout: int, specials: list[float]) -> None:
        self.g, self.layout, self.specials = generator(seed), layout, specials

    def __call__(self, *shape: int, special: bool = True, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        if self.layout == 0:
            x = torch.randn(*shape, generator=self.g).to(dtype)
        elif self.layout == 1:  # rows of a wider matrix
            x = torch.randn(*shape[:-1], shape[-1] + 3, generator=self.g).to(dtype)[..., 1 : shape[-1] + 1]
        else:  # every other value
            x = torch.randn(*shape[:-1], 2 * shape[-1], generator=self.g).to(dtype)[..., ::2]
        if special:
            for value in self.specials:
                place = tuple(int(torch.randint(0, n, (1,), generator=self.g)) for n in shape)
                x[place] = value
        return x


MAKERS = st.builds(Maker, st.integers(0, 2**31), st.integers(0, 2), st.sampled_from([[], NOT_FINITE, DENORMAL]))


def both(ops: NativeOps, name: str, *arguments: Any, scale: float | None = None, **named: Any) -> None:
    with torch.inference_mode():
        actual, expected = getattr(ops, name)(*arguments, **named), getattr(REFERENCE, name)(*arguments, **named)
    assert actual.dtype == expected.dtype
    assert_close(actual, expected, scale=scale)


@given(kernels(), MAKERS, ROWS, INNER, SIZES, st.booleans(), KIND, st.data())
def test_linear(
    ops: NativeOps, make: Maker, rows: int, inner: int, outputs: int, with_bias: bool, kind: Kind, data: st.DataObject
) -> None:
    x, weight = make(rows, inner), data.draw(weights(kind, outputs, inner))
    bias = make(outputs).contiguous() if with_bias else None
    twin = twin_weight(weight)
    with torch.inference_mode():
        exact, terms = F.linear(x.float(), twin), terms_of(x, twin)
        assert_product(ops.linear_fp32(x, weight), exact, terms)
        if bias is not None:
            exact, terms = exact + bias.float(), terms + 4.0
        assert_product(ops.linear(x, weight, bias), exact, terms)


@given(kernels(), MAKERS, ROWS, SIZES, st.booleans(), st.floats(1e-6, 1e-2))
def test_norms(ops: NativeOps, make: Maker, rows: int, size: int, layer: bool, eps: float) -> None:
    x, weight, bias = make(rows, size), make(size).contiguous(), make(size).contiguous()
    if layer:
        # The variance of one value is 0, and any rounding of its mean is blown up by 1/sqrt(eps).
        both(ops, "layer_norm", x, weight, bias, eps, scale=10.0 if size > 1 else 1e3)
    else:
        both(ops, "rms_norm", x, weight, eps, scale=10.0)


@given(kernels(), MAKERS, ROWS, st.integers(1, 9), st.integers(1, 40), st.integers(0, 20), st.integers(0, 20))
def test_rope(ops: NativeOps, make: Maker, rows: int, heads: int, pairs: int, first: int, after: int) -> None:
    x = make(rows, heads, first + 2 * pairs + after)
    angles = torch.rand(rows, pairs, generator=make.g) * 6
    for interleaved in (True, False):
        both(ops, "rope", x, angles.cos(), angles.sin(), interleaved, first, scale=4.0)


@given(kernels(), MAKERS, ROWS, st.integers(1, 70), st.integers(0, 30), st.integers(1, 12), st.booleans())
def test_write_cache(
    ops: NativeOps, make: Maker, rows: int, normed: int, rest: int, pairs: int, with_bias: bool
) -> None:
    size = max(normed + rest, 2 * pairs)
    x, weight = make(rows, size), make(min(normed, size)).contiguous()
    bias = make(weight.shape[0]).contiguous() if with_bias else None
    angles = torch.rand(rows, pairs, generator=make.g)
    slots = torch.randperm(rows + 20, generator=make.g)[:rows]
    caches = [torch.zeros(rows + 20, size, dtype=torch.bfloat16) for _ in range(2)]
    first = (size - 2 * pairs) // 2
    for twin, cache in zip((ops, REFERENCE), caches, strict=True):
        twin.write_cache(x, weight, bias, 1e-3, angles.cos(), angles.sin(), True, first, cache, slots)
    assert_close(caches[0], caches[1], scale=100.0 if with_bias and weight.shape[0] < 3 else 10.0)


def gated(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, float]:
    """(the MLP in fp32 with its activations in bf16, what rounding errors are relative to: sums without cancellation).

    A gate and an up value are sums too, and their errors reach the activation by the slopes of silu and product.
    """
    x = x.float()
    g, u = x @ gate.T, x @ up.T
    exact = (F.silu(g) * u).bfloat16().float() @ down.T
    size = (F.silu(g).abs() + 1e-2) * (u.abs() + 1e-2)
    return exact, terms_of(size, down)


@given(kernels(), MAKERS, ROWS, INNER, SIZES.map(lambda n: 8 * (n // 8 + 1)), KIND, KIND, st.data())
def test_swiglu(
    ops: NativeOps, make: Maker, rows: int, hidden: int, width: int, kind: Kind, last: Kind, data: st.DataObject
) -> None:
    """The two first matrices are of one kind, the last of its own: as checkpoints mix them."""
    x = make(rows, hidden)
    gate, up = (data.draw(weights(kind, width, hidden)) for _ in range(2))
    down = data.draw(weights(last, hidden, width))
    with torch.inference_mode():
        exact, terms = gated(x, *(twin_weight(weight) for weight in (gate, up, down)))
        assert_close(ops.swiglu(x, gate, up, down), exact, scale=terms)


@given(kernels(), MAKERS, ROWS, INNER, WIDTHS, KIND, KIND, st.data())
def test_experts(
    ops: NativeOps, make: Maker, rows: int, hidden: int, width: int, kind: Kind, last: Kind, data: st.DataObject
) -> None:
    experts = data.draw(st.integers(1, 8))
    chosen = data.draw(st.integers(1, experts))
    x = make(rows, hidden)
    gate_up, down = (
        data.draw(weights(kind, 2 * width, hidden, experts)),
        data.draw(weights(last, hidden, width, experts)),
    )
    ids = torch.stack([torch.randperm(experts, generator=make.g)[:chosen] for _ in range(rows)])
    mix = torch.rand(rows, chosen, generator=make.g)
    with torch.inference_mode():
        exact, terms = torch.zeros(rows, hidden), 0.0
        for expert in range(experts):
            gate, up = twin_weight(gate_up, expert).chunk(2)
            out, size = gated(x, gate, up, twin_weight(down, expert))
            exact += torch.where(ids == expert, mix, 0.0).sum(-1, keepdim=True) * out.where(
                (ids == expert).any(-1, keepdim=True), 0.0
            )
            terms += size
        assert_close(ops.experts(x, ids, mix, gate_up, down), exact, scale=terms)


def whole_numbers(values: Tensor, kind: Kind) -> PackedWeight:
    """Small integers [O, I], each its own code, with scales of 1."""
    outputs, inner = values.shape
    weight = PackedWeight(outputs, inner, kind, group=None if kind in ("bf16", "fp8") else 8)
    if kind in ("int8", "int4"):
        scale = torch.ones(outputs, inner // 8).bfloat16()
        weight.load(GroupQuantized(values.to(torch.int8), scale, 8 if kind == "int8" else 4, 8))
    elif kind == "fp8":
        scale = torch.ones(scale_shape((outputs, inner)))
        weight.load(BlockQuantized(values.float().to(torch.float8_e4m3fn), scale))
    else:
        weight.load(values.bfloat16())
    return weight


@given(kernels(), MAKERS, ROWS, INNER, KIND, st.data())
def test_route(ops: NativeOps, make: Maker, rows: int, hidden: int, kind: Kind, data: st.DataObject) -> None:
    experts = data.draw(st.integers(1, 60))
    top_k = data.draw(st.integers(1, min(experts, 9)))
    # Whole numbers: scores are exact, so the choice has to be the same, ties included.
    x = torch.randint(-2, 3, (rows, hidden), generator=make.g).bfloat16()
    weight = whole_numbers(torch.randint(-1, 2, (experts, hidden), generator=make.g), kind)
    bias = torch.zeros(experts)
    named = {"top_k": top_k, "n_group": 1, "topk_group": 1, "normalise": data.draw(st.booleans()), "scale": 2.5}
    ids, mix = ops.route(x, weight, bias, **named)
    expected_ids, expected = REFERENCE.route(x, weight, bias, **named)
    order, expected_order = ids.argsort(-1), expected_ids.argsort(-1)
    logits = x.float() @ weight.dequantize(dtype=torch.float32).T
    # A sigmoid rounds distinct large logits to one value, in its own way; what is chosen must be as good.
    assert_close(logits.gather(1, ids).clamp(-12, 12).sum(-1), logits.gather(1, expected_ids).clamp(-12, 12).sum(-1))
    if torch.equal(ids.gather(1, order), expected_ids.gather(1, expected_order)):
        assert_close(mix.gather(1, order), expected.gather(1, expected_order), tolerance=1e-5)


CHUNKS = st.integers(1, 12).map(lambda chunks: 8 * chunks)


@given(kernels(), MAKERS, ROWS, st.integers(1, 9), CHUNKS, st.integers(0, 20), CHUNKS, st.integers(1, 50), KIND)
def test_absorb_and_unabsorb(
    ops: NativeOps, make: Maker, rows: int, heads: int, nope: int, rope: int, rank: int, value: int, kind: Kind
) -> None:
    query, mixed = make(rows, heads, nope + rope), make(rows, heads, rank)
    kv_b = packed_heads(torch.randn(heads * (nope + value), rank, generator=make.g).bfloat16(), heads, nope, kind)
    twin = twin_weight(kv_b).view(heads, nope + value, rank)
    with torch.inference_mode():
        absorbed, values = ops.absorb(query, kv_b, nope), ops.unabsorb(mixed, kv_b, nope)
        assert torch.equal(absorbed[..., rank:].nan_to_num(7), query[..., nope:].nan_to_num(7))
        for head in range(heads):
            x, weight = query[:, head, :nope].float(), twin[head, :nope].T
            assert_product(absorbed[:, head, :rank], x @ weight.T, terms_of(x, weight))
            x, weight = mixed[:, head].float(), twin[head, nope:]
            assert_product(values[:, head], x @ weight.T, terms_of(x, weight))


@given(kernels(), MAKERS, st.integers(1, 40), st.integers(0, 60), st.integers(1, 5), CHUNKS, CHUNKS, KIND)
def test_dense_attention(
    ops: NativeOps, make: Maker, length: int, start: int, heads: int, nope: int, rank: int, kind: Kind
) -> None:
    rope, value, block_size = 6, 11, 8
    query, latent = make(length + 3, heads, nope + rope), make(160, rank + rope, special=False)
    kv_b = packed_heads(torch.randn(heads * (nope + value), rank, generator=make.g).bfloat16() / 8, heads, nope, kind)
    span = Span(2, length, start, torch.randperm(160 // block_size, generator=make.g))
    scale = 0.3 / (nope + rope) ** 0.5
    with torch.inference_mode():
        named = (kv_b, span, block_size, nope, scale)
        expected = REFERENCE.dense_attention(query.float(), latent.float(), *named)
        # A finite softmax weight of infinity differs by the form; where the query is finite it must be near.
        finite = query[2 : 2 + length].isfinite().all(-1)
        actual = ops.dense_attention(query, latent, *named)
    assert_close(
        actual[finite], expected[finite], scale=float(expected[finite].abs().max()) + 0.5 if finite.any() else 1
    )


@given(kernels(), MAKERS, ROWS, st.integers(1, 20), st.integers(1, 100), st.integers(0, 40), st.integers(1, 200))
def test_sparse_attention(ops: NativeOps, make: Maker, rows: int, heads: int, rank: int, rope: int, count: int) -> None:
    query, latent = make(rows, heads, rank + rope), make(count + 30, rank + rope)
    slots = torch.stack([torch.randperm(count + 30, generator=make.g)[:count] for _ in range(rows)])
    for row in range(rows):  # rows of different lengths
        slots[row, int(torch.randint(1, count + 1, (1,), generator=make.g)) :] = -1
    both(ops, "sparse_attention", query, latent, slots, rank, 0.3 / (rank + rope) ** 0.5, scale=4.0)


@settings(max_examples=150)
@given(kernels(), MAKERS, st.data())
def test_select(ops: NativeOps, make: Maker, data: st.DataObject) -> None:
    block_size, heads = data.draw(st.sampled_from([1, 3, 16, 64])), data.draw(st.integers(1, 9))
    dim, topk = 2 * data.draw(st.integers(1, 40)), data.draw(st.integers(1, 200))
    spans, row = [], 0
    for _ in range(data.draw(st.integers(1, 3))):
        start, length = data.draw(st.integers(0, 400)), data.draw(st.sampled_from([1, 1, 2, 16, 17, 90]))
        blocks = (start + length + block_size - 1) // block_size
        spans.append(Span(row, length, start, torch.randperm(600, generator=make.g)[:blocks]))
        row += length
    values = data.draw(st.integers(1, 3))
    keys = torch.randint(-values, values + 1, (600 * block_size, dim), generator=make.g).bfloat16()
    query = torch.randint(-values, values + 1, (row, heads, dim), generator=make.g).bfloat16()
    weight = torch.randint(-2, 3, (row, heads), generator=make.g).float()
    for i, value in enumerate(make.specials):
        keys[int(torch.randint(0, keys.shape[0], (1,), generator=make.g)), i % dim] = value
    chosen = ops.select(query, weight, keys, tuple(spans), block_size, topk)
    expected = REFERENCE.select(query, weight, keys, tuple(spans), block_size, topk)
    assert torch.equal(chosen.sort(-1).values, expected.sort(-1).values)
