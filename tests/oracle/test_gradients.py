"""Gradients of every parameter against `transformers`', through the code that trains.

In fp32, so that the oracle's casts to fp32 (router, norms, softmax) change nothing, and with its eps of latent norms.
The prompt is several times index_topk, and the oracle's selection breaks ties as ours does.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from freehold.model.oracle import load_oracle, load_ours, stable_selection
from freehold.model.tiny import make_tiny
from freehold.train.batches import Batch
from freehold.train.objective import IndexerLoss, Objective, TrainingModel

LENGTH = 60
ALL = 1 << 30


@pytest.mark.parametrize("indexer", ["none", "sparse"])
def test_gradients_are_the_oracles(tmp_path: Path, indexer: IndexerLoss) -> None:
    make_tiny(tmp_path, "nano", seed=3)
    ours, oracle = load_ours(tmp_path), load_oracle(tmp_path).train()
    for layer in oracle.model.layers:
        if getattr(layer.self_attn, "indexer", None) is not None:
            layer.self_attn.indexer.index_topk = ours.config.index_topk if indexer == "sparse" else ALL
    ids = torch.randint(0, 400, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    training = TrainingModel(ours, Objective(mtp_weight=0.0, indexer=indexer, indexer_weight=0.0))
    batch = Batch(ids, torch.ones(3, LENGTH), torch.zeros_like(ids), torch.arange(LENGTH).expand(3, LENGTH))
    losses = training.losses(batch)
    losses.total.backward()  # type: ignore[no-untyped-call]
    with stable_selection():
        logits = oracle(ids).logits[:, :-1]
    theirs = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    theirs.backward()
    assert losses.parts["language"] == pytest.approx(float(theirs.detach()), rel=1e-6)
    gradients = {name: parameter.grad for name, parameter in oracle.named_parameters()}
    compared = 0
    for name, parameter in training.parameters():
        if name.startswith("mtp.") or ".indexer." in name:  # none there; and no gradient but from its own loss
            assert parameter.grad is None or not parameter.grad.any()
            continue
        published = {"embed_tokens": "model.embed_tokens.weight", "lm_head.weight": name}.get(name, f"model.{name}")
        gradient = gradients[published]
        assert gradient is not None
        assert parameter.grad is not None, name
        assert float((parameter.grad - gradient).norm() / gradient.norm()) < 1e-5, name
        compared += 1
    assert compared > 100
