"""Runs the code blocks of the README and the documentation, against live servers where they need one."""

from __future__ import annotations

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
