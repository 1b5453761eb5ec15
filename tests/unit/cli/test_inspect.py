"""`freehold inspect`: what it prints and how it ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from freehold.cli.main import main
from freehold.model.tiny import make_tiny


def test_a_published_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "glm-5.2"]) == 0
    shown = capsys.readouterr().out
    for fact in ("753,329,921,024", "40,297,758,720", "59,585", "1,506,659,919,872", "92,628", "93,912", "656", "132"):
        assert fact in shown, fact
    assert "78: 21 with an indexer, 57 sharing one; 3 dense, 75 sparse" in " ".join(shown.split())
    assert max(map(len, shown.splitlines())) <= 80


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "glm-5.2-fp8", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["total_bytes"] == 755_617_140_416
    assert report["layers"]["full_indexer"] == 21


def test_a_directory_is_verified_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_tiny(tmp_path, "nano", max_shard_bytes=1 << 20)
    assert main(["inspect", str(tmp_path)]) == 0
    plain = capsys.readouterr().out
    assert "Every tensor the config calls for is there" in plain
    assert "SHA256SUMS" not in plain
    assert main(["inspect", str(tmp_path), "--verify"]) == 0
    assert "SHA256SUMS: all 3 files listed are unchanged." in capsys.readouterr().out
    shard = tmp_path / "model-00002-of-00003.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert main(["inspect", str(tmp_path), "--verify"]) == 4
    error = capsys.readouterr().err
    assert "model-00002-of-00003.safetensors: its SHA-256" in error
    assert error.count("\n") == 1


def test_problems_end_with_the_exit_code_of_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_tiny(tmp_path, "nano")
    raw = json.loads((tmp_path / "config.json").read_text()) | {"vocab_size": 600}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert main(["inspect", str(tmp_path)]) == 4
    shown = " ".join(capsys.readouterr().out.split())
    assert "problem: " in shown
    assert "has shape [512, 64], expected [600, 64]" in shown


@pytest.mark.parametrize(("source", "code"), [("glm-9", 2), (".", 3)])
def test_errors(
    source: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", source]) == code
    assert capsys.readouterr().err.startswith("error: ")


def test_the_cache_table_fits_80_columns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["inspect", "glm-5.2"]) == 0
    table = capsys.readouterr().out.partition("Cache:")[2].splitlines()
    assert len(table) == 11  # the title, the headings and nine rows
    assert table[-1].split() == ["nvfp4_ds_mla", "352", "fp8", "132", "30,228", "30,712", "29.52", "GiB"]
