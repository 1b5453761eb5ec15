"""LoRA: low-rank changes of a frozen model's matrices, trained in place and saved in the files that PEFT writes.

A matrix W becomes W + s · B A while the model runs, by torch's parametrisations: the model's own code does not know.
So it works wherever a weight is a parameter, the stacked experts and the per-head products of latent attention among
them, and what is trained is exactly what a merged checkpoint computes. `model/adapters.py` reads what is saved here.

Source: Hu et al. 2021 (LoRA). Shape suffixes: M matrices of one parameter (the gate, up and down projections of E
experts are 2E and E of them; else one), O outputs and I inputs of each, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from freehold.errors import InvalidRequest
from freehold.headers import encode_header
from freehold.model.adapters import CONFIG_NAME, WEIGHTS_NAME, Adapter, factor_name
from freehold.model.checkpoint_files import atomic_write, write_json
from freehold.model.config import GlmConfig
from freehold.model.glm import Glm
from freehold.model.names import tensor_specs
from freehold.train.publish import staged

Target: TypeAlias = Literal["attention", "dense_mlp", "shared_expert", "routed_expert"]
TARGETS: tuple[Target, ...] = get_args(Target)
_DEFAULT_TARGETS: tuple[Target, ...] = ("attention", "dense_mlp", "shared_expert")


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """rank: of each change. alpha: the change counts alpha / rank times (None: twice the rank). targets: which matrices
    change, of all layers, the MTP layer's too."""

    rank: int = 16
    alpha: float | None = None
    targets: tuple[Target, ...] = _DEFAULT_TARGETS

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InvalidRequest(f"rank {self.rank} must be at least 1", param="rank")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
            raise InvalidRequest(f"alpha {self.alpha} must be above 0", param="alpha")
        unknown = next((target for target in self.targets if target not in TARGETS), None)
        if unknown is not None or not self.targets:
            raise InvalidRequest(
                f"targets: {unknown or 'none given'!r}; choose from {', '.join(TARGETS)}", param="targets"
            )

    @property
    def lora_alpha(self) -> float:
        return 2.0 * self.rank if self.alpha is None else self.alpha

    @property
    def scale(self) -> float:
        return self.lora_alpha / self.rank


class LowRank(nn.Module):
    """The change of one parameter: a_MrI random, b_MOr zero, so that at first it changes nothing. fp32."""

    def __init__(self, matrices: int, outputs: int, inputs: int, rank: int, scale: float, seed: int) -> None:
        super().__init__()
        self.scale = scale
        generator = torch.Generator().manual_seed(seed)
        bound = math.sqrt(3 / inputs)  # A x is as large as x
        values = torch.rand(matrices, rank, inputs, generator=generator)
        self.a_MrI = nn.Parameter((2 * values - 1) * bound)
        self.b_MOr = nn.Parameter(torch.zeros(matrices, outputs, rank))

    def forward(self, weight: Tensor) -> Tensor:
        change_MOI = torch.bmm(self.b_MOr * self.scale, self.a_MrI)
        return weight + change_MOI.view(weight.shape).to(weight.dtype)


@dataclass(frozen=True, slots=True)
class Changed:
    """A parameter that changes: the module that has it, under which name, its M matrices' published names."""

    module: nn.Module
    attribute: str
    published: tuple[str, ...]
    change: LowRank


class Lora:
    """Adapters on a model, whose own weights are frozen. `detach` gives the model back as it was."""

    def __init__(self, model: Glm, settings: LoraSettings, *, seed: int = 0) -> None:
        """Raises InvalidRequest if the model has no matrix that is targeted."""
        self.settings, self.config = settings, model.config
        model.requires_grad_(False)
        wanted = {spec.name: spec.part for spec in tensor_specs(model.config)}
        self.changed: list[Changed] = []
        for module, attribute, published in _weights(model):
            if all(wanted[name] in settings.targets and name.endswith(".weight") for name in published):
                weight = getattr(module, attribute)
                outputs = weight.numel() // weight.shape[-1] // len(published)
                change = LowRank(
                    len(published), outputs, weight.shape[-1], settings.rank, settings.scale, seed + len(self.changed)
                )
                self.changed.append(Changed(module, attribute, published, change))
        if not self.changed:
            raise InvalidRequest(f"this model has no weights of {', '.join(settings.targets)}", param="targets")
        for held in self.changed:
            parametrize.register_parametrization(held.module, held.attribute, held.change)

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for _, parameter in self.named_parameters())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is trained."""
        for held in self.changed:
            stem = held.published[0].removesuffix(".weight")
            yield f"{stem}.lora_A", held.change.a_MrI
            yield f"{stem}.lora_B", held.change.b_MOr

    @staticmethod
    def once() -> AbstractContextManager[None]:
        """Within it each changed weight is made once, not at each use: put one forward pass in it."""
        cached: AbstractContextManager[None] = parametrize.cached()
        return cached

    def detach(self) -> None:
        """Take the adapters off the model; its weights are what they were."""
        for held in self.changed:
            parametrize.remove_parametrizations(held.module, held.attribute, leave_parametrized=False)

    def factors(self) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Published tensor name -> (A [r, I], B [O, r]), as `model.adapters.Adapter` has them. Views, without
        gradient."""
        return {
            name: (held.change.a_MrI.detach()[m], held.change.b_MOr.detach()[m])
            for held in self.changed
            for m, name in enumerate(held.published)
        }

    @torch.no_grad()
    def load(self, adapter: Adapter) -> None:
        """Continue from a saved adapter. Raises InvalidRequest if it has another rank, scale or other matrices."""
        own = self.factors()
        if adapter.rank != self.settings.rank or adapter.scale != self.settings.scale:
            raise InvalidRequest(
                f"{adapter.directory}: has rank {adapter.rank} and scale {adapter.scale}, not {self.settings.rank} and "
                f"{self.settings.scale}"
            )
        if own.keys() != adapter.factors.keys():
            other = min(own.keys() ^ adapter.factors.keys())
            raise InvalidRequest(f"{adapter.directory}: {'lacks' if other in own else 'changes also'} {other!r}")
        for name, (a_rI, b_Or) in own.items():
            a_rI.copy_(adapter.factors[name][0])
            b_Or.copy_(adapter.factors[name][1])

    def save(self, directory: str | Path, *, base: str | None = None, replace: bool = False) -> None:
        """Write adapter_config.json and adapter_model.safetensors, factors in fp32.

        base: what the adapter belongs to, for readers. Raises InvalidRequest if there is something in `directory` and
        replace is not given, CheckpointError and DiskFull.
        """
        tensors = [
            (factor_name(name, letter), factor)
            for name, pair in self.factors().items()
            for letter, factor in zip("AB", pair, strict=True)
        ]
        with staged(directory, replace=replace) as work:
            with atomic_write(work / WEIGHTS_NAME) as file:
                shapes = ((name, "F32", tuple(factor.shape)) for name, factor in tensors)
                file.write(encode_header(shapes, {"format": "pt"}))
                for _, factor in tensors:
                    file.write(factor.contiguous().numpy().tobytes())
            write_json(work / CONFIG_NAME, self._peft_config(base))

    def _peft_config(self, base: str | None) -> dict[str, Any]:
        modules, parameters = peft_targets(self.settings.targets, self.config)
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": self.settings.rank,
            "lora_alpha": self.settings.lora_alpha,
            "use_rslora": False,
            "lora_dropout": 0.0,
            "target_modules": modules,
            "target_parameters": parameters,
            "bias": "none",
            "fan_in_fan_out": False,
            "use_dora": False,
            "init_lora_weights": True,
            "modules_to_save": None,
            "rank_pattern": {},
            "alpha_pattern": {},
            "inference_mode": True,
        }


def peft_targets(targets: Sequence[Target], config: GlmConfig) -> tuple[list[str], list[str]]:
    """(target_modules, target_parameters): how PEFT is told that these matrices change, and no others.

    The first are ends of names of linear layers (`self_attn.q_a_proj`). For this architecture PEFT takes an end that
    is a projection of an MLP to mean the routed experts, which `transformers` stacks, so the other MLPs are named by
    their parameter (`shared_experts.up_proj.weight`). Whoever reads the factors by their names needs neither list.
    """
    modules, parameters = set(), set()
    for spec in tensor_specs(config):
        if spec.part in targets and spec.name.endswith(".weight"):
            parts = spec.name.split(".")
            if spec.part == "attention":
                modules.add(".".join(parts[-3:-1]))
            elif spec.part == "routed_expert":
                modules.add(parts[-2])
            else:
                parameters.add(".".join(parts[-3:]))
    return sorted(modules), sorted(parameters)


def adapter_bytes(config: GlmConfig, settings: LoraSettings) -> int:
    """Bytes of the factors, fp32, of a model of this config."""
    specs = [spec for spec in tensor_specs(config) if spec.part in settings.targets and len(spec.shape) == 2]
    return sum(4 * settings.rank * sum(spec.shape) for spec in specs)


def _weights(model: Glm) -> Iterator[tuple[nn.Module, str, tuple[str, ...]]]:
    """(module, attribute, published names of the matrices in it) of every parameter, in the model's order."""
    owners = {
        id(parameter): (module, attribute)
        for module in model.modules()
        for attribute, parameter in module.named_parameters(recurse=False)
    }
    names: dict[int, list[str]] = {}
    for name, destination in model.checkpoint_tensors().items():
        if not isinstance(destination, Tensor):
            raise InvalidRequest(f"tensor {name!r} is packed for inference; adapters are trained on an unpacked model")
        # A matrix of a stack is a view of the parameter that holds it.
        held = destination if destination._base is None else destination._base
        names.setdefault(id(held), []).append(name)
    for key, published in names.items():
        yield *owners[key], tuple(published)
