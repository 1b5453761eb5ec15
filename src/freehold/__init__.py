"""Freehold: run GLM-5.2-class open-weight models on hardware you own.

Importing this package imports no torch; `LLM` is resolved on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]

if TYPE_CHECKING:
    from freehold.serve.offline import LLM
    from freehold.types import SamplingParams


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from freehold.serve.offline import LLM

        return LLM
    if name == "SamplingParams":
        from freehold.types import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'freehold' has no attribute {name!r}")
