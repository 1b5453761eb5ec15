"""The picture of a run's log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from freehold.errors import CheckpointError, InvalidRequest
from freehold.train.log import Log
from freehold.train.plot import plot, smooth


def logged(directory: Path, first: float) -> Path:
    directory.mkdir()
    log = Log(directory, 0)
    for step in range(10):
        row = {"step": step, "tokens": 100 * (step + 1), "seconds": 1.0, "lr_factor": 1.0, "norm": 1.0}
        held_out = {"held_out": first} if step == 5 else {"held_out": float("nan")}
        log.write({**row, "loss": first - 0.1 * step, "language": first, **held_out})
    log.close()
    return directory


def test_runs_are_drawn_one_after_another(tmp_path: Path) -> None:
    one, two = logged(tmp_path / "1-pretrain", 3.0), logged(tmp_path / "2-sft", 2.0)
    plot([one, two], tmp_path / "both.png")
    plot([one], tmp_path / "one.png")
    both, alone = (tmp_path / "both.png").read_bytes(), (tmp_path / "one.png").read_bytes()
    assert both.startswith(b"\x89PNG\r\n\x1a\n")
    assert both != alone


def test_a_run_whose_held_out_loss_was_not_due_yet_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[Any] = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: saved.append(figure))
    run = logged(tmp_path / "run", 2.0)
    log = (run / "log.csv").read_text().splitlines()
    (run / "log.csv").write_text("\n".join(log[:4]) + "\n")
    plot([run], tmp_path / "run.png")
    drawn = [value for line in saved[0].axes[0].lines for value in line.get_ydata()]
    assert drawn == [2.0] * 6, "three steps, as they are and smoothed"


def test_a_run_without_a_log_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"log\.csv"):
        plot([tmp_path], tmp_path / "x.png")
    with pytest.raises(InvalidRequest):
        plot([], tmp_path / "x.png")


def test_smoothing_starts_at_the_first_value_and_passes_over_gaps() -> None:
    made = smooth([float("nan"), 2.0, float("nan"), 2.0, 4.0])
    assert made[0] != made[0]
    assert made[1:4] == pytest.approx([2.0, 2.0, 2.0])
    assert 2.0 < made[4] < 4.0
