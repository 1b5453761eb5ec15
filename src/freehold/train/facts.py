"""What a model card tells of a training: gathered from the logs of its stages and the summaries of their corpora.
Torch-free."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from freehold.model.checkpoint_files import write_json
from freehold.train.log import read_log

FACTS_NAME = "training.json"
_LAST = 20  # steps whose mean loss is told as the last


def training_facts(
    stages: Iterable[tuple[str, Path]],
    summaries: Iterable[Mapping[str, Mapping[str, int]]],
    *,
    command: str,
    longest: int,
) -> dict[str, Any]:
    """Facts as `card` takes them.

    stages: (name, a run's directory), in order. summaries: `Corpus.summary()` of each corpus that was trained on.
    command: what makes all of it again. longest: tokens of the longest row. Raises CheckpointError without a log.
    """
    return {
        "command": command,
        "longest": longest,
        "stages": [_stage(name, directory) for name, directory in stages],
        "data": _data(summaries),
        "hardware": {"cpu": _cpu(), "cores": len(os.sched_getaffinity(0))},
    }


def write_facts(directory: Path, facts: Mapping[str, Any]) -> None:
    """Keep them beside the weights."""
    write_json(directory / FACTS_NAME, dict(facts))


def _stage(name: str, directory: Path) -> dict[str, Any]:
    log = read_log(directory)
    last = log["loss"][-_LAST:]
    return {
        "name": name,
        "steps": len(log["step"]),
        "tokens": int(log["tokens"][-1]),
        "seconds": round(log["seconds"][-1], 1),
        "loss": round(sum(last) / len(last), 4),
    }


def _data(summaries: Iterable[Mapping[str, Mapping[str, int]]]) -> list[dict[str, Any]]:
    """Rows by kind, the largest first, over all corpora."""
    total: dict[str, dict[str, int]] = {}
    for summary in summaries:
        for kind, counts in summary.items():
            row = total.setdefault(kind, {"documents": 0, "tokens": 0})
            for key in row:
                row[key] += counts[key]
    return sorted(({"kind": kind, **row} for kind, row in total.items()), key=lambda row: -int(row["tokens"]))


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown CPU"
