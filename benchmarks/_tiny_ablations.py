"""The checkpoint with one thing changed, at inference only: what each part of its attention is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _tiny_losses import SPARSE, Losses, model_losses
from _tiny_retrieval import retrieval_of_length
from _tiny_tasks import open_model, rate, solve
from _tiny_variants import with_config, with_random_indexers

from freehold.model.config import GlmConfig
from freehold.stats import Interval, mean_ratio
from freehold.train.data.example import Encoded

TOPK = (32, 64, 128)
AS_TRAINED = "as trained"
RANDOM = "random indexer"
DENSE = "dense: attends to everything"


@dataclass(frozen=True)
class Row:
    """One variant. retrieval: rate by prompt length in tokens; loss: per token whose context exceeds index_topk."""

    name: str
    retrieval: dict[int, Interval]
    loss: Interval

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def variants(checkpoint: Path, directory: Path) -> dict[str, Path]:
    """Name → a checkpoint; the trained one first."""
    config = GlmConfig.from_file(checkpoint)
    found = {AS_TRAINED: checkpoint, RANDOM: with_random_indexers(checkpoint, directory / "random")}
    for topk in TOPK:
        if topk != config.index_topk:
            found[f"index_topk {topk}"] = with_config(checkpoint, directory / f"topk-{topk}", index_topk=topk)
    found[DENSE] = with_config(checkpoint, directory / "dense", index_topk=config.max_position_embeddings)
    return found


def measure(
    checkpoints: dict[str, Path], documents: Sequence[Encoded], lengths: Sequence[int], count: int, topk: int
) -> tuple[list[Row], dict[str, dict[int, list[bool]]]]:
    """Rows, and for each variant and length which prompts it got right: the same prompts for all."""
    rows, right = [], {}
    for name, directory in checkpoints.items():
        with open_model(directory) as llm:
            answered = {
                length: solve(llm, retrieval_of_length(llm.tokenizer, length, count), max_tokens=64)
                for length in lengths
            }
            losses = model_losses(llm, documents, topk)
        right[name] = {length: [each.right for each in found] for length, found in answered.items()}
        rows.append(Row(name, {length: rate(found) for length, found in answered.items()}, loss_beyond(losses)))
    return rows, right


def loss_beyond(losses: Losses) -> Interval:
    kept = losses.tokens[SPARSE] > 0
    return mean_ratio(losses.sums[SPARSE][kept], np.maximum(losses.tokens[SPARSE][kept], 1))


def table(rows: Sequence[Row]) -> str:
    lengths = list(rows[0].retrieval)
    lines = [f"{'variant':34}" + "".join(f"{f'retrieval {n}':>16}" for n in lengths) + f"{'loss far':>12}"]
    for row in rows:
        rates = "".join(f"{row.retrieval[length].value:>16.1%}" for length in lengths)
        lines.append(f"{row.name:34}{rates}{row.loss.value:>12.3f}")
    return "\n".join(lines)
