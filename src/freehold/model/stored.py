"""What a checkpoint's storage is described with: a tensor as it lies on disk, and what can be wrong. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from freehold.model.names import TensorSpec


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as it lies on disk: `spec` itself, or (is_scale) the block scales of `spec`."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it
    spec: TensorSpec
    is_scale: bool = False


@dataclass(frozen=True, slots=True)
class Problem:
    """One way in which a checkpoint is not what its config says. kind is stable; message is one line."""

    kind: str  # missing | unexpected | shape | dtype | quantization
    name: str
    message: str


def module_of(name: str) -> str:
    """The module a tensor belongs to, as quantization_config names it: the name without `.weight`."""
    return name.removesuffix(".weight")
