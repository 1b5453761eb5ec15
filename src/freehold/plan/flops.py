"""FLOP of one more token at a given context, with and without IndexShare. Torch-free.

    flops_per_token(config, 1_048_576)                       # as shipped: 21 of GLM-5.2's 78 layers own an indexer
    flops_per_token(config, 1_048_576, shared=False)         # an indexer on every layer: 2.74 times as many

Two FLOP a weight and token that is multiplied (norms, embedding lookup and the MTP layer are not), and for the context:
each layer attends to min(context, topk) latents with every head, absorbed (latent and rope key for scores, latent for
values) or expanded (as prompts are computed); each indexer scores the whole context.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from freehold.model.config import GlmConfig
from freehold.model.names import tensor_specs


def flops_per_token(config: GlmConfig, context: int, *, shared: bool = True, absorbed: bool = True) -> float:
    """FLOP of one forward pass over one token that sees `context` tokens, itself included.

    shared: only full layers have an indexer, as the model is; else all of them. absorbed: the form of attention.
    """
    layers, full = config.num_hidden_layers, len(config.full_layers)
    indexers = full if shared else layers
    plain, indexer = _multiplied(config)
    if absorbed:
        attended = 2 * config.kv_lora_rank + config.qk_rope_head_dim
    else:
        attended = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    seen = min(context, config.index_topk)
    scores = 2 * config.index_n_heads * config.index_head_dim + 2 * config.index_n_heads
    return (
        2.0 * (plain + indexers * indexer)
        + layers * 2.0 * config.num_attention_heads * seen * attended
        + indexers * float(context) * scores
    )


def index_share(config: GlmConfig, context: int, *, absorbed: bool = True) -> float:
    """How many times as many FLOP a token takes without IndexShare."""
    without = flops_per_token(config, context, shared=False, absorbed=absorbed)
    return without / flops_per_token(config, context, absorbed=absorbed)


@cache
def _multiplied(config: GlmConfig) -> tuple[int, int]:
    """Weights that one token is multiplied with: outside indexers, and those of one indexer."""
    # One expert stands for those that a token is sent to: naming all of them would take a hundred times as long.
    one = replace(config, n_routed_experts=1, num_experts_per_tok=1, n_group=1, topk_group=1)
    plain = indexers = 0
    for spec in tensor_specs(one):
        if spec.layer == config.num_hidden_layers or spec.part in ("embed", "norm") or len(spec.shape) < 2:
            continue
        if spec.part == "indexer":
            indexers += spec.size
        elif spec.part == "routed_expert":
            plain += spec.size * config.num_experts_per_tok
        elif spec.part == "router":
            plain += spec.size * config.n_routed_experts
        else:
            plain += spec.size
    return plain, indexers // len(config.full_layers)
