"""Random adapters in PEFT's files, checkpoints with one merged in, and what a model holds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from freehold.headers import SINGLE_NAME, CheckpointIndex
from freehold.model.adapters import merged_tensor, read_adapter
from freehold.model.config import GlmConfig
from freehold.model.glm import Glm
from freehold.model.names import tensor_specs
from freehold.model.packed import PackedWeight

ATTENTION = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
SHARED = ("shared_experts.gate_proj", "shared_experts.up_proj", "shared_experts.down_proj")
EXPERTS = ("experts.1.gate_proj", "experts.3.down_proj", "experts.3.up_proj")
INDEXER = ("wq_b", "wk", "weights_proj")
EVERYTHING = (*ATTENTION, *SHARED, *EXPERTS, *INDEXER, "eh_proj", "lm_head", "mlp.gate", "layers.0.mlp.up_proj")
"""Some of every kind of matrix: in the MTP layer and the head, too."""


def matrices(config: GlmConfig, targets: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Published names, and shapes, of the matrices whose module's name ends with one of the targets."""
    ends = tuple(f".{target}.weight" for target in targets)
    return {
        spec.name: (spec.shape[0], spec.shape[1])
        for spec in tensor_specs(config)
        if len(spec.shape) == 2 and f".{spec.name}".endswith(ends)
    }


def factors_of(config: GlmConfig, targets: Iterable[str], *, seed: int, rank: int, size: float) -> dict[str, Tensor]:
    """Under PEFT's names; size: what the products B A come to, roughly."""
    g = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, (outputs, inputs) in matrices(config, targets).items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(rank, inputs, generator=g)
        tensors[f"{stem}.lora_B.weight"] = torch.randn(outputs, rank, generator=g) * size
    return tensors


def write_adapter(
    out: Path,
    base: Path,
    targets: Iterable[str] = ATTENTION,
    *,
    seed: int = 0,
    rank: int = 4,
    alpha: float = 8.0,
    size: float = 0.05,
    dtype: torch.dtype = torch.float32,
    tensors: dict[str, Tensor] | None = None,
    **config: Any,
) -> Path:
    """An adapter's directory, for the checkpoint at `base`, with the keys that PEFT writes."""
    if tensors is None:
        tensors = factors_of(GlmConfig.from_file(base), targets, seed=seed, rank=rank, size=size)
    out.mkdir(parents=True)
    written = {
        "alpha_pattern": {}, "auto_mapping": None, "base_model_name_or_path": str(base), "bias": "none",
        "corda_config": None, "eva_config": None, "exclude_modules": None, "fan_in_fan_out": False,
        "inference_mode": True, "init_lora_weights": True, "layer_replication": None, "layers_pattern": None,
        "layers_to_transform": None, "loftq_config": {}, "lora_alpha": alpha, "lora_bias": False, "lora_dropout": 0.05,
        "megatron_config": None, "megatron_core": "megatron.core", "modules_to_save": None, "peft_type": "LORA",
        "qalora_group_size": 16, "r": rank, "rank_pattern": {}, "revision": None, "target_modules": list(targets),
        "target_parameters": None, "task_type": "CAUSAL_LM", "trainable_token_indices": None, "use_dora": False,
        "use_qalora": False, "use_rslora": False,
    }  # fmt: skip
    (out / "adapter_config.json").write_text(json.dumps(written | config))
    stored = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(stored, out / "adapter_model.safetensors", metadata={"format": "pt"})
    return out


def write_merged(out: Path, base: Path, adapter: Path) -> Path:
    """The (unquantised) checkpoint at `base` with the adapter merged in."""
    shutil.copytree(base, out)
    read, index = read_adapter(adapter, GlmConfig.from_file(base)), CheckpointIndex.open(base)
    held = safetensors.torch.load_file(base / SINGLE_NAME)
    held |= {name: merged_tensor(index, read, name) for name in read.factors}
    (out / SINGLE_NAME).unlink()
    safetensors.torch.save_file(held, out / SINGLE_NAME, metadata={"format": "pt"})
    return out


def held_by(model: Glm) -> dict[str, Tensor]:
    """All that a model computes with, by the names of its modules: parameters, codes and scales."""
    held = dict(model.named_parameters())
    for name, part in model.named_modules():
        if isinstance(part, PackedWeight):
            held |= {f"{name}.codes": part.codes} | ({} if part.scales is None else {f"{name}.scales": part.scales})
    return held
