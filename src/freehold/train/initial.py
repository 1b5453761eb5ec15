"""Weights that training starts from.

Matrices keep the size of what goes through them (variance 1 / inputs); those that write to the residual stream start
smaller, by the number of writers (Radford et al. 2019, GPT-2); embeddings have half the size of a normed state, the
head begins near indifference; norms are 1, biases 0.

Copying takes two layers: heads that look at the token before, and heads that look for what followed the same token
earlier (induction heads, Olsson et al. 2022). Models find them by chance, after more tokens than two CPU cores can
train. So a model is given a first sketch of both, in layers 0 and 1, and is free to change it; as Trockman and Kolter
2023 ("Mimetic initialization") do with what attention layers come to look like.

Shape suffixes: H hidden, N heads, C values of a head, R query latent, V latent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from freehold.model.glm import Glm
from freehold.model.layers import Linear
from freehold.model.mla import HeadProjection, LatentAttention

_WRITERS = ("o_proj.weight", "down_proj.weight", "experts.down_proj")
_SIZES = {"embed_tokens": 0.5, "lm_head.weight": 0.01}
_CONSTANT = 1.5  # the first value of every embedding
_SHARPNESS = 7.0  # of query and key in each rotation: scores of up to its square times the softmax scale
_ROTATIONS = 2
_LIKENESS = 1.7  # of query and key of the same token: likewise
_SAID, _HEARD = 0.5, 0.5  # how loud what is copied is written, and read by the head
_SHOWN = 1.5  # how loud the token before is written, beside the token itself


@torch.no_grad()
def initialise(model: Glm, seed: int) -> None:
    """Fill every parameter, in place, the same for the same seed."""
    random = torch.Generator().manual_seed(seed)
    writers = 2 * model.config.num_hidden_layers
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # the routers' correction too
            parameter.zero_()
        elif parameter.dim() == 1:
            parameter.fill_(1.0)
        elif name in _SIZES:
            parameter.normal_(0.0, _SIZES[name], generator=random)
        else:
            scale = parameter.shape[-1] ** -0.5
            if name.endswith(_WRITERS):
                scale *= writers**-0.5
            parameter.normal_(0.0, scale, generator=random)
    if model.config.num_hidden_layers >= 2:
        _sketch_copying(model, random)


def _sketch_copying(model: Glm, random: torch.Generator) -> None:
    """Layer 0: heads that look one token back and write what they see where layer 1 finds it. Layer 1: heads whose
    query is the token itself and whose key is the token before, so that they look at what followed it earlier; they
    write that where the output head, which begins as the same code of each token, turns it into the next token."""
    hidden = model.config.hidden_size
    first, second = (model.decoder_layers[i].self_attn for i in range(2))
    half = min((hidden - 1) // 4, first.rank // 2, first.nope, first.value_dim, _plain(first.q_a_proj).shape[0] - 1)
    basis_HX = torch.linalg.qr(torch.randn(hidden - 1, 4 * half, generator=random))[0]
    seen, shown, taken, said = (torch.cat((torch.zeros(1, half), part)).T for part in basis_HX.split(half, dim=1))
    model.embed_tokens[:, 0] = _CONSTANT
    _look_back(model, first, {0: 1, 1: 2, 2: 1})
    _look_back(model, second, {0: 1})
    kv_b_NCV = _heads(first)
    _plain(first.kv_a_proj_with_mqa)[:half] = seen
    kv_b_NCV[0, first.nope : first.nope + half] = torch.eye(half, first.rank)
    _columns(first)[:, 0, :half] = shown.T * _SHOWN
    _plain(second.q_a_proj)[1 : 1 + half] = seen
    _plain(second.kv_a_proj_with_mqa)[: 2 * half] = torch.cat((shown, taken))
    query_NCR = _queries(second)
    kv_b_NCV = _heads(second)
    for head in range(1, second.heads):
        query_NCR[head] = 0.0
        query_NCR[head, :half, 1 : 1 + half] = torch.eye(half) * _LIKENESS
        kv_b_NCV[head] = 0.0
        kv_b_NCV[head, :half, :half] = torch.eye(half) * _LIKENESS
        kv_b_NCV[head, second.nope : second.nope + half, half : 2 * half] = torch.eye(half)
        _columns(second)[:, head, :half] = said.T * _SAID
    _plain(model.lm_head)[:] += _HEARD * (model.embed_tokens @ taken.T) @ said


def _look_back(model: Glm, attention: LatentAttention, offsets: dict[int, int]) -> None:
    """Let some heads of a layer look offsets[head] tokens back, by their rotary dims alone.

    The first value of every embedding is the same, which makes the first value of a normed state about the same
    everywhere. From it come one rotary key for every token and, for each head, the query that this key answers best
    when it is `offset` positions before: scores of a sum of cosines in the distance, over the fastest rotations.
    """
    config = model.config
    normed = _CONSTANT / (_SIZES["embed_tokens"] ** 2 + _CONSTANT**2 / config.hidden_size) ** 0.5
    key = _plain(attention.kv_a_proj_with_mqa)
    key[attention.rank :] *= 0.3
    query = _plain(attention.q_a_proj)
    query[0] = 0.0
    query[0, 0] = 2.0
    latent = 2.0 * normed / (1 + (2.0 * normed) ** 2 / config.q_lora_rank) ** 0.5  # of the query, normed
    query_NCR = _queries(attention)
    speed = 1.0 / config.rope_theta ** (torch.arange(_ROTATIONS) * 2 / attention.rope_dim)
    query_NCR[:, attention.nope : attention.nope + 2 * _ROTATIONS] = 0.0
    for pair in range(_ROTATIONS):
        row = attention.rank + 2 * pair
        key[row : row + 2, 0] = torch.tensor([_SHARPNESS / normed, 0.0])
        for head, offset in offsets.items():
            angle = -offset * speed[pair]
            query_NCR[head, attention.nope + 2 * pair, 0] = _SHARPNESS / latent * angle.cos()
            query_NCR[head, attention.nope + 2 * pair + 1, 0] = _SHARPNESS / latent * angle.sin()
    for head in offsets:
        query_NCR[head, : attention.nope] *= 0.3


def _plain(layer: Linear | HeadProjection) -> Tensor:
    """The weight, which nothing has packed."""
    assert isinstance(layer.weight, Tensor)
    return layer.weight


def _queries(attention: LatentAttention) -> Tensor:
    """q_b as [N, nope + rope, R], a view."""
    return _plain(attention.q_b_proj).view(attention.heads, attention.nope + attention.rope_dim, -1)


def _heads(attention: LatentAttention) -> Tensor:
    """kv_b as [N, nope + value, V], a view."""
    return _plain(attention.kv_b_proj).view(attention.heads, -1, attention.rank)


def _columns(attention: LatentAttention) -> Tensor:
    """o_proj as [H, N, value], a view."""
    weight = _plain(attention.o_proj)
    return weight.view(weight.shape[0], attention.heads, -1)
