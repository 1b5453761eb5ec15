"""`freehold train`: options become settings, and a run from nothing works from the command line."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from freehold.cli.main import main
from freehold.cli.train_stage import Asked, changed, count
from freehold.errors import InvalidRequest
from freehold.model.checkpoint_files import write_json
from freehold.train.log import read_log
from freehold.train.recipe import stage
from tests.unit.train.small import small_config

TEXT = "The grey cat of Mira sleeps on the roof of the old mill. " * 40


@pytest.mark.parametrize(("text", "value"), [("500000", 500_000), ("500k", 500_000), ("1.5M", 1_500_000)])
def test_counts_of_tokens(text: str, value: int) -> None:
    assert count(text) == value


@pytest.mark.parametrize("text", ["0", "-5", "5G", "many", "", "0.1"])
def test_what_is_no_count_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="--tokens"):
        count(text)


def asked(**said: Any) -> Asked:
    return Asked(**{**dict.fromkeys(Asked.__dataclass_fields__), "seed": 0, **said})


def test_options_change_a_stage_and_nothing_else() -> None:
    assert changed("sft", asked()) == stage("sft", seed=0)
    made = changed("pretrain", asked(tokens="2k", optimizer="adamw", lr=0.001, schedule="cosine", bf16=False, seed=3))
    assert (made.tokens, made.optim.kind, made.optim.lr, made.optim.matrix_lr) == (2000, "adamw", 0.001, None)
    assert (made.schedule.kind, made.objective.half, made.seed) == ("cosine", False, 3)
    assert made.objective.mtp_weight == stage("pretrain").objective.mtp_weight
    longer = changed("sft", asked(longest=100_000, mtp_loss="total-variation"))
    assert longer.lengths[-1] == 100_000 <= longer.batch_tokens
    assert longer.objective.mtp_loss == "total-variation"
    with pytest.raises(InvalidRequest, match="longest row"):
        changed("sft", asked(batch_tokens=5))


def small_run(directory: Path) -> list[str]:
    write_json(directory / "config.json", small_config())
    (directory / "text.txt").write_text(TEXT, encoding="utf-8")
    options = ["--config", str(directory / "config.json"), "--text", str(directory / "text.txt"), "--longest", "64"]
    return ["pretrain", str(directory / "run"), *options, "--batch-tokens", "128", "--threads", "1"]


def test_a_run_from_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", *small_run(tmp_path), "--tokens", "2k"]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert re.search(r"run: \d+ steps, [\d,]+ tokens", printed.out)
    assert re.search(r"pretrain: step (\d+)/\1  loss [\d.]+  [\d,]+ tokens/s  0:00:00 left", printed.err)
    log = read_log(tmp_path / "run")
    assert log["loss"][-1] < log["loss"][0]
    assert (tmp_path / "run" / "model" / "config.json").exists()
    assert main(["train", "plot", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "plot.png").stat().st_size > 1000
    assert main([*arguments, "--lr", "0.5"]) == 2
    assert "other settings (settings.optim.lr" in capsys.readouterr().err
    assert main(["train", "indexer", str(tmp_path / "other"), "--from", str(tmp_path / "none")]) == 2
    assert "no such directory" in capsys.readouterr().err


def test_ctrl_c_saves_and_exits_130_and_the_same_command_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "freehold.cli.main", "train", *small_run(tmp_path), "--tokens", "10k"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    log = tmp_path / "run" / "log.csv"
    while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) > 3):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    done = len(read_log(tmp_path / "run")["step"])
    finished = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), timeout=200)
    assert finished.returncode == 0, finished.stderr
    assert read_log(tmp_path / "run")["step"] == list(range(len(read_log(tmp_path / "run")["step"])))
    assert len(read_log(tmp_path / "run")["step"]) > done


def test_options_that_contradict_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "pretrain", str(tmp_path), "--from", "x", "--config", "y"]) == 2
    assert "model from nothing" in capsys.readouterr().err
    assert main(["train", "pretrain", str(tmp_path), "--threads", "0"]) == 2


@pytest.mark.parametrize(("text", "message"), [("[]", "expected a JSON object"), ("{}", "model_type")])
def test_a_config_that_is_none_is_refused_before_a_tokenizer_is_made(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(text)
    assert main(["train", "pretrain", str(tmp_path / "run"), "--config", str(tmp_path / "config.json")]) == 3
    error = capsys.readouterr().err
    assert message in error
    assert "making a tokenizer" not in error
