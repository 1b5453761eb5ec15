"""`freehold serve`: options, and what cannot be served."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from freehold.cli.main import main
from freehold.cli.serve import parse_bytes, parse_fault, parse_lora
from freehold.engine.sim import Fault
from freehold.errors import InvalidRequest
from freehold.model.tiny import make_tiny


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GiB", 4 * 2**30),
        ("4 gib", 4 * 2**30),
        ("500MB", 500 * 10**6),
        ("1.5TiB", 3 * 2**39),
        ("1024", 1024),
        ("7B", 7),
        (None, None),
    ],
)
def test_sizes(text: str | None, size: int | None) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "4GiG", "-4GiB", "4,5GB", "nan", "4 G i B"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(InvalidRequest, match="--cache-bytes"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("error", Fault("error")),
        ("stall after=3 seconds=0.5 every=2", Fault("stall", after=3, seconds=0.5, every=2)),
    ],
)
def test_faults(text: str, fault: Fault) -> None:
    assert parse_fault(text) == fault


@pytest.mark.parametrize(
    "text",
    ["", "boom", "error after", "error after=x", "error every=0", "error after=-1", "slow seconds=inf", "error foo=1"],
)
def test_what_is_no_fault(text: str) -> None:
    with pytest.raises(InvalidRequest, match="--sim-fault"):
        parse_fault(text)


def test_adapters() -> None:
    assert parse_lora(["a=/x", " b =y=z"], (), sim=False) == (("a", Path("/x")), ("b", Path("y=z")))
    assert [name for name, _ in parse_lora(["a", "b"], ("m",), sim=True)] == ["a", "b"]


@pytest.mark.parametrize(
    ("given", "sim", "says"),
    [
        (["a"], False, "give NAME=DIRECTORY"),
        (["a="], False, "give NAME=DIRECTORY"),
        (["=x"], False, "give NAME=DIRECTORY"),
        ([""], False, "give NAME=DIRECTORY"),
        (["a=x"], True, "give NAME: --sim has no weights"),
        ([""], True, "give NAME: --sim has no weights"),
        (["a=x", " a=y"], False, "a is another's name"),
        (["m=x"], False, "m is another's name"),
    ],
)
def test_what_is_no_adapter(given: list[str], sim: bool, says: str) -> None:
    with pytest.raises(InvalidRequest, match=f"--lora .*: {says}"):
        parse_lora(given, ("m",), sim)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "or --sim"),
        (["somewhere", "--sim"], "or --sim"),
        (["somewhere", "--sim-drafts", "3"], "need --sim"),
        (["--sim", "--cache-bytes", "1GiB"], "--sim has none"),
        (["--sim", "--threads", "2"], "--sim has none"),
        (["--sim", "--verify"], "--sim has none"),
        (["--sim", "--index-cache", "fp8"], "--sim has none"),
        (["--sim", "--latent-cache", "fp8"], "--sim has none"),
        (["--sim", "--salt-per-key"], "FREEHOLD_API_KEY"),
        (["--sim", "--host", "0.0.0.0"], "FREEHOLD_API_KEY"),
        (["--sim", "--api-key-file", "/nowhere"], "/nowhere"),
        (["--sim", "--port", "0", "--sim-fault", "boom"], "--sim-fault"),
        (["--sim", "--port", "0", "--lora", "a=b"], "--sim has no weights"),
    ],
)
def test_what_cannot_be_served_is_said_in_one_line(
    options: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FREEHOLD_API_KEY", raising=False)
    assert main(["serve", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert says in line


def test_the_size_of_expert_memory_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_tiny(tmp_path, "nano")
    assert main(["serve", str(tmp_path), "--port", "0", "--expert-memory", "many"]) == 2
    assert "--expert-memory 'many': give bytes" in capsys.readouterr().err
    assert main(["serve", str(tmp_path), "--port", "0", "--expert-memory", "1kB"]) == 5
    assert "a step may need all 16 experts of a layer" in capsys.readouterr().err
    assert main(["serve", str(tmp_path), "--port", "0", "--expert-dir", str(tmp_path)]) == 2
    assert "--expert-dir needs --expert-memory" in capsys.readouterr().err
    assert main(["serve", "--sim", "--expert-memory", "1GB"]) == 2
    assert "--sim has none" in capsys.readouterr().err


def test_an_adapter_is_looked_at_before_weights_are_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_tiny(tmp_path / "nano", "nano")
    next((tmp_path / "nano").glob("*.safetensors")).write_bytes(b"not weights, and not read")
    assert main(["serve", str(tmp_path / "nano"), "--port", "0", "--lora", f"a={tmp_path}"]) == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"error: {tmp_path}/adapter_config.json: no such file; expected an adapter's directory, as PEFT saves one"
    )


def test_a_missing_checkpoint_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(tmp_path / "nowhere"), "--port", "0"]) != 0
    assert "nowhere" in capsys.readouterr().err


def test_shards_are_verified_before_they_are_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_tiny(tmp_path, "nano")
    shard = next(tmp_path.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert main(["serve", str(tmp_path), "--port", "0", "--verify"]) == 4
    assert f"{shard.name}: its SHA-256" in capsys.readouterr().err


def test_the_command_and_the_server_import_no_torch() -> None:
    code = (
        "import sys, freehold.cli.serve, freehold.serve.server, freehold.engine.sim\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'safetensors', 'llguidance')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_model_name_is_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--sim", "--port", "0", "--served-model-name", name]) == 2
    assert "--served-model-name is empty" in capsys.readouterr().err
