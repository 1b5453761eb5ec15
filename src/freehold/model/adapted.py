"""A model with an adapter: its own copy of the matrices that the adapter changes, everything else shared.

The copy is what a checkpoint with the adapter merged in would have been loaded as, in the form that the base has it in
(packed, quantised), so an adapter answers as the merged checkpoint does, bit for bit, and at the same speed. What it
costs is the memory of the matrices it changes: all of a layer's routed experts if it changes one of them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from freehold.errors import CheckpointError, ConfigError
from freehold.headers import CheckpointIndex
from freehold.model.adapters import Adapter, merged_tensor
from freehold.model.glm import Glm
from freehold.model.moe import Experts
from freehold.model.packed import PackedHeads, PackedWeight
from freehold.model.packing import published_modules
from freehold.model.paged import PagedStack

Held = Tensor | PackedWeight | PackedHeads
"""What a module holds a matrix, or a stack of them, as."""


def adapt(model: Glm, index: CheckpointIndex, adapter: Adapter) -> tuple[Glm, int]:
    """A model that shares with `model` all but what the adapter changes, and the bytes that it has of its own.

    index: of the checkpoint that `model` was loaded from; what the adapter changes is read from it again. The calls
    that run several layers at once are not taken over: they point to the base's weights.
    Raises ConfigError for an adapter on routed experts that are paged, CheckpointError for a merged weight that is NaN
    or infinite where it is to be quantised.
    """
    adapted = fork(model)
    adapted.run_few = adapted.mtp_few = None
    num_bytes = 0
    for module, attribute in list(_changed(adapted, adapter)):
        held: Held = getattr(module, attribute)
        if isinstance(held, PagedStack):
            raise ConfigError(
                f"{adapter.directory}: changes routed experts, which stay on disk with --expert-memory; leave that "
                "out, or merge the adapter into a checkpoint"
            )
        own = _copy(held, filled=isinstance(module, Experts))
        delattr(module, attribute)
        setattr(module, attribute, own)
        num_bytes += own.nbytes if isinstance(own, Tensor) else own.num_bytes
    places = adapted.checkpoint_tensors()
    for name in adapter.factors:
        merged, place = merged_tensor(index, adapter, name), places[name]
        if isinstance(place, Tensor):
            with torch.no_grad():
                place.copy_(merged)
        else:
            place.load(merged, name)
    return adapted, num_bytes


def fork(model: Glm) -> Glm:
    """A model of modules of its own that hold the same weights: replacing one leaves the other model as it is."""
    forked = _fork(model)
    assert isinstance(forked, Glm)
    return forked


def _fork(module: nn.Module) -> nn.Module:
    if isinstance(module, (PackedWeight, PackedHeads)):
        return module
    forked = copy.copy(module)
    forked._parameters = dict(module._parameters)
    forked._modules = {name: None if part is None else _fork(part) for name, part in module._modules.items()}
    return forked


def _changed(model: Glm, adapter: Adapter) -> Iterator[tuple[nn.Module, str]]:
    """(module, attribute) of everything that holds a matrix which the adapter changes. Raises CheckpointError."""
    left = set(adapter.factors)
    for name, module in published_modules(model):
        if isinstance(module, Experts):
            experts = range(model.config.n_routed_experts)
            inside = {
                "gate_up_proj": {f"{name}.{i}.{half}_proj.weight" for i in experts for half in ("gate", "up")},
                "down_proj": {f"{name}.{i}.down_proj.weight" for i in experts},
            }
        else:
            inside = {"weight": {f"{name}.weight"}}
        for attribute, names in inside.items():
            if names & left:
                yield module, attribute
                left -= names
    if left:
        raise CheckpointError(f"{adapter.directory}: changes {min(left)!r}, which this model does not have")


def _copy(held: Held, filled: bool) -> Held:
    """Of the same form; uninitialised unless `filled`: of a stack, an adapter may change some matrices only."""
    if isinstance(held, PackedHeads):
        return PackedHeads(_empty(held.up_key), _empty(held.up_value))
    if isinstance(held, PackedWeight):
        packed = _empty(held)
        if filled:
            packed.codes.copy_(held.codes)
            if packed.scales is not None and held.scales is not None:
                packed.scales.copy_(held.scales)
        return packed
    tensor = held.detach().clone() if filled else torch.empty_like(held)
    return nn.Parameter(tensor, requires_grad=False)


def _empty(weight: PackedWeight) -> PackedWeight:
    return PackedWeight(weight.outputs, weight.inner, weight.kind, count=weight.count, group=weight.group)
