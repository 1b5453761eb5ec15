"""`freehold quantize`: what it prints, its JSON, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from freehold.cli.main import main
from freehold.model.tiny import make_tiny


@pytest.fixture
def nano(tmp_path: Path) -> Path:
    make_tiny(tmp_path / "nano", "nano")
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question. " * 5, encoding="utf-8")
    return tmp_path / "nano"


def test_it_writes_and_compares(nano: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, text = str(tmp_path / "int4"), str(tmp_path / "text.txt")
    assert main(["quantize", str(nano), out, "--scheme", "int4", "--compare", text]) == 0
    shown = capsys.readouterr().out
    for fact in ("1,212,624 bytes, 7.20 bits a weight", "int4 in groups of 32", "Worst matrices:", "int4 against nano"):
        assert fact in shown, fact
    assert "quantization-report.json" in shown
    assert max(map(len, shown.splitlines()[1:10])) <= 80
    assert main(["inspect", out]) == 0
    assert "296 matrices int4 in groups of 32" in " ".join(capsys.readouterr().out.split())


def test_json_and_comparing_alone(nano: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, text = str(tmp_path / "int8"), str(tmp_path / "text.txt")
    assert main(["quantize", str(nano), out, "--scheme", "int8", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert list(made) == ["quantized"]
    assert len(made["quantized"]["tensors"]) == 260
    assert main(["quantize", str(nano), out, "--compare", text, "--json"]) == 0
    compared = json.loads(capsys.readouterr().out)
    assert list(compared) == ["compared"]
    assert compared["compared"]["other"] == "int8"
    assert 0 < compared["compared"]["total"]["kl_mean"] < 1


def test_it_refuses(nano: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")

    def error(*args: str, code: int = 2) -> str:
        assert main(["quantize", str(nano), *args]) == code
        return " ".join(capsys.readouterr().err.split())

    assert "give --scheme int8, int4 or fp8 to write OUT, --compare TEXT to compare it, or both" in error(out)
    assert "never overwritten" in error(str(nano), "--scheme", "int8")
    assert "'int2' is not one of" in error(out, "--scheme", "int2")
    missing = str(tmp_path / "none.txt")
    assert "none.txt: cannot be read: No such file or directory" in error(out, "--scheme", "int8", "--compare", missing)
    assert not Path(out).exists()  # the text is read before anything is written
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert "it is not UTF-8" in error(out, "--compare", str(tmp_path / "latin.txt"))
    assert "no such file" in error(out, "--compare", str(tmp_path / "text.txt"), code=3)
