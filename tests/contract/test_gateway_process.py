"""The gateway's process: settings on a signal, and a drain that lets calls end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.source_checks import ROOT

COMMAND = [sys.executable, "-m", "freehold.cli.main"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
CONFIG = """
[gateway]
port = 0
[upstreams.u]
url = "{root}/v1"
models.m = {{}}
[models.a]
arms = [{{ name = "only", upstream = "u", model = "m" }}]
"""
BODY = {"model": "a", "messages": [{"role": "user", "content": "Hello [[sim words=60]]"}], "stream": True}


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Callable[..., tuple[subprocess.Popen[bytes], Path, str]]]:
    """Starts a command in a folder; gives its process, its output and its address, when it is ready."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*words: str) -> tuple[subprocess.Popen[bytes], Path, str]:
        log = tmp_path / f"{len(started)}.log"
        with log.open("wb") as output:
            each = subprocess.Popen(
                [*COMMAND, *words], cwd=tmp_path, env=ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT
            )
        started.append(each)
        wait_for("ready: ", log, each)
        [line] = [line for line in log.read_text().splitlines() if line.startswith("ready: ")]
        return each, log, line.partition(" on ")[2].partition("/v1")[0]

    yield start
    for each in started:
        if each.poll() is None:
            each.kill()
        each.wait()


def wait_for(words: str, log: Path, process: subprocess.Popen[bytes], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while words not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.02)


def test_a_signal_reloads_and_another_drains(
    process: Callable[..., tuple[subprocess.Popen[bytes], Path, str]], tmp_path: Path
) -> None:
    _, _, engine = process("serve", "--sim", "--served-model-name", "m", "--port", "0", "--sim-itl-ms", "30")
    (tmp_path / "gateway.toml").write_text(CONFIG.format(root=engine))
    gateway, log, root = process("gateway", "gateway.toml")

    gateway.send_signal(signal.SIGHUP)
    wait_for("new settings: gateway.toml", log, gateway)

    with (
        httpx.Client(base_url=root, timeout=30) as client,
        client.stream("POST", "/v1/chat/completions", json=BODY) as answer,
    ):
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        gateway.send_signal(signal.SIGTERM)
        wait_for("draining", log, gateway)
        refused = httpx.post(f"{root}/v1/chat/completions", json=BODY)
        assert refused.status_code == 503
        assert float(refused.headers["retry-after"]) > 0
        assert httpx.get(f"{root}/ready").status_code == 503
        assert httpx.get(f"{root}/health").status_code == 200
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert gateway.wait(timeout=20) == 0, log.read_text()
