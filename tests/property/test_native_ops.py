"""Native kernels against their plain PyTorch twins over random shapes, strides, dtypes, NaN and infinities."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from freehold.model.inputs import Span
from freehold.model.ops.native import NativeOps
from freehold.model.ops.reference import ReferenceOps
from tests.native_cases import SUPPORTED, assert_close, generator, native, needs_native

pytestmark = needs_native
REFERENCE = ReferenceOps()

ROWS = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 13, 16, 17, 33])
SIZES = st.integers(1, 150)
# Not together: a kernel may take a denormal for 0, and infinity times the one is not infinity times the other.
NOT_FINITE = [float("nan"), float("inf"), float("-inf"), 0.0, -0.0]
DENORMAL = [1e-39, -1e-40, 0.0, -0.0]


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


@given(kernels(), MAKERS, ROWS, SIZES, SIZES, st.booleans(), st.sampled_from([torch.bfloat16, torch.float32]))
def test_linear(
    ops: NativeOps, make: Maker, rows: int, inner: int, outputs: int, with_bias: bool, dtype: torch.dtype
) -> None:
    x, weight = make(rows, inner, dtype=dtype), make(outputs, inner, dtype=dtype)
    bias = make(outputs, dtype=dtype).contiguous() if with_bias else None
    scale = float(inner) ** 0.5 + 3
    both(ops, "linear", x, weight, bias, scale=scale)
    both(ops, "linear_fp32", x, weight, scale=scale)


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


def size_of_terms(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> float:
    """What rounding errors of an MLP are relative to: its sum without cancellation."""
    x = x.float().nan_to_num(0, 0, 0)
    act = F.silu(x @ gate.float().T) * (x @ up.float().T)
    return float((act.abs() @ down.float().nan_to_num(0, 0, 0).abs().T).max())


@given(kernels(), MAKERS, ROWS, SIZES, SIZES)
def test_swiglu(ops: NativeOps, make: Maker, rows: int, hidden: int, width: int) -> None:
    x, down = make(rows, hidden), make(hidden, width)
    gate, up = make(width, hidden, special=False), make(width, hidden, special=False)
    both(ops, "swiglu", x, gate, up, down, scale=size_of_terms(x, gate, up, down))


@given(kernels(), MAKERS, ROWS, st.integers(1, 100), st.integers(1, 70), st.data())
def test_experts(ops: NativeOps, make: Maker, rows: int, hidden: int, width: int, data: st.DataObject) -> None:
    experts = data.draw(st.integers(1, 12))
    chosen = data.draw(st.integers(1, experts))
    x = make(rows, hidden)
    gate_up = torch.randn(experts, 2 * width, hidden, generator=make.g).bfloat16()
    down = torch.randn(experts, hidden, width, generator=make.g).bfloat16()
    ids = torch.stack([torch.randperm(experts, generator=make.g)[:chosen] for _ in range(rows)])
    weights = torch.rand(rows, chosen, generator=make.g)
    sizes = [size_of_terms(x, *gate_up[e].chunk(2), down[e]) for e in range(experts)]
    both(ops, "experts", x, ids, weights, gate_up, down, scale=sum(sizes))


@given(kernels(), MAKERS, ROWS, st.integers(1, 100), st.data())
def test_route(ops: NativeOps, make: Maker, rows: int, hidden: int, data: st.DataObject) -> None:
    experts = data.draw(st.integers(1, 60))
    top_k = data.draw(st.integers(1, min(experts, 9)))
    # Whole numbers: scores are exact, so the choice has to be the same, ties included.
    x = torch.randint(-2, 3, (rows, hidden), generator=make.g).bfloat16()
    weight = torch.randint(-1, 2, (experts, hidden), generator=make.g).bfloat16()
    bias = torch.zeros(experts)
    named = {"top_k": top_k, "n_group": 1, "topk_group": 1, "normalise": data.draw(st.booleans()), "scale": 2.5}
    ids, weights = ops.route(x, weight, bias, **named)
    expected_ids, expected = REFERENCE.route(x, weight, bias, **named)
    order, expected_order = ids.argsort(-1), expected_ids.argsort(-1)
    logits = x.float() @ weight.float().T
    # A sigmoid rounds distinct large logits to one value, in its own way; what is chosen must be as good.
    assert_close(logits.gather(1, ids).clamp(-12, 12).sum(-1), logits.gather(1, expected_ids).clamp(-12, 12).sum(-1))
    if torch.equal(ids.gather(1, order), expected_ids.gather(1, expected_order)):
        assert_close(weights.gather(1, order), expected.gather(1, expected_order), tolerance=1e-5)


@given(kernels(), MAKERS, ROWS, st.integers(1, 20), st.integers(1, 50), st.integers(0, 20), st.integers(1, 90))
def test_absorb_and_unabsorb(
    ops: NativeOps, make: Maker, rows: int, heads: int, nope: int, rope: int, rank: int
) -> None:
    value = 1 + nope // 2
    query, mixed = make(rows, heads, nope + rope), make(rows, heads, rank)
    kv_b = torch.randn(heads * (nope + value), rank, generator=make.g).bfloat16()
    both(ops, "absorb", query, kv_b, nope, scale=nope**0.5 + 3)
    both(ops, "unabsorb", mixed, kv_b, nope, scale=rank**0.5 + 3)


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
