"""The shape of `freehold-tiny`: every part of GLM-5.2 at a size that two CPU cores train in an hour or two. Torch-free.

GLM's pattern of indexers (a full layer at 0, 1, 2, 6, each shared up to the next), dense layers first, a mixture of
experts with a shared one after, an MTP layer that shares its selection; index_topk so small that ordinary prompts
are longer. rope_theta fits contexts of some thousand tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from freehold.errors import ConfigError
from freehold.model.sizes import size_config
from freehold.model.tokenizer import SPECIAL, TOY_RESERVED, Tokenizer

ENDS = ("<|endoftext|>", "<|user|>", "<|observation|>")
_SIZES: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 192,
    "intermediate_size": 320,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "qk_head_dim": 48,
    "v_head_dim": 32,
    "head_dim": 16,
    "index_n_heads": 4,
    "index_head_dim": 32,
    "index_topk": 64,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_theta": 10000, "rope_type": "default"},
}


def tiny_config(**changes: Any) -> dict[str, Any]:
    """config.json of freehold-tiny, or of a variation of it."""
    config = {**size_config("nano"), **_SIZES, **changes}
    layers, first_special = config["num_hidden_layers"], config["vocab_size"] - TOY_RESERVED
    config["indexer_types"] = ["full" if max(i - 2, 0) % 4 == 0 else "shared" for i in range(layers)]
    config["mlp_layer_types"] = ["dense" if i < config["first_k_dense_replace"] else "sparse" for i in range(layers)]
    config["eos_token_id"] = [first_special + SPECIAL[text] for text in ENDS]
    config["pad_token_id"] = first_special + SPECIAL["<|endoftext|>"]
    return {**config, **changes}


def with_ends(config: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """The config with the ids at which this tokenizer's turns end: a tokenizer that found fewer pieces than it had room
    for has its control tokens lower, and a model with other ends would never stop.

    Raises ConfigError for a tokenizer without GLM's control tokens.
    """
    ends = [tokenizer.special_id(text) for text in ENDS]
    if None in ends:
        raise ConfigError(f"the tokenizer lacks {ENDS[ends.index(None)]}: a model could not end what it says")
    return {**config, "eos_token_id": ends, "pad_token_id": ends[0]}
