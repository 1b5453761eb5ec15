"""Copies of a checkpoint with one thing changed and nothing trained: for ablations at inference only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from freehold.model.config import GlmConfig
from freehold.model.glm import Glm
from freehold.model.names import tensor_specs
from freehold.model.tokenizer import Tokenizer
from freehold.train import saved
from freehold.train.publish import write
from freehold.train.run_directory import RUN_NAME
from freehold.train.shape import with_ends


def published(run: Path, tokenizer: Path | None, directory: Path) -> Path:
    """The last checkpoint of a run's directory, in the published layout. tokenizer: a directory that has it."""
    if tokenizer is None:
        raise SystemExit(f"{run}: a run's directory, which has no tokenizer: name one with --tokenizer")
    raw = json.loads((run / RUN_NAME).read_text())["config"]
    model = Glm(GlmConfig.from_dict(raw), dtype=torch.float32)
    saved.load_into(run / saved.CHECKPOINT_NAME, "model", dict(model.named_parameters()))
    found = Tokenizer(Tokenizer.from_dir(tokenizer).backend, vocab_size=raw["vocab_size"])
    write(model, found, with_ends(raw, found), directory)
    return directory


def with_config(checkpoint: Path, directory: Path, **changes: Any) -> Path:
    """The same weights (linked, not copied) under a config.json with some fields replaced."""
    directory.mkdir(parents=True)
    raw = json.loads((checkpoint / "config.json").read_text()) | changes
    GlmConfig.from_dict(raw)
    (directory / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    for file in checkpoint.iterdir():
        if file.is_file() and file.name != "config.json" and not file.name.endswith((".md", ".png", ".csv")):
            (directory / file.name).symlink_to(file.resolve())
    return directory


def with_random_indexers(checkpoint: Path, directory: Path, seed: int = 0) -> Path:
    """The same model with the weights of all indexers but the MTP layer's drawn anew, as large as the trained ones.

    What a model loses by this is what its indexers have learnt: everything else is as trained.
    """
    config = GlmConfig.from_file(checkpoint)
    drawn = {
        spec.name
        for spec in tensor_specs(config)
        if spec.part == "indexer" and spec.layer is not None and spec.layer < config.num_hidden_layers
    }
    with_config(checkpoint, directory)
    generator = torch.Generator().manual_seed(seed)
    changed = 0
    for shard in checkpoint.glob("*.safetensors"):
        tensors = load_file(shard)
        for name in sorted(drawn & tensors.keys()):
            tensors[name] = _like(tensors[name], name, generator)
            changed += 1
        (directory / shard.name).unlink()
        save_file(tensors, directory / shard.name, {"format": "pt"})
    if changed != len(drawn):
        raise ValueError(f"{checkpoint}: {changed} of {len(drawn)} tensors of indexers were found")
    return directory


def _like(trained: torch.Tensor, name: str, generator: torch.Generator) -> torch.Tensor:
    """Random values with the mean and spread of the trained ones; norms as they are before training."""
    if "k_norm" in name:
        return torch.ones_like(trained) if name.endswith("weight") else torch.zeros_like(trained)
    values = torch.randn(trained.shape, generator=generator) * trained.float().std()
    return values.to(trained.dtype)
