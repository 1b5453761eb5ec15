"""`freehold train`: the commands that train, and those that work on what was trained."""

from __future__ import annotations

from collections.abc import Mapping

SUBCOMMANDS: Mapping[str, tuple[str, str]] = {
    "tiny": ("freehold.cli.train_tiny", "Make freehold-tiny again, from nothing to a checkpoint: the whole recipe."),
    "pretrain": ("freehold.cli.train_stage", "Train on text, with dense attention: from nothing, or further."),
    "indexer": ("freehold.cli.train_stage", "Teach the indexers of a trained model what its attention looks at."),
    "sft": ("freehold.cli.train_stage", "Train on chats, with sparse attention, mostly on what the assistant says."),
    "finetune": (
        "freehold.cli.finetune",
        "Fine-tune a checkpoint on your own chats, and show what that did to those held out.",
    ),
    "merge": ("freehold.cli.finetune", "Merge an adapter into a new checkpoint."),
    "plot": ("freehold.cli.train_plot", "Draw the log of a run as a PNG."),
}


def train() -> None:
    """Train a small model, or fine-tune one on your own chats."""
