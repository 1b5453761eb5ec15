"""Weights that training starts from.

Matrices keep the size of what goes through them (variance 1 / inputs); those that write to the residual stream start
smaller, by the number of writers (Radford et al. 2019, GPT-2); embeddings have half the size of a normed state, the
head begins near indifference; norms are 1, biases 0.
"""

from __future__ import annotations

import torch

from freehold.model.glm import Glm

_WRITERS = ("o_proj.weight", "down_proj.weight", "experts.down_proj")
_SIZES = {"embed_tokens": 0.5, "lm_head.weight": 0.01}


@torch.no_grad()
def initialise(model: Glm, seed: int) -> None:
    """Fill every parameter, in place, the same for the same seed."""
    random = torch.Generator().manual_seed(seed)
    writers = 2 * model.config.num_hidden_layers
    for name, parameter in model.named_parameters():
        if name.endswith("e_score_correction_bias") or name.endswith("bias"):
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
