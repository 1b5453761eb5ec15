"""Writes the draft model: a checkpoint whose MTP layer predicts its own target well, and only if it is run rightly.

    python benchmarks/_draft_model.py DIR              # the core: 160 wide, 10 layers
    python benchmarks/_draft_model.py DIR --size wide  # the same functions in the dimensions of `small`, 26 layers
    freehold serve DIR

No training: target (`_draft_target.py`) and head (`_draft_head.py`) are built from their parts, in about a second, and
the same on every machine. Both continue songs (`_draft_language.py`), which takes attention back beyond index_topk.
Files and names are as published; the engine runs it like any other checkpoint.

`wide` holds the core's matrices in the corners of larger ones, else zero (norm weights account for the dimensions
that are always zero). Every matrix is stored, read and multiplied in full, so a step costs what it costs with any
weights of these dimensions. Two things are the core's: index_topk, which stays 64, and which experts a token takes, 4
of 32 by a random router over the whole hidden state; four neighbouring tokens take about 10 different ones in a layer
(independent ones would take 13), which is what verifying three drafts must read. It has 26 layers, a third of
GLM-5.2's: in a model of 10, one draft step is already a tenth of the target's.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from _draft_head import warm_start
from _draft_target import Array, Tensors, build_target, core_config, layer_kinds

from freehold.headers import SINGLE_NAME, encode_header
from freehold.model.checkpoint_files import atomic_write, write_json, write_manifest
from freehold.model.config import GlmConfig
from freehold.model.names import TensorSpec, tensor_specs
from freehold.model.random_tensors import encode
from freehold.model.sizes import size_config
from freehold.model.storage import stored_tensors
from freehold.model.tokenizer import Tokenizer

DraftSize = Literal["core", "wide"]
_WIDE_LAYERS = 26
_PIECE = 1 << 20  # elements encoded at a time
_KEPT = ("qk_nope_head_dim", "qk_rope_head_dim", "qk_head_dim", "v_head_dim", "index_head_dim", "index_topk")


def draft_config(size: DraftSize, dtype: str = "bfloat16") -> dict[str, Any]:
    """config.json."""
    core = core_config() | {"dtype": dtype}
    if size == "core":
        return core
    return size_config("small") | {key: core[key] for key in (*_KEPT, "dtype")} | layer_kinds(_WIDE_LAYERS)


def draft_tensors(raw: dict[str, Any], seed: int = 0) -> Iterator[tuple[TensorSpec, Array]]:
    """Every tensor of the checkpoint with this config.json, fp32, in file order."""
    config = GlmConfig.from_dict(raw)
    core_raw = core_config() | {
        key: raw[key] for key in ("vocab_size", "eos_token_id", "pad_token_id", *layer_kinds(0))
    }
    core = GlmConfig.from_dict(core_raw)
    tensors: Tensors = build_target(core_raw, seed)
    warm_start(tensors, core, seed)
    for small, spec in zip(tensor_specs(core), tensor_specs(config), strict=True):
        yield spec, widen(spec.name, tensors[small.name], core, config, spec.shape)


def widen(name: str, values: Array, core: GlmConfig, wide: GlmConfig, shape: tuple[int, ...]) -> Array:
    """A core tensor as a corner of the wide model's of this shape, so that both models compute the same."""
    if values.shape == shape:
        return values
    kind = name.removesuffix(".weight").rsplit(".", 1)[-1]
    out = np.zeros(shape, np.float32)
    if values.ndim == 1:  # a norm: its mean of squares is over the dead dimensions, too
        out[: values.size] = values * np.float32(math.sqrt(values.size / out.size))
    elif kind == "kv_a_proj_with_mqa":  # the rotary rows come after the latent's
        out[: core.kv_lora_rank, : core.hidden_size] = values[: core.kv_lora_rank]
        out[wide.kv_lora_rank :, : core.hidden_size] = values[core.kv_lora_rank :]
    else:
        part = values.reshape(_factors(kind, core, values.shape))
        out.reshape(_factors(kind, wide, shape))[tuple(slice(size) for size in part.shape)] = part
    return out


def _factors(kind: str, config: GlmConfig, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a matrix with heads, or what else is laid end to end, in a dimension of their own."""
    heads, index_heads = config.num_attention_heads, config.index_n_heads
    return {
        "q_b_proj": (heads, config.qk_head_dim, config.q_lora_rank),
        "kv_b_proj": (heads, config.qk_nope_head_dim + config.v_head_dim, config.kv_lora_rank),
        "o_proj": (config.hidden_size, heads, config.v_head_dim),
        "wq_b": (index_heads, config.index_head_dim, config.q_lora_rank),
        "eh_proj": (config.hidden_size, 2, config.hidden_size),
    }.get(kind, shape)


def write_draft_model(directory: Path, size: DraftSize = "core", dtype: str = "bfloat16", seed: int = 0) -> Path:
    """Write the checkpoint, and return its directory."""
    raw = draft_config(size, dtype)
    config = GlmConfig.from_dict(raw)
    directory.mkdir(parents=True, exist_ok=True)
    stored = list(stored_tensors(config))
    with atomic_write(directory / SINGLE_NAME) as file:
        file.write(encode_header(((each.name, each.dtype, each.shape) for each in stored), {"format": "pt"}))
        for each, (spec, values) in zip(stored, draft_tensors(raw, seed), strict=True):
            if each.name != spec.name:
                raise RuntimeError(f"{spec.name} is made where {each.name} is stored")
            flat = np.ascontiguousarray(values, np.float32).reshape(-1)
            for first in range(0, flat.size, _PIECE):
                file.write(encode(flat[first : first + _PIECE], each.dtype))
        digest = file.digest
    write_json(directory / "config.json", raw)
    ends = {key: raw[key] for key in ("eos_token_id", "pad_token_id")}
    write_json(directory / "generation_config.json", ends | {"temperature": 1.0, "top_p": 0.95})
    Tokenizer.toy(config.vocab_size).save(directory)
    write_manifest(directory, {SINGLE_NAME: digest})
    return directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--size", choices=get_args(DraftSize), default="core")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    args = parser.parse_args()
    print(f"wrote {write_draft_model(args.directory, args.size, args.dtype)}")


if __name__ == "__main__":
    main()
