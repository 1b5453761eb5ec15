"""What a decode step or a prefill needs of a machine at least: bytes to read, and multiplications.

Counted on the loaded weights, apart from `freehold.model.traffic`, and always lower bounds of the model's own
arithmetic: weights that any implementation has to read once a step, so that a share of a ceiling is never flattered.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from freehold.model.config import GlmConfig
from freehold.model.glm import Glm


def decode_bytes(model: Glm, context: int) -> int:
    """Bytes that one decode step of one request reads: weights in the form they are loaded in, of the experts those
    that a token chooses, and the cache rows of the index keys and of the selection. One row of the embedding and the
    activations are left out, and below index_topk what only the selection would need."""
    config = model.config
    chosen = config.num_experts_per_tok / config.n_routed_experts
    total = 0.0
    for name, tensor in _weights(model):
        selects = ".indexer." in name and (".wq_b" in name or ".weights_proj" in name)
        if name.startswith(("embed_tokens", "mtp.")) or (selects and context <= config.index_topk):
            continue
        total += (chosen if ".experts." in name else 1.0) * tensor.numel() * tensor.element_size()
    selected = min(context, config.index_topk)
    total += config.num_hidden_layers * selected * config.latent_dim * model.dtype.itemsize
    if context > config.index_topk:
        total += len(config.full_layers) * context * config.index_head_dim * model.dtype.itemsize
    return round(total)


def _weights(model: Glm) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that a module holds: parameters, buffers and plain attributes (packed weights are those)."""
    for path, module in model.named_modules():
        attributes = ((name, value) for name, value in vars(module).items() if isinstance(value, Tensor))
        for name, tensor in (
            *module.named_parameters(recurse=False),
            *module.named_buffers(recurse=False),
            *attributes,
        ):
            yield f"{path}.{name}".removeprefix("."), tensor


def prefill_operations(config: GlmConfig, length: int) -> int:
    """Operations (2 a multiply-add) of a prompt of at most index_topk tokens: matrices, of the experts only those
    chosen, the head once, and causal attention with per-head keys and values."""
    if length > config.index_topk:
        raise ValueError(f"counted up to index_topk, {config.index_topk} tokens only")
    hidden, heads, layers = config.hidden_size, config.num_attention_heads, config.num_hidden_layers
    query = config.q_lora_rank * (hidden + heads * config.qk_head_dim)
    latent = hidden * config.latent_dim + config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    attention = query + latent + heads * config.v_head_dim * hidden
    experts = config.num_experts_per_tok + config.n_shared_experts
    moe = hidden * (3 * experts * config.moe_intermediate_size + config.n_routed_experts)
    dense = 3 * hidden * config.intermediate_size
    sparse = sum(kind == "sparse" for kind in config.mlp_layer_types)
    index_keys = len(config.full_layers) * hidden * config.index_head_dim
    matrices = layers * attention + sparse * moe + (layers - sparse) * dense + index_keys
    pairs = length * (length + 1) // 2 * heads * (config.qk_head_dim + config.v_head_dim)
    return 2 * (length * matrices + hidden * config.vocab_size + layers * pairs)
