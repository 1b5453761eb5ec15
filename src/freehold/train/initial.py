"""Weights that training starts from.

Copying takes two layers: one whose heads look at the token before, and one that looks for what followed the same token
earlier. Two cores have no time for a model to find both by chance, so it is given the first: some heads of layers 0 and
1 begin by looking one or two tokens back, by their rotary dims alone. They are free to change.

Matrices keep the size of what goes through them (variance 1 / inputs); those that write to the residual stream start
smaller, by the number of writers (Radford et al. 2019, GPT-2); embeddings have half the size of a normed state, the
head begins near indifference; norms are 1, biases 0.
"""

from __future__ import annotations

import torch

from freehold.model.glm import Glm

_WRITERS = ("o_proj.weight", "down_proj.weight", "experts.down_proj")
_SIZES = {"embed_tokens": 0.5, "lm_head.weight": 0.01}
_LOOK_BACK = {0: (1, 2, 1), 1: (1,)}  # of layers: how far the first heads look back
_CONSTANT = 1.5  # the first value of every embedding
_SHARPNESS = 6.0  # of query and key in each rotation: scores up to its square times the softmax scale
_ROTATIONS = 2


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
    for layer, offsets in _LOOK_BACK.items():
        if layer < model.config.num_hidden_layers:
            _look_back(model, layer, offsets)


def _look_back(model: Glm, layer: int, offsets: tuple[int, ...]) -> None:
    """Let the first heads of a layer look offsets[head] tokens back.

    Every embedding gets the same first value, which makes the first value of a normed state about the same everywhere.
    From it come the same rotary key for every token and, for each head, the query that this key answers best when it
    is `offset` positions before: scores of a sum of cosines in the distance, over the fastest rotations.
    """
    config, attention = model.config, model.layers[layer].self_attn
    hidden, rank = config.hidden_size, config.kv_lora_rank
    model.embed_tokens[:, 0] = _CONSTANT
    # What the constant is after the norm; that of later layers is the same to within what layers before them add.
    normed = _CONSTANT / (_SIZES["embed_tokens"] ** 2 + _CONSTANT**2 / hidden) ** 0.5
    key = attention.kv_a_proj_with_mqa.weight
    key[rank:] *= 0.3
    attention.q_a_proj.weight[0] = 0.0
    attention.q_a_proj.weight[0, 0] = 2.0
    latent = 2.0 * normed / (1 + (2.0 * normed) ** 2 / config.q_lora_rank) ** 0.5  # of the query, normed
    query_NCR = attention.q_b_proj.weight.view(config.num_attention_heads, config.qk_head_dim, -1)
    roped_NQR = query_NCR[:, config.qk_nope_head_dim :]
    speed = 1.0 / config.rope_theta ** (torch.arange(_ROTATIONS) * 2 / config.qk_rope_head_dim)
    for pair in range(_ROTATIONS):
        key[rank + 2 * pair : rank + 2 * pair + 2, 0] = torch.tensor([_SHARPNESS / normed, 0.0])
        roped_NQR[:, 2 * pair : 2 * pair + 2] = 0.0
    for head, offset in enumerate(offsets):
        query_NCR[head, : config.qk_nope_head_dim] *= 0.3
        for pair in range(_ROTATIONS):
            angle = -offset * speed[pair]
            roped_NQR[head, 2 * pair, 0] = _SHARPNESS / latent * angle.cos()
            roped_NQR[head, 2 * pair + 1, 0] = _SHARPNESS / latent * angle.sin()
