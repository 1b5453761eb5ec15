"""`freehold plan` on the command line: what it refuses, in one line, and with which exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from freehold.cli.main import main
from freehold.plan.kept import read_kept


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


BENCH = {
    "completed": 64,
    "max_concurrency": 4,
    "mean_ttft_ms": 400.0,
    "mean_tpot_ms": 25.0,
    "total_input_tokens": 64 * 1024,
    "total_output_tokens": 64 * 64,
}


def test_calibrate_refits_and_saves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result, saved = tmp_path / "bench.json", tmp_path / "efficiencies.toml"
    result.write_text(json.dumps(BENCH))
    assert main(["plan", "calibrate", str(result), "--save", str(saved), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (run,) = found["runs"]
    assert abs(run["tpot"]["after"]) <= abs(run["tpot"]["before"])
    assert read_kept(saved)[0].as_dict() == pytest.approx(found["efficiencies"], rel=1e-4)
    assert main(["plan", "calibrate", str(result)]) == 0
    assert "mean absolute error" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("memory = 1", "expected one table"),
        ("[efficiencies]\nmemory = 0.8", "expected one table"),
        ("[efficiencies", "not readable as TOML"),
        (None, "not readable as TOML"),
    ],
)
def test_a_wrong_file_of_efficiencies(
    text: str | None, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "e.toml"
    if text is not None:
        file.write_text(text)
    assert main(["plan", "--efficiencies", str(file)]) == 3
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--drafts", "3"], "needs its acceptance length"),
        (["--tp", "3"], "does not divide 8 GPUs"),
        (["--on", "4xh100", "--tp", "4", "--engine", "tgi"], "engine 'tgi' is not known"),
    ],
)
def test_calibrate_refuses(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = tmp_path / "bench.json"
    result.write_text(json.dumps(BENCH))
    assert main(["plan", "calibrate", str(result), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_whole_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    html, manifest = tmp_path / "plan.html", tmp_path / "plan.yaml"
    command = ["plan", "--concurrency", "4", "--output", "64", "--html", str(html), "--manifest", str(manifest)]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "Recommended:" in shown
    assert "vllm serve zai-org/GLM-5.2-FP8" in shown
    assert html.read_text().startswith("<!doctype html>")
    assert "kind: LeaderWorkerSet" in manifest.read_text()


def test_compare(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "compare", "--on", "8xh200", "--on", "4xh100", "--concurrency", "4", "--output", "64"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "8 x H200 SXM" in shown
    assert "4 x H100 SXM: glm-5.2-fp8 has 755.6 GB" in shown
    assert main([*command, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["plans"]) == 1
    assert list(document["refused"]) == ["4 x H100 SXM"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--on", "cpu-server"], "add --engine freehold"),
        (["--on", "8xdgx-spark"], "no engine is known to run it there"),
        (["--on", "dgx-spark"], "not known to run it on DGX Spark"),
        (["--on", "8xmi355x"], "give --gpu-price, or --own"),
        (["--ttft", "inf"], "not endless"),
    ],
)
def test_what_cannot_run_is_said_before_a_price_is_asked_for(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from freehold.cli.main import main

    assert main(["plan", *arguments]) != 0
    assert message in capsys.readouterr().err
