"""Kept results of benchmarks: what each says was called can be called anywhere."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from _common import RESULTS, ROOT, command

KEPT = sorted(path for path in RESULTS.glob("*.json") if "command" in json.loads(path.read_text()))


def test_a_command_is_kept_without_the_folders_of_a_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = str(ROOT / "benchmarks" / "exactness.py")
    monkeypatch.setattr(sys, "argv", [script, "--quick", "--work", str(tmp_path)])
    assert command() == "benchmarks/exactness.py --quick --work DIR"


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_kept_commands_name_no_folder_of_a_machine(path: Path) -> None:
    words = json.loads(path.read_text())["command"].split()
    assert not [word for word in words if Path(word).is_absolute()]
