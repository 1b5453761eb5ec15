"""What training starts from: sizes of things, and the sketch of copying."""

from __future__ import annotations

import torch

from freehold.model.cache import PagedCache
from freehold.model.config import GlmConfig
from freehold.model.glm import Glm
from freehold.model.inputs import single_sequence
from freehold.train.initial import initialise
from freehold.train.shape import tiny_config


def test_copying_is_sketched() -> None:
    """A new model gives what followed a token earlier a far larger logit than others have, though no token is known."""
    model = Glm(GlmConfig.from_dict(tiny_config()), dtype=torch.float32)
    initialise(model, 0)
    once = torch.randint(300, 900, (30,), generator=torch.Generator().manual_seed(0))
    ids = torch.cat((once, once)).tolist()
    with torch.no_grad():
        logits = model.logits(model(single_sequence(ids), PagedCache(model.config, 1, 64, torch.float32)))
    rows = torch.arange(35, 59)
    following = logits[rows, torch.tensor(ids)[rows + 1]]
    assert float((following - logits[rows].mean(-1)).mean()) > 2 * float(logits[rows].std(-1).mean())
    best = (logits[rows].argmax(-1) == torch.tensor(ids)[rows + 1]).float().mean()
    assert float(best) > 0.15


def test_the_same_for_the_same_seed() -> None:
    made = []
    for seed in (0, 0, 1):
        model = Glm(GlmConfig.from_dict(tiny_config()), dtype=torch.float32)
        initialise(model, seed)
        made.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
    assert made[0].isfinite().all()
