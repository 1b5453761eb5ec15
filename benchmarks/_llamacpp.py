"""llama.cpp as a peer: getting it, converting checkpoints for it, and talking to it in a process of its own.

It comes from the source package of `llama-cpp-python`, which carries llama.cpp, its converter and a ctypes declaration
of its C API, and is compiled for this machine (GGML_NATIVE): prebuilt wheels are for the oldest CPUs.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

VERSION = "0.3.36"
PEERS = Path(__file__).resolve().parent / ".peers"
CMAKE_ARGS = "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DLLAMA_BUILD_TESTS=OFF"
_HERE = Path(__file__).resolve().parent


class PeerFailed(Exception):
    """llama.cpp could not be built, or did not answer, or answered with an error."""


@dataclass(frozen=True)
class Install:
    """package: the installed `llama_cpp` directory with its libraries. source: llama.cpp's, with its converter."""

    package: Path
    source: Path


def find(directory: Path) -> Install | None:
    """A build in `directory`, made by `build` or by hand: the unpacked source package, and a target directory or a
    virtual environment that it is installed in."""
    packages = [
        path.parent.parent
        for pattern in ("site/llama_cpp/lib/libllama.so", "*/lib/python*/site-packages/llama_cpp/lib/libllama.so")
        for path in directory.glob(pattern)
    ]
    sources = [path.parent for path in directory.glob("llama_cpp_python-*/vendor/llama.cpp/convert_hf_to_gguf.py")]
    return Install(packages[0], sources[0]) if packages and sources else None


def build(directory: Path = PEERS) -> Install:
    """Download the source package with pip, unpack it, and compile it into `directory`/site: some minutes, and a C++
    compiler is needed (CMake comes with the build). The environment this runs in is not changed."""
    directory.mkdir(parents=True, exist_ok=True)
    wanted = f"llama-cpp-python=={VERSION}"
    print(f"llama.cpp: fetching {wanted} (source) and compiling it for this machine into {directory}", flush=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    env = os.environ | {"CMAKE_ARGS": CMAKE_ARGS}
    download = ["download", "--no-binary", "llama-cpp-python", "--no-deps", "--dest", str(directory), wanted]
    _run([*pip, *download], env)
    archive = directory / f"llama_cpp_python-{VERSION}.tar.gz"
    with tarfile.open(archive) as tar:
        tar.extractall(directory, filter="data")
    tree = directory / f"llama_cpp_python-{VERSION}"
    _run([*pip, "install", "--no-deps", "--upgrade", "--target", str(directory / "site"), str(tree)], env)
    install = find(directory)
    if install is None:
        raise PeerFailed(f"the build left no library in {directory}")
    return install


def convert(install: Install, checkpoint: Path, output: Path, kind: str) -> None:
    """Write `checkpoint` as a GGUF file without its MTP layer. kind: bf16 or f32."""
    script = _HERE / "_llamacpp_convert.py"
    _run([sys.executable, str(script), str(install.source), str(checkpoint), str(output), kind])


def _run(command: list[str], env: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise PeerFailed(f"{' '.join(command)} failed:\n{done.stdout[-3000:]}")


class Peer:
    """A worker process (`_llamacpp_worker.py`, whose methods are the requests). A context manager: leaving it, or any
    failure, ends the process.

    timeout: seconds one request may take. Raises PeerFailed.
    """

    def __init__(self, install: Install, timeout: float) -> None:
        self.timeout = timeout
        command = [sys.executable, str(_HERE / "_llamacpp_worker.py"), str(install.package)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._buffer = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def ask(self, do: str, **arguments: Any) -> Any:
        """The worker's answer. While it computes, this process sleeps."""
        pipe = self._process.stdin
        assert pipe is not None
        try:
            pipe.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            pipe.flush()
        except BrokenPipeError:
            raise PeerFailed(f"llama.cpp ended with {self._process.wait()} before {do!r}") from None
        answer = json.loads(self._line(do))
        if "error" in answer:
            raise PeerFailed(f"llama.cpp, {do}: {answer['error']}")
        return answer["ok"]

    def _line(self, do: str) -> bytes:
        assert self._process.stdout is not None
        descriptor, deadline = self._process.stdout.fileno(), time.monotonic() + self.timeout
        while b"\n" not in self._buffer:
            if not select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
                self._process.kill()
                raise PeerFailed(f"llama.cpp took more than {self.timeout:g} s for {do!r}; --peer-timeout allows more")
            data = os.read(descriptor, 1 << 16)
            if not data:
                raise PeerFailed(f"llama.cpp ended with {self._process.wait()} during {do!r}")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line
