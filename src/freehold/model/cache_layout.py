"""Bytes that one token takes in the caches, by storage format. Torch-free formulas.

Each layer caches the normed latent and the roped shared key (kv_lora_rank + qk_rope_head_dim elements); each full
layer also caches one index key (index_head_dim elements). The MTP layer, if used, adds one of each.

Source: vLLM 0.32 FlashMLA sparse and SGLang 0.5.23 cache layouts; GLM-5.2 numbers in comments.
"""

from __future__ import annotations

from typing import Literal, get_args

from freehold.model.config import GlmConfig

LatentFormat = Literal["fp32", "bf16", "fp8_ds_mla", "fp8", "nvfp4_ds_mla"]
IndexFormat = Literal["fp32", "bf16", "fp8"]
LATENT_FORMATS: tuple[LatentFormat, ...] = get_args(LatentFormat)
INDEX_FORMATS: tuple[IndexFormat, ...] = get_args(IndexFormat)
_FP8_GROUP = 128  # elements that share an fp32 scale
_FP4_GROUP = 16  # elements that share an FP8 scale


def latent_bytes(config: GlmConfig, format: LatentFormat) -> int:
    """Bytes a token takes in one layer's latent cache.

    fp32, bf16: latent and rope key as they are (2,304; 1,152).
    fp8_ds_mla: FP8 latent, an fp32 scale for each 128 of it, the rope key in bf16 (656).
    fp8: all FP8 with one scale for the tensor (576).
    nvfp4_ds_mla: FP4 latent, an FP8 scale for each 16 of it, the rope key in FP8 (352).
    """
    latent, rope = config.kv_lora_rank, config.qk_rope_head_dim
    match format:
        case "fp32":
            return 4 * (latent + rope)
        case "bf16":
            return 2 * (latent + rope)
        case "fp8_ds_mla":
            return latent + 4 * -(-latent // _FP8_GROUP) + 2 * rope
        case "fp8":
            return latent + rope
        case "nvfp4_ds_mla":
            return -(-latent // 2) + -(-latent // _FP4_GROUP) + rope


def index_key_bytes(config: GlmConfig, format: IndexFormat) -> int:
    """Bytes a token takes in one full layer's index-key cache: fp32 512, bf16 256, fp8 with fp32 scales 132."""
    dim = config.index_head_dim
    match format:
        case "fp32":
            return 4 * dim
        case "bf16":
            return 2 * dim
        case "fp8":
            return dim + 4 * -(-dim // _FP8_GROUP)


def cache_bytes_per_token(config: GlmConfig, latent: LatentFormat, index: IndexFormat, *, mtp: bool = False) -> int:
    """Bytes a token takes in all layers; mtp adds the MTP layer's latent and index key (if the model has one)."""
    extra = int(mtp and config.has_mtp)
    layers, full = config.num_hidden_layers + extra, len(config.full_layers) + extra
    return layers * latent_bytes(config, latent) + full * index_key_bytes(config, index)
