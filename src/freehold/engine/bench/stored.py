"""How a loaded model holds its matrices and its caches, and what it runs on: the facts that bounds are made from."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any, Literal, cast

import torch

from freehold.engine.runner import ModelRunner
from freehold.errors import EngineError
from freehold.model.decoder import DecoderLayer
from freehold.model.index_keys import Fp8Keys
from freehold.model.latents import Fp8Latents
from freehold.model.moe import MoE
from freehold.model.traffic import MATRICES, WEIGHT_FORMATS, Formats, Matrix, WeightFormat

_DTYPES: dict[torch.dtype, WeightFormat] = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def stored_formats(runner: ModelRunner) -> Formats:
    """Formats of the first layer that has each matrix; of one that no layer has, the embedding's."""
    model = runner.model
    embedding = format_of(model.embed_tokens)
    found: dict[Matrix, WeightFormat] = {"embed_tokens": embedding, "lm_head": format_of(model.lm_head.weight)}
    for layer in model.layers:
        assert isinstance(layer, DecoderLayer)
        for name, weight in _matrices(layer):
            found.setdefault(name, format_of(weight))
    weights: dict[Matrix, WeightFormat] = {name: found.get(name, embedding) for name in MATRICES}
    latent = runner.cache.latent[0]
    index = next(keys for keys in runner.cache.index if keys is not None)  # the first layer is a full one
    return Formats(
        weights,
        "fp8_ds_mla" if isinstance(latent, Fp8Latents) else _cache_format(latent),
        "fp8" if isinstance(index, Fp8Keys) else _cache_format(index),
    )


def _cache_format(cache: torch.Tensor) -> Literal["fp32", "bf16"]:
    match format_of(cache):
        case "fp32" | "bf16" as format:
            return format
        case other:
            raise EngineError(f"profiling: a cache of {other} is not known here")


def format_of(weight: Any) -> WeightFormat:
    """Of a tensor by its dtype, of a packed weight by its `kind`. Raises EngineError for another one."""
    kind = getattr(weight, "kind", None)
    if kind in WEIGHT_FORMATS:
        return cast(WeightFormat, kind)
    if isinstance(weight, torch.Tensor) and weight.dtype in _DTYPES:
        return _DTYPES[weight.dtype]
    raise EngineError(
        f"profiling: a weight stored as {kind or getattr(weight, 'dtype', type(weight))} is not known here"
    )


def processor() -> str:
    """The processor's name, as the system has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _matrices(layer: DecoderLayer) -> list[tuple[Matrix, Any]]:
    attention, mlp = layer.self_attn, layer.mlp
    found: list[tuple[Matrix, Any]] = [
        ("q_a_proj", attention.q_a_proj.weight),
        ("q_b_proj", attention.q_b_proj.weight),
        ("kv_a_proj_with_mqa", attention.kv_a_proj_with_mqa.weight),
        ("kv_b_proj", getattr(attention.kv_b_proj.weight, "up_value", attention.kv_b_proj.weight)),
        ("o_proj", attention.o_proj.weight),
    ]
    if attention.indexer is not None:
        found += [
            ("indexer.wq_b", attention.indexer.wq_b.weight),
            ("indexer.wk", attention.indexer.wk.weight),
            ("indexer.weights_proj", attention.indexer.weights_proj.weight),
        ]
    if isinstance(mlp, MoE):
        found += [
            ("router", mlp.gate.weight),
            ("routed", mlp.experts.gate_up_proj),
            ("shared", mlp.shared_experts.gate_proj.weight),
        ]
    else:
        found.append(("dense", mlp.gate_proj.weight))
    return found
