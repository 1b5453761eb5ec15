"""From exceptions to one line and an exit code."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from freehold import errors
from freehold.cli.errors import describe, run
from freehold.model.tiny import make_tiny


def raising(error: BaseException) -> Callable[[], None]:
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.InvalidRequest("bad"), 2),
        (errors.ConfigError("bad"), 3),
        (errors.DiskFull("bad"), 4),
        (errors.InsufficientMemory("bad"), 5),
        (errors.MissingExtra("bad"), 6),
        (errors.EngineError("bad"), 7),
    ],
)
def test_a_freehold_error_is_its_message_and_its_exit_code(
    error: Exception, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(raising(error)) == code
    captured = capsys.readouterr()
    assert captured.err == "error: bad\n"
    assert captured.out == ""


def test_success_is_0() -> None:
    assert run(lambda: None) == 0


def test_ctrl_c_is_130_and_silent(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("code", "expected"), [(None, 0), (0, 0), (3, 3), ("text", 1)])
def test_system_exit_keeps_its_code(code: int | str | None, expected: int) -> None:
    assert run(raising(SystemExit(code))) == expected


def test_an_unforeseen_error_is_one_line_that_says_how_to_see_more(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(raising(ValueError("two\nlines"))) == 1
    line = capsys.readouterr().err
    assert line == "error: unexpected ValueError: two lines (a defect; FREEHOLD_DEBUG=1 shows the traceback)\n"


@pytest.mark.parametrize("by", ["option", "environment"])
def test_debug_shows_the_traceback(
    by: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if by == "environment":
        monkeypatch.setenv("FREEHOLD_DEBUG", "1")
    assert run(raising(errors.ConfigError("bad")), debug=by == "option") == 3
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert shown.endswith("error: bad\n")


def test_an_os_error_names_the_file() -> None:
    assert describe(FileNotFoundError(2, "No such file or directory", "model/x")) == (
        "No such file or directory: model/x",
        1,
    )


def test_a_full_disk_has_its_exit_code_wherever_it_shows() -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "/tmp/plot.png")
    assert describe(full) == ("No space left on device: /tmp/plot.png", errors.DiskFull.exit_code)


def test_a_missing_engine_module_says_how_to_install_it() -> None:
    error = ModuleNotFoundError("No module named 'torch.nn'", name="torch.nn")
    assert describe(error) == ("this needs torch, which is not installed: pip install 'freehold[engine]'", 6)


def test_another_missing_module_is_unforeseen() -> None:
    assert describe(ModuleNotFoundError("No module named 'nonsense'", name="nonsense"))[1] == 1


def test_without_torch_a_command_that_needs_it_prints_the_install_line(tmp_path: Path) -> None:
    """torch is hidden from a fresh interpreter, as after `pip install freehold` without the extra."""
    make_tiny(tmp_path / "nano", "nano")
    code = """
import sys
sys.modules["torch"] = None  # makes `import torch` fail as if it were absent
from freehold.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
    command = [sys.executable, "-c", code, "serve", str(tmp_path / "nano"), "--port", "0"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 6, result.stderr
    assert result.stderr.startswith("error: ")
    assert "pip install 'freehold[engine]'" in result.stderr
