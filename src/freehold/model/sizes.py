"""Configurations of the random-weight test models nano, small and medium. Torch-free.

GLM-5.2's architecture with every size different from its neighbours', so that a swapped dimension is a shape error or
a wrong result. Benchmarks that say nano, small or medium mean these.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from freehold.errors import InvalidRequest
from freehold.model.tokenizer import SPECIAL, TOY_RESERVED

Size = Literal["nano", "small", "medium"]
SIZES: tuple[Size, ...] = get_args(Size)

# fmt: off
_COLUMNS = ("nano", "small", "medium")
_TABLE: dict[str, tuple[int, int, int]] = {
    "vocab_size":            (512, 8192, 32768),
    "hidden_size":           (64, 512, 1024),
    "intermediate_size":     (128, 1024, 3072),
    "moe_intermediate_size": (32, 256, 512),
    "num_hidden_layers":     (8, 10, 16),
    "num_attention_heads":   (4, 8, 12),
    "num_key_value_heads":   (4, 8, 12),
    "q_lora_rank":           (64, 256, 512),
    "kv_lora_rank":          (64, 256, 512),
    "qk_nope_head_dim":      (32, 64, 192),
    "qk_rope_head_dim":      (32, 32, 64),
    "qk_head_dim":           (64, 96, 256),
    "v_head_dim":            (32, 64, 256),
    "head_dim":              (32, 64, 192),  # as misleading as in the published configs, and as unused
    "index_n_heads":         (4, 8, 16),
    "index_head_dim":        (64, 64, 128),
    "index_topk":            (16, 256, 2048),
    "n_routed_experts":      (16, 32, 64),
    "num_experts_per_tok":   (4, 4, 4),
}
# fmt: on
_COMMON: dict[str, Any] = {
    "architectures": ["GlmMoeDsaForCausalLM"],
    "model_type": "glm_moe_dsa",
    "dtype": "bfloat16",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "ep_size": 1,
    "pretraining_tp": 1,
    "use_cache": True,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-05,
    "max_position_embeddings": 1048576,
    "rope_parameters": {"rope_theta": 8000000, "rope_type": "default"},
    "rope_interleave": True,
    "index_topk_freq": 4,
    "index_skip_topk_offset": 3,
    "index_topk_pattern": None,
    "indexer_rope_interleave": True,
    "index_share_for_mtp_iteration": True,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "moe_router_dtype": "float32",
    "num_nextn_predict_layers": 1,
    "transformers_version": "5.12.0",
}


def size_config(size: str) -> dict[str, Any]:
    """config.json of a test model. Raises InvalidRequest for a size that does not exist."""
    if size not in SIZES:
        raise InvalidRequest(f"size {size!r} does not exist; choose one of {', '.join(SIZES)}", param="size")
    column = _COLUMNS.index(size)
    sizes = {key: values[column] for key, values in _TABLE.items()}
    layers, first_special = sizes["num_hidden_layers"], sizes["vocab_size"] - TOY_RESERVED
    ends = ("<|endoftext|>", "<|user|>", "<|observation|>")
    return {
        **_COMMON,
        **sizes,
        "rope_parameters": dict(_COMMON["rope_parameters"]),
        "indexer_types": ["full" if max(i - 2, 0) % 4 == 0 else "shared" for i in range(layers)],
        "mlp_layer_types": ["dense" if i < 3 else "sparse" for i in range(layers)],
        "eos_token_id": [first_special + SPECIAL[text] for text in ends],
        "pad_token_id": first_special + SPECIAL["<|endoftext|>"],
    }
