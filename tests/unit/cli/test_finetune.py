"""`freehold train finetune` and `merge`: what they print, their JSON, and how they end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from freehold.cli.main import main
from freehold.model.inspect import inspect
from freehold.model.tiny import make_tiny


@pytest.fixture
def nano(tmp_path: Path) -> Path:
    make_tiny(tmp_path / "nano", "nano")
    chats = [
        {"messages": [{"role": "user", "content": f"Say {word}."}, {"role": "assistant", "content": f"<{word}>"}]}
        for word in "lamp key book ring cup map coat bell".split()
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats), encoding="utf-8")
    return tmp_path / "nano"


def test_an_adapter_is_trained_and_merged(nano: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = str(tmp_path / "run"), str(tmp_path / "out")
    command = [
        "train",
        "finetune",
        str(nano),
        str(tmp_path / "chats.jsonl"),
        run,
        "--epochs",
        "4",
        "--held-out",
        "0.25",
    ]
    assert main([*command, "--targets", "attention, routed_expert", "--rank", "2"]) == 0
    shown = capsys.readouterr().out
    for fact in ("run/adapter", "trained on 6 chats, 4 steps", "2 held-out chats", "before", "after", "0 of 2 (0%)"):
        assert fact in shown, fact
    assert f"freehold train merge {nano} {run}/adapter OUT" in shown
    assert main([*command, "--targets", "attention, routed_expert", "--rank", "2", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["method"], again["steps"], again["chats_held_out"]) == ("lora", 4, 2)
    assert again["after"]["loss"] < again["before"]["loss"]
    assert main(["train", "merge", str(nano), f"{run}/adapter", out]) == 0
    assert " of 440 tensors changed; " in capsys.readouterr().out
    assert inspect(out).problems == ()


def test_they_refuse(nano: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chats, run = str(tmp_path / "chats.jsonl"), str(tmp_path / "run")

    def error(*args: str) -> str:
        assert main(["train", *args]) in (2, 3, 4)
        return " ".join(capsys.readouterr().err.split())

    assert "--targets 'head': choose from attention" in error("finetune", str(nano), chats, run, "--targets", "head")
    assert "rank 0 must be at least 1" in error("finetune", str(nano), chats, run, "--rank", "0")
    assert "--threads 0: must be at least 1" in error("finetune", str(nano), chats, run, "--threads", "0")
    assert "epochs 0.0 must be above 0" in error("finetune", str(nano), chats, run, "--epochs", "0")
    (tmp_path / "bad.jsonl").write_text('{"messages": []}\n')
    assert "bad.jsonl:1: messages must be" in error("finetune", str(nano), str(tmp_path / "bad.jsonl"), run)
    assert not Path(run).exists()
    assert "adapter_config.json" in error("merge", str(nano), str(tmp_path), str(tmp_path / "out"))
