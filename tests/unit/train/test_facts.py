"""What the card tells of a training comes from its logs."""

from __future__ import annotations

from pathlib import Path

import pytest

from freehold.errors import CheckpointError
from freehold.train.facts import training_facts, write_facts
from freehold.train.log import Log


def test_facts_come_from_logs_and_corpora(tmp_path: Path) -> None:
    log = Log(tmp_path, 0)
    for step in range(30):
        loss = 9.0 if step < 10 else 2.0
        log.write({"step": step, "tokens": 100 * (step + 1), "seconds": 0.5 * step, "lr_factor": 1.0, "norm": 1.0,
                   "loss": loss})  # fmt: skip
    log.close()
    summaries = [
        {"story": {"documents": 2, "tokens": 50, "trained": 9}},
        {"story": {"documents": 1, "tokens": 20, "trained": 9}, "tool": {"documents": 4, "tokens": 90, "trained": 9}},
    ]
    facts = training_facts([("pretrain", tmp_path)], summaries, command="do it", longest=1280)
    assert facts["stages"] == [{"name": "pretrain", "steps": 30, "tokens": 3000, "seconds": 14.5, "loss": 2.0}]
    assert facts["data"] == [
        {"kind": "tool", "documents": 4, "tokens": 90},
        {"kind": "story", "documents": 3, "tokens": 70},
    ]
    assert facts["hardware"]["cores"] >= 1
    write_facts(tmp_path, facts)
    assert (tmp_path / "training.json").exists()


def test_a_run_without_a_log_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"log\.csv"):
        training_facts([("pretrain", tmp_path)], [], command="", longest=1)
