"""What the tests of the native kernels share: instruction sets of this machine, inputs, and how close is close."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from freehold.model.ops.library import ISAS, NativeUnavailable, supported_isas
from freehold.model.ops.native import NativeOps

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


def assert_close(actual: Tensor, expected: Tensor, *, scale: float | None = None, tolerance: float = 2**-6) -> None:
    """NaN and infinities in the same places, and elsewhere an error within `tolerance` of `scale`.

    scale: the size of the terms of the sums, default the largest finite expected value. bf16 keeps 8 bits, and a few
    roundings in a row are allowed for.
    """
    a, e = actual.float(), expected.float()
    assert a.shape == e.shape
    assert torch.equal(a.isnan(), e.isnan()), "NaN in other places"
    assert torch.equal(a.isposinf(), e.isposinf()), "+inf in other places"
    assert torch.equal(a.isneginf(), e.isneginf()), "-inf in other places"
    finite = e.isfinite()
    if not bool(finite.any()):
        return
    a, e = a[finite], e[finite]
    bound = tolerance * (scale if scale is not None else float(e.abs().max())) + 1e-30
    worst = float((a - e).abs().max())
    assert worst <= bound, f"differs by {worst:.3g}, more than {bound:.3g}"
