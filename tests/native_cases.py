"""What the tests of the native kernels share: instruction sets of this machine, packed weights, and how close is close.

A product keeps codes exact, multiplies a group's sum by its scale, and sums in fp32. `twin_weight` gives the weights as
fp32, so that what is left between a kernel and its twin is the rounding of sums.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from freehold.model.ops.library import ISAS, NativeUnavailable, supported_isas
from freehold.model.ops.native import NativeOps
from freehold.model.packed import Kind, PackedHeads, PackedWeight, fp8_group

try:
    SUPPORTED: tuple[str, ...] = supported_isas()
    _MISSING = "this processor does not have it"
except NativeUnavailable as cause:
    SUPPORTED, _MISSING = (), str(cause)

ALL_ISAS = [
    pytest.param(isa, marks=pytest.mark.skipif(isa not in SUPPORTED, reason=f"{isa}: {_MISSING}")) for isa in ISAS
]
"""For `parametrize`: what this machine lacks is skipped, and says so."""

needs_native = pytest.mark.skipif(not SUPPORTED, reason=_MISSING)


@cache
def native(isa: str, threads: int = 2) -> NativeOps:
    return NativeOps(threads, isa)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(g: torch.Generator, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=g).to(dtype)


def group_of(kind: Kind, inner: int) -> int | None:
    """The largest usual group that divides `inner`; FP8's last group may be ragged."""
    if kind in ("bf16", "fp8"):
        return None
    return next(group for group in (64, 32, 16, 8) if inner % group == 0)


def packed(weight: Tensor, kind: Kind, group: int | None = None) -> PackedWeight:
    """A matrix [O, I], or a stack [M, O, I], packed."""
    stack = weight if weight.ndim == 3 else weight[None]
    count, outputs, inner = stack.shape
    held = PackedWeight(outputs, inner, kind, count=count, group=group or group_of(kind, inner))
    for index, matrix in enumerate(stack):
        held.load(matrix, index)
    return held


def packed_heads(kv_b: Tensor, heads: int, nope: int, kind: Kind) -> PackedHeads:
    """kv_b [N · (nope + v), V] packed; W_UK is bf16 where FP8's blocks have no common group with the heads."""
    rows, rank = kv_b.shape[0] // heads, kv_b.shape[1]
    key_kind, group = kind, group_of(kind, nope)
    if kind == "fp8":
        group = fp8_group(rows, nope)
        key_kind = "bf16" if group is None else "fp8"
    up_key = PackedWeight(rank, nope, key_kind, count=heads, group=group)
    up_value = PackedWeight(rows - nope, rank, kind, count=heads, group=group_of(kind, rank))
    held = PackedHeads(up_key, up_value)
    held.load(kv_b)
    return held


def twin_weight(weight: PackedWeight | PackedHeads, index: int = 0) -> Tensor:
    """The fp32 matrix that a product is made with."""
    if isinstance(weight, PackedHeads):
        return weight.dequantize(torch.float32)
    return weight.dequantize(index, torch.float32)


def assert_close(actual: Tensor, expected: Tensor, *, scale: float | None = None, tolerance: float = 2**-6) -> None:
    """NaN and infinities in the same places, and elsewhere an error within `tolerance` of `scale`.

    scale: the size of the terms of the sums, default the largest finite expected value. bf16 keeps 8 bits, and a few
    roundings in a row are allowed for.
    """
    a, e = _finite_of(actual, expected)
    if e.numel():
        bound = tolerance * (scale if scale is not None else float(e.abs().max())) + 1e-30
        worst = float((a - e).abs().max())
        assert worst <= bound, f"differs by {worst:.3g}, more than {bound:.3g}"


def assert_product(actual: Tensor, exact: Tensor, terms: float) -> None:
    """`actual` is `exact` (fp32) but for the order of fp32 sums and, if it is bf16, one rounding.

    terms: the largest sum of the magnitudes of an output's terms, which errors of fp32 sums are relative to.
    """
    a, e = _finite_of(actual, exact)
    rounding = 2**-8 if actual.dtype == torch.bfloat16 else 0.0
    worst = float(((a - e).abs() - rounding * e.abs()).max()) if e.numel() else 0.0
    bound = 2**-18 * terms + 1e-30
    assert worst <= bound, f"differs by {worst:.3g} beyond rounding, more than {bound:.3g}"


def terms_of(x: Tensor, weight: Tensor) -> float:
    """Largest Σ |x · w| over the finite values of x [.., I] and weight [O, I]."""
    x, weight = (t.float().nan_to_num(0, 0, 0).abs() for t in (x, weight))
    return float((x @ weight.T).max())


def _finite_of(actual: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    a, e = actual.float(), expected.float()
    assert a.shape == e.shape
    assert torch.equal(a.isnan(), e.isnan()), "NaN in other places"
    assert torch.equal(a.isposinf(), e.isposinf()), "+inf in other places"
    assert torch.equal(a.isneginf(), e.isneginf()), "-inf in other places"
    finite = e.isfinite()
    return a[finite], e[finite]
