"""The command line's frame: what is registered, what bare `freehold` says, and that a command is loaded alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import freehold
from freehold.cli.main import COMMANDS, FIRST_STEPS, every_command, load_command, main, subcommands


def test_bare_freehold_says_what_to_do_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert capsys.readouterr().out == FIRST_STEPS


def test_every_command_in_the_first_steps_exists() -> None:
    assert set(re.findall(r"freehold ([a-z]+)", FIRST_STEPS)) <= set(COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"freehold {freehold.__version__}\n"


def test_an_unknown_command_is_a_usage_error_with_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["srve"]) == 2
    assert "Did you mean 'serve'?" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--no-such-option"], ["inspect", "--no-such-option"], ["inspect"]])
def test_a_wrong_command_line_exits_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert "Error:" in capsys.readouterr().err


def test_help_lists_every_command_with_its_summary(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name, summary in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(summary)}$", shown, re.MULTILINE)


def summary(command: str) -> str:
    name, _, within = command.partition(" ")
    return subcommands(name)[within][1] if within else COMMANDS[name]


@pytest.mark.parametrize("command", every_command())
def test_a_commands_summary_is_the_first_line_of_its_docstring(command: str) -> None:
    docstring = load_command(command).__doc__
    assert docstring is not None
    assert docstring.strip().splitlines()[0] == summary(command)


@pytest.mark.parametrize("command", every_command())
def test_a_commands_help_imports_no_torch(command: str) -> None:
    code = f"""
import sys
from freehold.cli.main import main
code = main([*{command.split()!r}, "--help"])
sys.exit("torch" if "torch" in sys.modules else code)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert summary(command) in " ".join(result.stdout.split())


def test_a_groups_help_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, code in ((["train", "--help"], 0), (["train"], 2)):
        assert main(arguments) == code
        printed = capsys.readouterr()
        shown = " ".join((printed.out + printed.err).split())
        for name, (_, line) in subcommands("train").items():
            assert f"{name} {line}" in shown


def test_an_unknown_command_of_a_group_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "pretain", "x"]) == 2
    assert "Did you mean 'pretrain'?" in capsys.readouterr().err


def test_an_error_is_one_line_and_an_exit_code(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "freehold.cli.main", "inspect", str(tmp_path / "nothing")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode != 0
    assert re.fullmatch(r"error: .*nothing.*\n", result.stderr)


def test_a_closed_pipe_is_quiet() -> None:
    """`freehold --help | head -0`: no traceback, no message."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        result = subprocess.run(
            [sys.executable, "-m", "freehold.cli.main", "--help"], stdout=write_end, stderr=subprocess.PIPE, timeout=60
        )
    finally:
        os.close(write_end)
    assert result.stderr == b""
    assert result.returncode == 1
