"""Adapters as PEFT reads them: `transformers`' model with the adapter on it gives what ours gives."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from freehold.model.cache import PagedCache
from freehold.model.inputs import single_sequence
from freehold.model.oracle import load_oracle, load_ours, stable_selection
from freehold.model.tiny import make_tiny
from freehold.train.lora import TARGETS, Lora, LoraSettings, Target

peft = pytest.importorskip("peft", reason="peft is not installed: it is an oracle for adapters only")
TOKENS = [*range(40, 60), *range(100, 120)]  # index_topk is 16


@pytest.mark.parametrize("targets", [*((target,) for target in TARGETS), TARGETS])
def test_peft_gives_what_our_model_gives(tmp_path: Path, targets: tuple[Target, ...]) -> None:
    make_tiny(tmp_path / "base", "nano", seed=5)
    ours = load_ours(tmp_path / "base")

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return ours.logits(ours(single_sequence(TOKENS), PagedCache(ours.config, 1, 64, ours.dtype)))

    plain = logits()
    lora = Lora(ours, LoraSettings(rank=4, targets=targets))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.05, generator=generator)
    adapted = logits()
    assert (adapted - plain).abs().max() > 0.1
    lora.save(tmp_path / "adapter", base=str(tmp_path / "base"))
    with warnings.catch_warnings(), stable_selection(), torch.no_grad():
        warnings.simplefilter("ignore")  # it looks for the MTP layer's factors, which transformers has no place for
        wrapped = peft.PeftModel.from_pretrained(load_oracle(tmp_path / "base"), tmp_path / "adapter")
        theirs = wrapped(torch.tensor([TOKENS])).logits[0]
    assert torch.allclose(adapted, theirs, atol=1e-4)
