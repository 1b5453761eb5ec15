"""Gives a model packed weights for the native kernels, before it is loaded: which matrix is held in which kind.

Every matrix that products are made with is packed, in bf16 or quantised; embeddings, norms and biases stay tensors.
What the kernels cannot take (inner sizes that are no multiple of 8, expert widths that are none of 16) stays a tensor
too, and runs on the plain operations. Replacing comes before loading, so that a weight is never in memory twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from freehold.model.config import GlmConfig
from freehold.model.glm import Glm
from freehold.model.layers import Linear
from freehold.model.mla import LatentAttention
from freehold.model.moe import Experts, Router
from freehold.model.names import tensor_specs
from freehold.model.packed import CHUNK, GROUPS, PANEL, Kind, PackedHeads, PackedWeight, fp8_group
from freehold.model.paged import PagedStack
from freehold.model.storage import quantization_scheme
from freehold.model.storage_fp8 import Fp8Scheme, fp8_quantization, fp8_scheme
from freehold.model.storage_groups import GroupScheme, group_quantization, group_scheme

Quantize = Literal["int8", "int4", "fp8"]


@dataclass(frozen=True, slots=True)
class Form:
    """How a matrix is held. group: inputs that share a scale, default that of the kind."""

    kind: Kind
    group: int | None = None


FormOf = Callable[[str], Form]
"""Published tensor name → how its matrix is held."""


def pack_model(model: Glm, form_of: FormOf, *, paged: bool = False) -> None:
    """Replace the model's (uninitialised) matrices by packed ones, also uninitialised.

    paged: those of routed experts by stacks that `paged.page_experts` then gives memory.
    """
    for name, module in published_modules(model):
        if isinstance(module, LatentAttention):
            _pack_heads(module, form_of(f"{name}.kv_b_proj.weight"))
        elif isinstance(module, Linear) and not name.endswith(".kv_b_proj"):
            _replace(module, "weight", form_of(f"{name}.weight"))
        elif isinstance(module, Router):
            _replace(module, "weight", Form("bf16"))
        elif isinstance(module, Experts):
            count = module.down_proj.shape[0]
            gate_up = _common(
                form_of(f"{name}.{i}.{half}_proj.weight") for i in range(count) for half in ("gate", "up")
            )
            down = _common(form_of(f"{name}.{i}.down_proj.weight") for i in range(count))
            _pack_experts(module, gate_up, down, PagedStack if paged else PackedWeight)


def published_modules(model: Glm) -> Iterator[tuple[str, nn.Module]]:
    """Modules under their published names."""
    for name, module in list(model.named_modules()):
        if name.startswith("layers."):
            name = f"model.{name}"
        elif name.startswith("mtp"):
            name = f"model.layers.{model.config.num_hidden_layers}{name.removeprefix('mtp')}"
        yield name.replace(".input.", "."), module


def forms(config: GlmConfig, quantize: Quantize | None = None) -> FormOf:
    """How each matrix is held: as a scheme of `freehold quantize` would store it, else as the checkpoint does.

    kv_b is stored in bf16 by the integer schemes, because its two halves are used apart and one of them transposed;
    held apart it is int8 like the rest.
    """
    scheme = quantization_scheme(config.quantization) if quantize is None else _scheme(config, quantize)
    specs = {spec.name: spec for spec in tensor_specs(config)}

    def form(name: str) -> Form:
        spec = specs[name]
        if isinstance(scheme, Fp8Scheme):
            return Form("fp8") if scheme.converts(spec) else Form("bf16")
        if scheme is None:
            return Form("bf16")
        stored = scheme.format_of(spec)
        if stored is None:
            return Form("int8") if name.endswith("kv_b_proj.weight") else Form("bf16")
        return Form("int8" if stored.bits == 8 else "int4", stored.group)

    return form


def quantized_otherwise(config: GlmConfig, quantize: Quantize) -> bool:
    """Whether a checkpoint has int8 or int4 weights already, and in another way: they would be rounded twice."""
    stored = quantization_scheme(config.quantization)
    return isinstance(stored, GroupScheme) and stored != _scheme(config, quantize)


def _scheme(config: GlmConfig, quantize: Quantize) -> Fp8Scheme | GroupScheme:
    """What `freehold quantize` writes."""
    if quantize == "fp8":
        return fp8_scheme(fp8_quantization(config))
    return group_scheme(group_quantization(config, 8 if quantize == "int8" else 4))


def _fitting(form: Form, inner: int) -> Form | None:
    """The form a matrix of so many inputs can have: bf16 where groups do not fit, None where nothing does."""
    if inner % CHUNK:
        return None
    if form.kind in GROUPS and inner % (form.group or GROUPS[form.kind]):
        return Form("bf16")
    return form


def _packed(outputs: int, inner: int, form: Form, count: int = 1) -> PackedWeight:
    return PackedWeight(outputs, inner, form.kind, count=count, group=form.group)


def _replace(module: nn.Module, attribute: str, form: Form) -> None:
    weight: Tensor = getattr(module, attribute)
    outputs, inner = weight.shape
    fitting = _fitting(form, inner)
    kept = fitting == Form("bf16") and weight.dtype is torch.float32  # what is not quantised is not rounded either
    if fitting is not None and not kept:
        delattr(module, attribute)
        setattr(module, attribute, _packed(outputs, inner, fitting))


def _common(found: Iterable[Form]) -> Form:
    """The form of all matrices of a stack; bf16 if they have several."""
    return next(iter(different)) if len(different := set(found)) == 1 else Form("bf16")


def _pack_experts(experts: Experts, gate_up_form: Form, down_form: Form, stack: type[PackedWeight]) -> None:
    count, hidden, width = experts.down_proj.shape
    up, down = _fitting(gate_up_form, hidden), _fitting(down_form, width)
    if width % PANEL or up is None or down is None:
        return
    del experts.gate_up_proj, experts.down_proj
    experts.gate_up_proj = stack(2 * width, hidden, up.kind, count=count, group=up.group)
    experts.down_proj = stack(hidden, width, down.kind, count=count, group=down.group)


def _pack_heads(attention: LatentAttention, form: Form) -> None:
    """In W_UK's transposed form a group runs along the head's dims, of which small models have few."""
    heads, nope, value, rank = attention.heads, attention.nope, attention.value_dim, attention.rank
    key, latent = form, _fitting(form, rank)
    if nope % CHUNK or latent is None:
        return
    if form.kind == "fp8":
        group = fp8_group(nope + value, nope)
        key = Form("fp8", group) if group is not None else Form("bf16")
    elif form.kind in GROUPS:
        key = Form(form.kind, next(group for group in (64, 32, 16, CHUNK) if nope % group == 0))
    up_key, up_value = _packed(rank, nope, key, heads), _packed(value, rank, latent, heads)
    del attention.kv_b_proj.weight
    attention.kv_b_proj.weight = PackedHeads(up_key, up_value)
