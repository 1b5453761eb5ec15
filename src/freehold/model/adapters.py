"""LoRA adapters in the files that PEFT writes: read strictly, and merged into the weights that they change.

An adapter changes some matrices of a checkpoint, W to W + s · B A with B [O, r] and A [r, I]; s is lora_alpha / r, or
lora_alpha / sqrt(r) with use_rslora. In `adapter_model.safetensors` the two factors of `model.layers.0.X.weight` are

    base_model.model.model.layers.0.X.lora_A.weight     [r, I]
    base_model.model.model.layers.0.X.lora_B.weight     [O, r]

under the names of the published checkpoint, the experts one by one and the MTP layer as layer num_hidden_layers. What
else `adapter_config.json` may ask for and is not done here (DoRA, biases, ranks that differ, ...) is refused.

Source: Hu et al. 2021 (LoRA), Kalajdzievski 2023 (rsLoRA), the adapter files of PEFT 0.18. Shape suffixes: r rank,
O outputs, I inputs.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from freehold.errors import CheckpointError, ConfigError
from freehold.headers import CheckpointIndex
from freehold.model.config import GlmConfig
from freehold.model.names import TensorSpec, tensor_specs
from freehold.model.weights import read_file, read_tensor

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What PEFT puts before the name of a module of the model it wraps."""

_FACTOR = re.compile(re.escape(PREFIX) + r"(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
_BAND = 1 << 24  # weights merged at a time: what is in memory in fp32 on the way is of these, not of a whole matrix

# Keys that say how an adapter came about, or where: they change nothing about what it is.
_NOT_USED = frozenset(
    "auto_mapping base_model_name_or_path revision peft_version inference_mode lora_dropout init_lora_weights "
    "task_type target_modules target_parameters exclude_modules layers_to_transform layers_pattern loftq_config "
    "eva_config corda_config runtime_config megatron_core qalora_group_size ensure_weight_tying".split()
)
_USED = frozenset(("peft_type", "r", "lora_alpha", "use_rslora", "bias"))
# These leave the base as it is. Others (PiSSA, OLoRA, CorDA, LoftQ, ...) make it another one while they initialise, so
# the factors do not belong to the published weights.
_KEEPS_BASE = ("gaussian", "eva", "orthogonal")


@dataclass(frozen=True, slots=True)
class Adapter:
    """factors: published tensor name -> (A [r, I], B [O, r]), both fp32."""

    directory: Path
    rank: int
    scale: float
    factors: Mapping[str, tuple[Tensor, Tensor]]

    @property
    def num_parameters(self) -> int:
        return sum(a_rI.numel() + b_Or.numel() for a_rI, b_Or in self.factors.values())

    @torch.no_grad()
    def merge(self, name: str, weight_OI: Tensor) -> Tensor:
        """W + s · B A of a tensor that the adapter changes: summed in fp32, rounded once to the dtype of W."""
        a_rI, b_Or = self.factors[name]
        scaled_Or = b_Or * self.scale
        merged_OI = torch.empty_like(weight_OI)
        step = max(1, _BAND // weight_OI.shape[1])
        for first in range(0, weight_OI.shape[0], step):
            rows = slice(first, first + step)
            merged_OI[rows] = torch.addmm(weight_OI[rows].float(), scaled_Or[rows], a_rI)
        return merged_OI


def read_adapter(directory: str | Path, config: GlmConfig) -> Adapter:
    """Read an adapter of a model of this config.

    Raises ConfigError for what adapter_config.json asks for and is not done, and CheckpointError for a missing or
    damaged file, a tensor that is no factor of a matrix of the model, one of the wrong shape, and NaN or infinity.
    """
    directory = Path(directory)
    rank, scale = _read_config(directory / CONFIG_NAME)
    path = directory / WEIGHTS_NAME
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; an adapter is saved as safetensors (pickled ones are not loaded)")
    specs = {spec.name: spec for spec in tensor_specs(config)}
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in read_file(path):
        match = _FACTOR.fullmatch(name)
        if match is None:
            raise CheckpointError(f"{path}: tensor {name!r} is no factor of LoRA ({PREFIX}….lora_A.weight or lora_B)")
        published, factor = f"{match['module']}.weight", match["factor"]
        _check_factor(path, name, tensor, _matrix(path, name, specs.get(published)), factor, rank)
        found.setdefault(published, {})[factor] = tensor.float()
    if not found:
        raise CheckpointError(f"{path}: has no tensors, so it changes nothing")
    for published, factors in found.items():
        for missing in {"A", "B"} - factors.keys():
            raise CheckpointError(f"{path}: {published!r} has no lora_{missing}")
    pairs = {published: (factors["A"], factors["B"]) for published, factors in found.items()}
    return Adapter(directory, rank, scale, MappingProxyType(pairs))


def merged_tensor(index: CheckpointIndex, adapter: Adapter, name: str) -> Tensor:
    """A tensor of a checkpoint that the adapter changes, merged: in the dtype of its file, bf16 if it is quantised.

    What a merged checkpoint holds and what a server computes with are both made here, and so are the same.
    """
    return adapter.merge(name, read_tensor(index, name))


def _read_config(path: Path) -> tuple[int, float]:
    """(rank, scale). Every key has a meaning that is honoured, or a value that asks for nothing."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; expected an adapter's directory, as PEFT saves one") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    if raw.get("peft_type") != "LORA":
        raise ConfigError(f"{path}: peft_type {raw.get('peft_type')!r} is not supported (only LORA)")
    if raw.get("bias", "none") != "none":
        raise ConfigError(f"{path}: bias {raw['bias']!r} is not supported (only none)")
    how = raw.get("init_lora_weights")
    if isinstance(how, str) and how.lower() not in _KEEPS_BASE:
        raise ConfigError(
            f"{path}: init_lora_weights {how!r} is not known to leave the base weights as they are; convert the "
            "adapter to a plain one"
        )
    for key in raw.keys() - _USED - _NOT_USED:
        if raw[key] not in (None, False, {}, []):
            raise ConfigError(f"{path}: {key} = {_shown(raw[key])} is not supported")
    rank, alpha, rslora = raw.get("r"), raw.get("lora_alpha"), raw.get("use_rslora", False)
    if type(rank) is not int or rank < 1:
        raise ConfigError(f"{path}: r = {rank!r} must be a whole number, at least 1")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) <= sys.float_info.max:
        raise ConfigError(f"{path}: lora_alpha = {alpha!r} must be a number")
    if not isinstance(rslora, bool):
        raise ConfigError(f"{path}: use_rslora = {rslora!r} must be true or false")
    return rank, alpha / (math.sqrt(rank) if rslora else rank)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _matrix(path: Path, name: str, spec: TensorSpec | None) -> TensorSpec:
    if spec is None or len(spec.shape) != 2 or spec.part == "embed":
        stacked = "; of routed experts, give each its own factors" if ".mlp.experts." in name else ""
        raise CheckpointError(f"{path}: tensor {name!r} is for no matrix of this model{stacked}")
    return spec


def _check_factor(path: Path, name: str, tensor: Tensor, spec: TensorSpec, factor: str, rank: int) -> None:
    outputs, inputs = spec.shape
    expected = (rank, inputs) if factor == "A" else (outputs, rank)
    if tuple(tensor.shape) != expected:
        raise CheckpointError(
            f"{path}: tensor {name!r} has shape {list(tensor.shape)}, expected {list(expected)} for {spec.name!r} "
            f"{list(spec.shape)} and r = {rank}"
        )
    if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{path}: tensor {name!r} holds other than finite numbers")


def factor_name(published: str, factor: str) -> str:
    """What PEFT calls a factor ("A" or "B") of a matrix."""
    return f"{PREFIX}{published.removesuffix('.weight')}.lora_{factor}.weight"


def module_names(published: Iterable[str]) -> list[str]:
    """The shortest names that `target_modules` has of these matrices: `q_a_proj` of every layer's."""
    return sorted({name.removesuffix(".weight").rpartition(".")[2] for name in published})
