"""The paged caches: one latent per token and layer, one index key per token and *full* layer.

A slot is block * block_size + offset and means the same token in every layer, which is what lets a shared layer
use the slots that a full layer selected. Shape suffixes: S slots, L latent_dim = kv_lora_rank + qk_rope_head_dim,
D index_head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from freehold.model.config import GlmConfig


def cached_layers(config: GlmConfig) -> int:
    """Layers with a latent cache: all of them, and the MTP layer."""
    return config.num_hidden_layers + config.num_nextn_predict_layers


def index_cached_layers(config: GlmConfig) -> tuple[int, ...]:
    """Layers with an index-key cache: the full ones, and the MTP layer (which owns an indexer)."""
    mtp = range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers)
    return (*config.full_layers, *mtp)


def cache_bytes_per_token(config: GlmConfig, dtype: torch.dtype) -> int:
    """Bytes one token takes in all layers' caches."""
    latent = cached_layers(config) * config.latent_dim
    index = len(index_cached_layers(config)) * config.index_head_dim
    return (latent + index) * dtype.itemsize


class PagedCache:
    """Tensors of the caches of every layer.

    latent[layer]: [S, L], the normed latent followed by the roped shared key (interleaved pairs stay in place).
    index[layer]: [S, D] for full layers, None for shared ones.
    """

    def __init__(
        self,
        config: GlmConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        slots = num_blocks * block_size
        owners = set(index_cached_layers(config))
        # Uninitialised: pages are committed only when first written, and no slot is read before it is.
        self.latent: list[Tensor] = [
            torch.empty(slots, config.latent_dim, dtype=dtype, device=device) for _ in range(cached_layers(config))
        ]
        self.index: list[Tensor | None] = [
            torch.empty(slots, config.index_head_dim, dtype=dtype, device=device) if layer in owners else None
            for layer in range(cached_layers(config))
        ]

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.latent, *self.index) if t is not None)
