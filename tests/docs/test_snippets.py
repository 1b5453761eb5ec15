"""Runs the code blocks of the README and the documentation, against live servers where they need one."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.docs.markdown import Block, all_blocks
from tests.source_checks import ROOT

# As after `source .venv/bin/activate`, wherever these tests run from.
ENVIRONMENT = {
    **os.environ,
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    "PYTHONPATH": str(ROOT / "src"),
}
FREEHOLD = [sys.executable, "-m", "freehold.cli.main"]


PORT = re.compile(r"\b80\d\d\b")
SIM = "--sim --served-model-name freehold-tiny"


@dataclass(frozen=True)
class Server:
    """A running `freehold serve` of freehold-tiny, or of its name. root: its address."""

    root: str
    is_sim: bool


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_ready(process: subprocess.Popen[bytes], root: str, log: Path, seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if process.poll() is not None:
            raise AssertionError(f"the server ended with {process.returncode}:\n{log.read_text()}")
        try:
            with urllib.request.urlopen(f"{root}/ready", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)
    raise AssertionError(f"not ready after {seconds} s:\n{log.read_text()}")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models/small, which is really a nano: the blocks are about commands, not sizes; and with
    models/freehold-tiny."""
    folder = tmp_path_factory.mktemp("here")
    command = [*FREEHOLD, "tiny", "models/small", "--size", "nano"]
    subprocess.run(command, cwd=folder, env=ENVIRONMENT, check=True, timeout=120)
    (folder / "models" / "freehold-tiny").symlink_to(ROOT / "models" / "freehold-tiny")
    return folder


@pytest.fixture(scope="module", params=["sim", "checkpoint"])
def server(request: pytest.FixtureRequest, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    port = free_port()
    what = ["--sim", "--served-model-name", "freehold-tiny"] if request.param == "sim" else ["models/freehold-tiny"]
    log = tmp_path_factory.mktemp("log") / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*FREEHOLD, "serve", *what, "--port", str(port)], cwd=models, env=ENVIRONMENT, stdout=output, stderr=output
        )
    try:
        root = f"http://127.0.0.1:{port}"
        wait_ready(process, root, log, 60)
        yield Server(root, request.param == "sim")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0, log.read_text()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def run(block: Block, folder: Path, text: str) -> str:
    """Run a block as a reader would: in a shell, or as a Python script. Returns what it printed."""
    command = [sys.executable, "-c", text] if block.language == "python" else ["bash", "-euo", "pipefail", "-c", text]
    result = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, f"{block} failed:\n{text}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.mark.parametrize("block", all_blocks("server"), ids=str)
def test_a_snippet_works_against_a_live_server(block: Block, server: Server, models: Path) -> None:
    assert "http://127.0.0.1:8000" in block.text, "the block talks to no server"
    output = run(block, models, block.text.replace("http://127.0.0.1:8000", server.root))
    assert output.strip(), "it printed nothing"
    assert not re.search(r'"error"', output), output


@pytest.mark.parametrize("block", all_blocks("here"), ids=str)
def test_a_snippet_works_beside_a_checkpoint(block: Block, models: Path) -> None:
    assert run(block, models, block.text).strip(), "it printed nothing"


def pages_in_turn() -> list[Path]:
    return list(dict.fromkeys(block.file for block in all_blocks("in turn")))


@pytest.mark.parametrize("engine", [SIM, str(ROOT / "models" / "freehold-tiny")], ids=["sim", "checkpoint"])
@pytest.mark.parametrize("page", pages_in_turn(), ids=lambda page: page.name)
def test_a_page_works_from_top_to_bottom(page: Path, engine: str, tmp_path: Path) -> None:
    blocks = [block for block in all_blocks("in turn") if block.file == page]
    assert any(SIM in block.text for block in blocks), "nothing stands for the checkpoint"
    blocks = [dataclasses.replace(block, text=block.text.replace(SIM, engine)) for block in blocks]
    printed = run_in_turn(blocks, tmp_path)
    if page.name == "run-a-gateway.md" and engine == SIM:
        check_what_the_gateways_page_says({block.text: text for block, text in printed.items()})


def check_what_the_gateways_page_says(printed: dict[str, str]) -> None:
    def shown(words: str) -> str:
        [text] = [text for block, text in printed.items() if words in block]
        return text

    small, _, large = shown("for limit in 100 4096").partition("\n200\n")
    assert '"usage"' in small
    assert "budget_exhausted" in large
    assert "\n429\n" in large
    assert "ramping" in shown("until freehold canary status")
    assert shown("traffic.py") == "400 answers\n"
    looked = shown("freehold ledger tokens")
    assert re.search(r"question +1 +400 +0 ", looked)
    assert re.search(r"^new +\d+ +0 ", looked, re.MULTILINE)
    assert 'freehold_gateway_attempts_total{alias="assistant",arm="new"' in looked
    assert "rolled_back" in shown("canary abort")
    assert "the same again" in shown("canary abort")


def run_in_turn(blocks: list[Block], folder: Path) -> dict[Block, str]:
    """Run blocks one after the other, those that serve in the background. Every port is replaced by a free one.
    Returns what the others printed. At the end each server must drain and end well."""
    ports = {port: str(free_port()) for block in blocks for port in PORT.findall(block.text + block.mode)}
    printed: dict[Block, str] = {}
    serving: list[tuple[subprocess.Popen[bytes], Path]] = []
    try:
        for block in blocks:
            text, mode = (PORT.sub(lambda port: ports[port[0]], each) for each in (block.text, block.mode))
            _, _, root = mode.partition("serves ")
            if not root:
                printed[block] = run(block, folder, text)
                assert printed[block].strip(), f"{block} printed nothing"
                continue
            log = folder / f"serving-{len(serving)}.log"
            with log.open("wb") as output:
                command = ["bash", "-c", f"exec {text.strip()}"]
                process = subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stdout=output, stderr=output)
            serving.append((process, log))
            wait_ready(process, root, log, 60)
        for process, log in reversed(serving):
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=40) == 0, log.read_text()
    finally:
        for process, _ in serving:
            if process.poll() is None:
                process.kill()
                process.wait()
    return printed


def test_a_block_that_fails_in_turn_is_found(tmp_path: Path) -> None:
    page = ROOT / "README.md"
    good = Block(page, 1, "bash", "in turn", "echo 1 > kept; echo made")
    next_one = Block(page, 2, "bash", "in turn", "cat kept")
    assert run_in_turn([good, next_one], tmp_path) == {good: "made\n", next_one: "1\n"}
    with pytest.raises(AssertionError, match="failed"):
        run_in_turn([Block(page, 3, "bash", "in turn", "cat kept; false")], tmp_path)
    with pytest.raises(AssertionError, match="ended with 3"):
        run_in_turn([Block(page, 4, "bash", "in turn, serves http://127.0.0.1:8000", "sh -c 'exit 3'")], tmp_path)


def test_a_directive_makes_the_simulator_fail(server: Server) -> None:
    """The simulator's how-to, both sides: there the request fails, a real model answers."""
    block = next(block for block in all_blocks("no") if "[[sim error" in block.text)
    body = re.search(r"-d '(.*)'", block.text, re.DOTALL)
    assert body
    request = urllib.request.Request(
        f"{server.root}/v1/chat/completions",
        data=json.dumps({**json.loads(body[1]), "max_tokens": 8}).encode(),
        headers={"content-type": "application/json"},
    )
    if server.is_sim:
        with pytest.raises(urllib.error.HTTPError) as failure:
            urllib.request.urlopen(request, timeout=60)
        assert failure.value.code == 500
    else:
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert answer.status == 200


def test_make_up_prints_the_snippets_of_the_readme() -> None:
    """`make up` shows the README's own text: what is tested above is what a newcomer is told."""
    makefile = (ROOT / "Makefile").read_text()
    command = re.search(r"@(sed -n '/<!-- try -->/.*README\.md.*)$", makefile, re.MULTILINE)
    assert command, "the Makefile prints the README's try region"
    shown = subprocess.run(
        ["sh", "-c", command[1].replace("$(PORT)", "8123").replace("$(NAME)", "freehold-tiny").replace("$$", "$")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "curl http://127.0.0.1:8123/v1/chat/completions" in shown
    assert "from openai import OpenAI" in shown
    assert '"model": "freehold-tiny"' in shown
    assert "<!--" not in shown
    assert "```" not in shown
