"""Where each tensor of a checkpoint goes: a parameter, a view of a stacked one, or a part of a packed weight.

`weights.load_weights` asks a model for these by published name and fills them one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from freehold.model.moe import Experts
from freehold.model.packed import PackedHeads, PackedWeight, Source


@dataclass(frozen=True, slots=True)
class Target:
    """Where a checkpoint's tensor goes: rows first .. first + rows of one matrix of a packed weight."""

    weight: PackedWeight
    index: int
    first: int
    rows: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.weight.inner

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16

    @property
    def wanted(self) -> bool:
        return self.weight.wants(self.index, self.first)

    def load(self, source: Source, name: str) -> None:
        self.weight.load(source, self.index, self.first, name=name)


@dataclass(frozen=True, slots=True)
class HeadsTarget:
    """Where kv_b goes."""

    heads: PackedHeads

    @property
    def shape(self) -> tuple[int, int]:
        key, value = self.heads.up_key, self.heads.up_value
        return key.count * (key.inner + value.outputs), key.outputs

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16

    @property
    def wanted(self) -> bool:
        return True

    def load(self, source: Source, name: str) -> None:
        self.heads.load(source, name=name)


Destination = Tensor | Target | HeadsTarget


def held_weights(module: nn.Module, prefix: str) -> Iterator[tuple[str, Destination]]:
    """(published name, destination) of every weight below a module whose published name is `prefix`."""
    for name, parameter in module.named_parameters(prefix):
        if name.endswith("mlp.experts.gate_up_proj"):
            stem = name.removesuffix(".gate_up_proj")
            for expert, (gate, up) in enumerate(
                parameter.view(parameter.shape[0], 2, -1, parameter.shape[2]).unbind(0)
            ):
                yield f"{stem}.{expert}.gate_proj.weight", gate
                yield f"{stem}.{expert}.up_proj.weight", up
        elif name.endswith("mlp.experts.down_proj"):
            stem = name.removesuffix(".down_proj")
            for expert, down in enumerate(parameter.unbind(0)):
                yield f"{stem}.{expert}.down_proj.weight", down
        else:
            yield name, parameter
    for name, part in module.named_modules(prefix=prefix):
        if isinstance(part, PackedHeads):
            yield name, HeadsTarget(part)
        elif isinstance(part, Experts):
            yield from _packed_experts(name, part)
        elif isinstance(part, PackedWeight) and name.endswith(".weight"):
            yield name, Target(part, 0, 0, part.outputs)


def _packed_experts(name: str, experts: Experts) -> Iterator[tuple[str, Target]]:
    gate_up, down = experts.gate_up_proj, experts.down_proj
    if not (isinstance(gate_up, PackedWeight) and isinstance(down, PackedWeight)):
        return
    width = gate_up.outputs // 2
    for expert in range(gate_up.count):
        yield f"{name}.{expert}.gate_proj.weight", Target(gate_up, expert, 0, width)
        yield f"{name}.{expert}.up_proj.weight", Target(gate_up, expert, width, width)
        yield f"{name}.{expert}.down_proj.weight", Target(down, expert, 0, down.outputs)
