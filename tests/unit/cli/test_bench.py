"""`freehold bench engine`: what it prints, and its JSON, whose names others rely on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from freehold.cli.bench import _NAMES, parse_sizes
from freehold.cli.main import main
from freehold.errors import InvalidRequest
from freehold.model.tiny import make_tiny
from freehold.model.traffic import PARTS

NUMBER = (int, float)
SCENARIO = {
    "kind": str,
    "context": int,
    "context_range": list,
    "batch": int,
    "cache": str,
    "tokens": int,
    "seconds": NUMBER,
    "tokens_per_second": NUMBER,
    "bound_seconds": NUMBER,
    "bound_tokens_per_second": NUMBER,
    "fraction": NUMBER,
    "profiled_seconds": NUMBER,
    "overhead_seconds": NUMBER,
    "parts": list,
    "samples": list,
    "profiled_samples": list,
}
PART = {
    "part": str,
    "seconds": NUMBER,
    "share": NUMBER,
    "bytes": (*NUMBER, type(None)),
    "flops": (*NUMBER, type(None)),
    "bound_seconds": (*NUMBER, type(None)),
    "bound_by": (str, type(None)),
    "fraction": (*NUMBER, type(None)),
}
REPORT = {
    "schema": int,
    "model": str,
    "dtype": str,
    "ops": str,
    "isa": (str, type(None)),
    "threads": int,
    "cpu": str,
    "formats": dict,
    "ceilings": dict,
    "scenarios": list,
    "latent": str,
    "index": str,
}


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "nano"
    make_tiny(directory, "nano")
    return directory


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory's bandwidth is measured on 16 MiB: how fast it is does not matter here."""
    monkeypatch.setattr("freehold.engine.bench.ceilings.buffer_bytes", lambda: 1 << 24)


def conforms(value: dict[str, object], schema: dict[str, object]) -> None:
    assert list(value) == list(schema)
    for name, kind in schema.items():
        assert isinstance(value[name], kind), name  # type: ignore[arg-type]


def test_json(nano: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--context", "100", "--batch", "1,2", "--prefill", "40", "--samples", "3", "--threads", "1"]
    assert main(["bench", "engine", str(nano), *arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    conforms(report, REPORT)
    assert report["schema"] == 1
    assert (report["latent"], report["index"]) == ("bf16", "bf16")
    assert set(report["ceilings"]) == {"bytes_per_second", "flops_per_second"}
    assert [(s["kind"], s["batch"], s["cache"]) for s in report["scenarios"]] == [
        ("decode", 1, "random"), ("decode", 2, "random"), ("prefill", 1, "computed")
    ]  # fmt: skip
    for scenario in report["scenarios"]:
        conforms(scenario, SCENARIO)
        assert [part["part"] for part in scenario["parts"]] == list(PARTS)
        for part in scenario["parts"]:
            conforms(part, PART)
        # Samples whose parts do not sum to them within 2 % are an error. Medians of parts sum to less than the median
        # where a busy machine put the process aside in another part each time.
        whole = sum(part["seconds"] for part in scenario["parts"])
        assert 0 < whole < 1.05 * max(scenario["profiled_samples"])


def test_a_table_fits_80_columns(
    nano: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    arguments = ["--context", "100", "--prefill", "", "--samples", "3", "--threads", "1"]
    assert main(["bench", "engine", str(nano), *arguments]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert "decode step, 1 request at 100 (positions 97 to 102)" in shown
    assert "cache filled with random values" in " ".join(shown.split())
    for name in _NAMES.values():
        assert name in shown
    assert "step, not profiled" in shown
    assert "prefill" not in shown


def test_what_8_bit_caches_do_to_predictions(
    nano: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be, that is the question. " * 5, encoding="utf-8")
    assert main(["bench", "caches", str(nano), "--text", str(text)]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    for fact in (
        "fp8_ds_mla latents and fp8 index keys against",
        "bf16 latents and bf16 index",
        "same top 1",
        "0 to 15",
    ):
        assert fact in shown, fact
    assert shown.count("bytes a token, ") == 3
    assert main(["bench", "caches", str(nano), "--text", str(text), "--quantize", "int8", "--json"]) == 0
    caches = json.loads(capsys.readouterr().out)["caches"]
    assert [(each["latent"], each["index"]) for each in caches] == [
        ("bf16", "fp8"), ("fp8_ds_mla", "bf16"), ("fp8_ds_mla", "fp8")
    ]  # fmt: skip
    assert all(each["bytes_per_token"] < each["bytes_as_computed"] for each in caches)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["caches"], "give --text FILE"),
        (["caches", "--text", "none.txt"], "none.txt: cannot be read"),
        (["caches", "--text", "none.txt", "--latent-cache", "fp8"], "of the options it takes --text"),
        (["caches", "--text", "none.txt", "--samples", "4"], "of the options it takes --text"),
        (["engine", "--text", "none.txt"], "--text is for bench caches"),
    ],
)
def test_each_subject_has_its_options(
    nano: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", arguments[0], str(nano), *arguments[1:]]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_every_part_has_a_name() -> None:
    assert list(_NAMES) == list(PARTS)


@pytest.mark.parametrize(("text", "sizes"), [("128,4096", (128, 4096)), ("1", (1,)), ("2, 2,3", (2, 3)), ("", ())])
def test_sizes(text: str, sizes: tuple[int, ...]) -> None:
    assert parse_sizes("batch", text) == sizes


@pytest.mark.parametrize("text", ["0", "-1", "1,,2", "4k", "1.5", "²"])
def test_wrong_sizes(text: str) -> None:
    with pytest.raises(InvalidRequest, match="--batch"):
        parse_sizes("batch", text)


@pytest.mark.parametrize(
    ("arguments", "code"), [(["engine", "nowhere"], 3), (["engine", ".", "--batch", "x"], 2), (["gateway", "."], 2)]
)
def test_errors(
    arguments: list[str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *arguments]) == code
    assert "rror: " in capsys.readouterr().err
