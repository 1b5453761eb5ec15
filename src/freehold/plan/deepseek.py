"""DeepSeek-V3.2 in the words of a `GlmConfig`: the same layers (latent attention, indexer, experts) in other sizes.

Only for sizes and speeds: its rotary embedding is scaled and its indexer's is laid out in halves, which a `GlmConfig`
does not say and no size depends on. Torch-free.

Source: https://huggingface.co/deepseek-ai/DeepSeek-V3.2/blob/main/config.json (December 2025).
"""

from __future__ import annotations

from types import MappingProxyType

from freehold.model.config import GlmConfig, IndexerType, MlpType
from freehold.plan.types import Stored

_LAYERS, _DENSE = 61, 3


def deepseek_config() -> GlmConfig:
    """Every layer has an indexer of its own."""
    full: IndexerType = "full"
    dense: MlpType = "dense"
    sparse: MlpType = "sparse"
    return GlmConfig(
        vocab_size=129280,
        hidden_size=7168,
        intermediate_size=18432,
        moe_intermediate_size=2048,
        num_hidden_layers=_LAYERS,
        num_attention_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        index_n_heads=64,
        index_head_dim=128,
        index_topk=2048,
        n_routed_experts=256,
        num_experts_per_tok=8,
        n_shared_experts=1,
        n_group=8,
        topk_group=4,
        max_position_embeddings=163840,
        rms_norm_eps=1e-6,
        latent_norm_eps=1e-6,
        rope_theta=10000.0,
        rope_interleave=True,
        indexer_rope_interleave=False,
        attention_bias=False,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        indexer_types=(full,) * _LAYERS,
        mlp_layer_types=(dense,) * _DENSE + (sparse,) * (_LAYERS - _DENSE),
        eos_token_ids=(1,),
        num_nextn_predict_layers=1,
        index_share_for_mtp_iteration=False,
        dtype="bfloat16",
    )


def deepseek_extras(config: GlmConfig) -> list[Stored]:
    """The copies of the embedding and of the head that its MTP layer brings."""
    size = config.vocab_size * config.hidden_size
    nbytes = MappingProxyType({"BF16": 2 * size})
    layer = config.num_hidden_layers
    return [Stored(layer, "embed", "embed_tokens", size, nbytes), Stored(layer, "head", "lm_head", size, nbytes)]
