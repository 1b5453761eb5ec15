"""The paged caches: one latent per token and layer, one index key per token and *full* layer.

A slot is block * block_size + offset and means the same token in every layer, which is what lets a shared layer
use the slots that a full layer selected. Shape suffixes: S slots, L latent_dim = kv_lora_rank + qk_rope_head_dim,
D index_head_dim.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from typing import Literal

import torch
from torch import Tensor

from freehold.errors import ConfigError
from freehold.model.cache_layout import IndexFormat, LatentFormat, index_key_bytes, latent_bytes
from freehold.model.config import GlmConfig
from freehold.model.index_keys import FP8_GROUP, Fp8Keys, IndexKeys
from freehold.model.latents import Fp8Latents, Latents

IndexCache = Literal["auto", "fp8"]
"""How index keys are stored: in the model's dtype, or as FP8 E4M3 with one scale a token."""

LatentCache = Literal["auto", "fp8"]
"""How latents are stored: in the model's dtype, or as FP8 E4M3 with a scale for each 128 values and the rope key in
bf16."""

_DTYPES: dict[torch.dtype, Literal["fp32", "bf16"]] = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_HUGE = 1 << 21  # bytes of a huge page on x86-64


def cached_layers(config: GlmConfig) -> int:
    """Layers with a latent cache: all of them, and the MTP layer."""
    return config.num_hidden_layers + config.num_nextn_predict_layers


def index_cached_layers(config: GlmConfig) -> tuple[int, ...]:
    """Layers with an index-key cache: the full ones, and the MTP layer (which owns an indexer)."""
    mtp = range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers)
    return (*config.full_layers, *mtp)


def cache_formats(
    dtype: torch.dtype, index_cache: IndexCache = "auto", latent_cache: LatentCache = "auto"
) -> tuple[LatentFormat, IndexFormat]:
    """The formats of latents and index keys as `cache_layout` names them. Raises ConfigError for another dtype."""
    if dtype not in _DTYPES:
        raise ConfigError(f"there is no cache of {dtype}")
    return (
        "fp8_ds_mla" if latent_cache == "fp8" else _DTYPES[dtype],
        "fp8" if index_cache == "fp8" else _DTYPES[dtype],
    )


def cache_bytes_per_token(
    config: GlmConfig, dtype: torch.dtype, index_cache: IndexCache = "auto", latent_cache: LatentCache = "auto"
) -> int:
    """Bytes one token takes in all layers' caches."""
    latent, index = cache_formats(dtype, index_cache, latent_cache)
    keys = len(index_cached_layers(config)) * index_key_bytes(config, index)
    return cached_layers(config) * latent_bytes(config, latent) + keys


class PagedCache:
    """Tensors of the caches of every layer.

    latent[layer]: [S, L], the normed latent followed by the roped shared key (interleaved pairs stay in place), or the
    same in 8 bits (latent_cache "fp8").
    index[layer]: [S, D] for full layers, or the same in 8 bits (index_cache "fp8"), None for shared ones.
    Raises ConfigError for sizes that fp8 does not take: a key of more values than one scale covers, or a latent whose
    rank is not a multiple of 4.
    """

    def __init__(
        self,
        config: GlmConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        index_cache: IndexCache = "auto",
        latent_cache: LatentCache = "auto",
    ) -> None:
        width = config.index_head_dim
        if index_cache == "fp8" and width > FP8_GROUP:
            raise ConfigError(f"an index cache in fp8 needs index_head_dim <= {FP8_GROUP}; this model has {width}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        slots = num_blocks * block_size
        owners = set(index_cached_layers(config))

        def keys() -> IndexKeys:
            if index_cache == "fp8":
                values = _uninitialised((slots, width), torch.uint8, device)
                return Fp8Keys(values, _uninitialised((slots,), torch.float32, device))
            return _uninitialised((slots, width), dtype, device)

        def latents() -> Latents:
            if latent_cache == "fp8":
                rank, rope = config.kv_lora_rank, config.qk_rope_head_dim
                records = _uninitialised((slots, Fp8Latents.record_bytes(rank, rope)), torch.uint8, device)
                return Fp8Latents(records, rank, rope)
            return _uninitialised((slots, config.latent_dim), dtype, device)

        layers = range(cached_layers(config))
        self.latent: list[Latents] = [latents() for _ in layers]
        self.index: list[IndexKeys | None] = [keys() if layer in owners else None for layer in layers]

    def blank(self, layer: int, slots_T: Tensor) -> None:
        """Zeros in the given slots of one layer's caches, as if of a token that nothing attends to in particular."""
        latents = self.latent[layer]
        (latents.records_SB if isinstance(latents, Fp8Latents) else latents)[slots_T] = 0
        keys = self.index[layer]
        if isinstance(keys, Fp8Keys):
            keys.values_SD[slots_T], keys.scales_S[slots_T] = 0, 0.0
        elif keys is not None:
            keys[slots_T] = 0

    @property
    def num_bytes(self) -> int:
        return sum(tensors.nbytes for tensors in (*self.latent, *self.index) if tensors is not None)


def _uninitialised(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """A tensor whose pages are committed only when first written; no slot of a cache is read before it is.

    Large ones ask for huge pages: a scan of a long context, and reading latents here and there, then miss the TLB less.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or nbytes < _HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
