"""`freehold serve --sim` as a process: what it imports, what it prints, and how it stops."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest

ENDLESS: Any = {
    "model": "freehold-sim",
    "messages": [{"role": "user", "content": "go on"}],
    "stream": True,
    "extra_body": {"ignore_eos": True},
}


class Process:
    """A server process whose lines are collected while it runs."""

    def __init__(self, *options: str, **env: str) -> None:
        command = [sys.executable, "-m", "freehold.cli.main", "serve", "--sim", "--port", "0", *options]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | env
        )
        self.lines: list[str] = []
        self.errors: list[str] = []
        for pipe, lines in ((self.process.stdout, self.lines), (self.process.stderr, self.errors)):
            threading.Thread(target=self._read, args=(pipe, lines), daemon=True).start()

    @staticmethod
    def _read(pipe: Any, lines: list[str]) -> None:
        with pipe:
            for line in pipe:
                lines.append(line.rstrip("\n"))  # noqa: PERF401  as they come, not when the pipe ends

    def wait_for(self, text: str, seconds: float = 30) -> str:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for line in list(self.lines):
                if text in line:
                    return line
            assert self.process.poll() is None, f"it ended: {self.errors[-3:]}"
            time.sleep(0.01)
        raise AssertionError(f"{text!r} was not printed: {self.lines}")

    @property
    def url(self) -> str:
        match = re.search(r"http://\S+(?=/v1)", self.wait_for("ready: "))
        assert match is not None
        return match[0]

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=30)

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def exit_code(self, seconds: float = 15) -> int:
        return self.process.wait(seconds)


@pytest.fixture
def run() -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def start(*options: str, **env: str) -> Process:
        started.append(Process(*options, **env))
        return started[-1]

    yield start
    for process in started:
        if process.process.poll() is None:
            process.process.kill()
        process.process.wait()


def test_the_example_it_prints_works_and_it_does_without_torch(run: Callable[..., Process]) -> None:
    process = run("--served-model-name", "glm", "--sim-drafts", "3", PYTHONPROFILEIMPORTTIME="1")
    process.wait_for('"content": "Hello"')
    example = "\n".join(process.lines[1:3]).removeprefix("try:").strip()
    answer = subprocess.run(["sh", "-c", example], capture_output=True, text=True, timeout=20, check=True)
    assert '"model":"glm"' in answer.stdout
    assert "You said: Hello" in answer.stdout
    process.signal()
    assert process.exit_code() == 0
    modules = {line.rpartition("|")[2].strip() for line in process.errors if "|" in line}
    assert "freehold.engine.sim" in modules, "the imports are really listed"
    assert not {name for name in modules if name.partition(".")[0] in ("torch", "transformers", "safetensors")}


def test_sigterm_lets_running_streams_finish_and_takes_no_others(run: Callable[..., Process]) -> None:
    process = run("--sim-itl-ms", "20")
    client = process.client()
    stream = client.chat.completions.create(**ENDLESS, max_tokens=100)
    next(iter(stream))
    process.signal()
    process.wait_for("draining")
    ready = httpx.get(f"{process.url}/ready")
    assert ready.status_code == 503
    assert int(ready.headers["retry-after"]) >= 1
    assert httpx.get(f"{process.url}/health").status_code == 200
    with pytest.raises(openai.InternalServerError) as refused:
        client.chat.completions.create(**ENDLESS)
    assert refused.value.status_code == 503
    assert int(refused.value.response.headers["retry-after"]) >= 1
    *_, last = stream
    assert last.choices[0].finish_reason == "length"
    client.close()
    assert process.exit_code() == 0
    assert not process.errors


def test_what_is_not_finished_at_the_timeout_is_told_so(run: Callable[..., Process]) -> None:
    process = run("--sim-itl-ms", "20", "--drain-timeout", "0.3")
    stream = process.client().chat.completions.create(**ENDLESS)
    next(iter(stream))
    process.signal()
    with pytest.raises(openai.APIError, match="before the answer was complete"):
        for _ in stream:
            pass
    assert process.exit_code() == 0


def test_a_second_signal_ends_it_at_once(run: Callable[..., Process]) -> None:
    process = run("--sim-itl-ms", "20")
    stream = process.client().chat.completions.create(**ENDLESS)
    next(iter(stream))
    process.signal()
    process.wait_for("draining")
    process.signal(signal.SIGINT)
    assert process.exit_code(3) == 128 + signal.SIGINT


def test_a_first_generation_that_fails_ends_the_process(run: Callable[..., Process]) -> None:
    process = run("--sim-fault", "crash")
    assert process.exit_code() == 7
    assert any("simulated crash" in line for line in process.errors)
