"""`freehold plan` on the command line: what it refuses, in one line, and with which exit code."""

from __future__ import annotations

from pathlib import Path

import pytest

from freehold.cli.main import main


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--on", "8xh300"], 2, "hardware 'h300' is not known"),
        (["--on", "0xh200"], 2, "at least 1 is needed"),
        (["--on", "4xh100"], 5, "it needs at least"),
        (["--on", "16xa100"], 2, "no engine is known to run it there"),
        (["--model", "glm-9"], 2, "glm-9"),
        (["--input", "-5"], 2, "is no number of tokens"),
        (["--rate", "-1"], 2, "rate -1.0"),
        (["--rate", "1", "--concurrency", "4"], 2, "contradict each other"),
        (["--hit-rate", "1.5"], 2, "hit rate 1.5"),
        (["--acceptance", "9"], 2, "acceptance length 9"),
        (["--acceptance", "2", "--drafts", "0"], 2, "is for drafts"),
        (["--gpu-price", "-4"], 2, "not negative"),
        (["--kwh", "0.2"], 2, "add --own"),
        (["--own", "--kwh", "-1"], 2, "not negative"),
        (["--own", "--pue", "0.5"], 2, "pue is 0.5"),
        (["--staff", "-1"], 2, "--staff -1.0"),
        (["--utilisation", "0"], 2, "a utilisation of 0"),
        (["--profile", "night"], 2, "profile 'night' is none of"),
        (["--api", "glm-77"], 2, "no price is known"),
        (["--api", "1/2/3@x"], 2, "a number of tokens"),
        (["--tpot", "0"], 2, "a time above 0"),
        (["--percentile", "100"], 2, "between 0 and 100"),
        (["--context", "2000000"], 2, "more than glm-5.2-fp8's context"),
        (["--engine", "tgi"], 2, "engine 'tgi' is not known"),
        (["--cache", "int2"], 2, "none of"),
        (["--effort", "extreme"], 2, "--effort 'extreme' is none of"),
        (["--calls", "/none.jsonl"], 2, "not readable"),
        (["--on", "8xh200", "compare", "--on", "8xb200"], 2, "--on belongs after compare"),
        (["compare"], 2, "Missing option '--on'"),
    ],
)
def test_bad_input_is_one_clear_line(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *arguments]) == code
    error = capsys.readouterr().err
    assert message in error
    if "Missing option" not in message:
        assert error.count("\n") == 1


def test_a_malformed_config_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "glm_moe_dsa", "hidden_size": "large"}')
    assert main(["plan", "--model", str(tmp_path)]) == 3
    assert capsys.readouterr().err.count("\n") == 1
