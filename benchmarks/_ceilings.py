"""What the machine could do at most, measured, and what a decode step or a prefill needs of it at least.

The needs are lower bounds of the model's own arithmetic, so a share of a ceiling is never flattered: weights that any
implementation has to read once a step, and multiplications it has to do.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from freehold.model.glm import Glm


def read_bandwidth(threads: int, gigabytes: float = 1.25, repeats: int = 8) -> float:
    """Bytes a second, the best of several ways and times to read a buffer that no cache holds."""
    buffer = torch.ones(int(gigabytes * 1e9) // 4)
    ways: tuple[Callable[[], Any], ...] = (buffer.sum, buffer.amax, lambda: torch.dot(buffer, buffer))
    torch.set_num_threads(threads)
    try:
        best = min(_seconds(way) for way in ways for _ in range(repeats))
    finally:
        torch.set_num_threads(1)
    return buffer.numel() * 4 / best


def gemm_rate(threads: int, repeats: int = 5) -> float:
    """Operations a second (2 a multiply-add) of torch's bf16 matrix multiplication, the best of some sizes."""
    torch.set_num_threads(threads)
    rates = []
    try:
        for rows, outputs, inner in ((512, 4096, 1024), (2048, 2048, 2048), (4096, 4096, 1024)):
            a, b = torch.randn(rows, inner).bfloat16(), torch.randn(outputs, inner).bfloat16()
            seconds = min(_seconds(lambda a=a, b=b: a @ b.T) for _ in range(repeats))  # type: ignore[misc]
            rates.append(2 * rows * outputs * inner / seconds)
    finally:
        torch.set_num_threads(1)
    return max(rates)


def _seconds(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def decode_bytes(model: Glm, context: int) -> int:
    """Bytes that one decode step of one request reads: weights in the form they are loaded in, of the experts those
    that a token chooses, and the cache rows of the index keys and of the selection. One row of the embedding and the
    activations are left out, and below index_topk what only the selection would need."""
    config = model.config
    total = 0.0
    for name, share in _shares(model).items():
        if context <= config.index_topk and ".indexer." in name and (".wq_b" in name or ".weights_proj" in name):
            continue
        tensor = model.get_parameter(name) if name in dict(model.named_parameters()) else model.get_buffer(name)
        total += share * tensor.numel() * tensor.element_size()
    selected = min(context, config.index_topk)
    total += config.num_hidden_layers * selected * config.latent_dim * model.dtype.itemsize
    if context > config.index_topk:
        total += len(config.full_layers) * context * config.index_head_dim * model.dtype.itemsize
    return round(total)


def prefill_operations(model: Glm, length: int) -> int:
    """Operations (2 a multiply-add) of a prompt of at most index_topk tokens: matrices, of the experts only those
    chosen, the head once, and causal attention with per-head keys and values. Only for bf16 weights: quantised ones
    have other shapes."""
    config = model.config
    if length > config.index_topk:
        raise ValueError(f"counted up to index_topk, {config.index_topk} tokens only")
    matrices = 0.0
    for name, share in _shares(model).items():
        parameter = model.get_parameter(name)
        if parameter.dim() < 2 or "lm_head" in name or (".indexer." in name and ".wk." not in name):
            continue
        matrices += share * parameter.numel()
    pairs = length * (length + 1) // 2
    per_pair = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    head = model.lm_head.weight.numel()
    return round(2 * (length * matrices + head + config.num_hidden_layers * pairs * per_pair))


def _shares(model: Glm) -> dict[str, float]:
    """Names of the tensors a token's step needs, and which share of each."""
    config = model.config
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    chosen = config.num_experts_per_tok / config.n_routed_experts
    return {
        name: chosen if ".experts." in name else 1.0 for name in names if not name.startswith(("embed_tokens", "mtp."))
    }
