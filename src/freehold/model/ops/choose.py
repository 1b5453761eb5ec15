"""Which set of operations a model runs on, decided once, when an engine loads."""

from __future__ import annotations

import sys
from typing import Literal

import torch

from freehold.errors import ConfigError
from freehold.model.ops.interface import Ops
from freehold.model.ops.library import NativeUnavailable
from freehold.model.ops.native import NativeOps
from freehold.model.ops.reference import ReferenceOps

OpsChoice = Literal["auto", "native", "reference"]


def load_ops(dtype: torch.dtype, choice: OpsChoice = "auto", threads: int | None = None) -> Ops:
    """The native kernels for bf16 where they can run, else the reference.

    fp32 is the exact path and runs on the reference. With "auto" a missing kernel library is told once, on stderr,
    because it makes everything several times slower; with "native" it is a ConfigError. threads: of the native kernels,
    default one a core; torch has its own setting.
    """
    if choice == "reference" or (choice == "auto" and dtype is not torch.bfloat16):
        return ReferenceOps()
    try:
        return NativeOps(threads)
    except NativeUnavailable as cause:
        if choice == "native":
            raise ConfigError(f"the native kernels cannot be used: {cause}") from None
        print(f"warning: running on the slow PyTorch reference, because {cause}", file=sys.stderr)
        return ReferenceOps()
