"""`freehold tiny`: writes once, says what it wrote, and keeps its hands off other directories."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from freehold.cli.main import main
from freehold.model.tiny import made_before


def test_it_writes_a_checkpoint_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "models" / "nano"
    assert main(["tiny", str(target), "--size", "nano", "--seed", "7"]) == 0
    assert made_before(target, "nano", 7)
    shown = capsys.readouterr().out
    assert "440 tensors, 2,696,320 bytes in 1 shard" in shown
    assert "its text is noise" in shown
    before = (target / "model.safetensors").stat().st_mtime_ns
    assert main(["tiny", str(target), "--size", "nano", "--seed", "7"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert (target / "model.safetensors").stat().st_mtime_ns == before
    assert main(["tiny", str(target), "--size", "nano", "--seed", "7", "--force"]) == 0
    assert (target / "model.safetensors").stat().st_mtime_ns > before
    assert main(["tiny", str(target), "--size", "nano", "--seed", "8"]) == 0
    assert made_before(target, "nano", 8)


def test_it_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert main(["tiny", str(tmp_path), "--size", "nano"]) == 2
    assert "not empty" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]
    assert main(["tiny", str(tmp_path / "x"), "--size", "huge"]) == 2
    assert "nano, small, medium" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    assert main(["tiny", str(tmp_path), "--size", "nano", "--force"]) == 0
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_it_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from freehold.cli.main import main\n"
        "sys.exit(main(['tiny', sys.argv[1], '--size', 'nano', *sys.argv[2:]]))"
    )

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=False)

    assert run(str(tmp_path / "a")).returncode == 0
    needs = run(str(tmp_path / "b"), "--fp8")
    assert needs.returncode == 6
    assert "pip install 'freehold[engine]'" in needs.stderr
