"""Gives a model packed weights for the native kernels, before it is loaded: which matrix is held in which kind.

Every matrix that products are made with is packed, in bf16 or quantised; embeddings, norms and biases stay tensors.
What the kernels cannot take (inner sizes that are no multiple of 8, expert widths that are none of 16) stays a tensor
too, and runs on the plain operations. Replacing comes before loading, so that a weight is never in memory twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor, nn

from freehold.model.config import GlmConfig
from freehold.model.glm import Glm
from freehold.model.layers import Linear
from freehold.model.mla import LatentAttention
from freehold.model.moe import Experts, Router
from freehold.model.names import TensorSpec
from freehold.model.packed import (
    CHUNK,
    PANEL,
    Kind,
    PackedHeads,
    PackedWeight,
    default_group,
    fp8_group,
)

KindOf = Callable[[str], Kind]
"""Published tensor name → the kind its matrix is held in."""


def pack_model(model: Glm, kind_of: KindOf) -> None:
    """Replace the model's (uninitialised) matrices by packed ones, also uninitialised."""
    for name, module in _named_modules(model):
        if isinstance(module, LatentAttention):
            _pack_heads(module, kind_of(f"{name}.kv_b_proj.weight"))
        elif isinstance(module, Linear) and not name.endswith(".kv_b_proj"):
            _replace(module, "weight", kind_of(f"{name}.weight"))
        elif isinstance(module, Router):
            _replace(module, "weight", "bf16")
        elif isinstance(module, Experts):
            _pack_experts(module, kind_of(f"{name}.0.down_proj.weight"))


def _named_modules(model: Glm) -> Iterator[tuple[str, nn.Module]]:
    """Modules under their published names."""
    for name, module in list(model.named_modules()):
        if name.startswith("layers."):
            name = f"model.{name}"
        elif name.startswith("mtp"):
            name = f"model.layers.{model.config.num_hidden_layers}{name.removeprefix('mtp')}"
        yield name.replace(".input.", "."), module


def kind_under(scheme: Kind, spec: TensorSpec, config: GlmConfig) -> Kind:
    """The kind of a matrix under a scheme: int8 for the head and the MTP layer where the scheme is int4.

    Routers, the indexer's head weights and the MTP input stay bf16: they are small, and they steer.
    """
    if not (spec.quantizable or spec.part == "head"):
        return "bf16"
    careful = spec.part == "head" or spec.layer == config.num_hidden_layers
    if scheme == "fp8":
        return "fp8" if spec.quantizable else "bf16"
    return "int8" if scheme == "int4" and careful else scheme


def fits(kind: Kind, inner: int) -> Kind | None:
    """The kind a matrix of so many inputs can have: bf16 where groups do not fit, None where nothing does."""
    if inner % CHUNK:
        return None
    return kind if kind in ("bf16", "fp8") or inner % default_group(kind, inner) == 0 else "bf16"


def _replace(module: nn.Module, attribute: str, kind: Kind) -> None:
    weight: Tensor = getattr(module, attribute)
    outputs, inner = weight.shape
    fitting = fits(kind, inner)
    if fitting is not None:
        delattr(module, attribute)
        setattr(module, attribute, PackedWeight(outputs, inner, fitting))


def _pack_experts(experts: Experts, kind: Kind) -> None:
    count, hidden, width = experts.down_proj.shape
    up, down = fits(kind, hidden), fits(kind, width)
    if width % PANEL or up is None or down is None:
        return
    del experts.gate_up_proj, experts.down_proj
    experts.gate_up_proj = PackedWeight(2 * width, hidden, up, count=count)
    experts.down_proj = PackedWeight(hidden, width, down, count=count)


def _pack_heads(attention: LatentAttention, kind: Kind) -> None:
    heads, nope, value, rank = attention.heads, attention.nope, attention.value_dim, attention.rank
    key_group = default_group(kind, nope)
    if kind == "fp8":
        group = fp8_group(nope + value, nope)
        kind, key_group = ("bf16", nope) if group is None else (kind, group)
    if nope % CHUNK or rank % CHUNK:
        return
    if kind in ("int8", "int4"):
        # In W_UK's transposed form a group runs along the head's dims, of which small models have few.
        kind = "int8"
        key_group = next((g for g in (64, 32, 16, CHUNK) if nope % g == 0), CHUNK)
        if rank % default_group(kind, rank):
            kind, key_group = "bf16", nope
    up_key = PackedWeight(rank, nope, kind, count=heads, group=key_group)
    up_value = PackedWeight(value, rank, kind, count=heads)
    del attention.kv_b_proj.weight
    attention.kv_b_proj.weight = PackedHeads(up_key, up_value)
