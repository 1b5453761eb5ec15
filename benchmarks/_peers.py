"""What a gateway is compared with: LiteLLM's proxy in an environment of its own, and nginx as a plain proxy."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

from _http import call
from _processes import ROOT, Process, wait_until

PEERS = ROOT / "benchmarks" / ".peers"
LOCK = ROOT / "benchmarks" / "litellm.txt"
LITELLM_VERSION = "1.106.2"


class PeerFailed(Exception):
    """It could not be installed or started."""


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def litellm_environment(directory: Path = PEERS / "litellm") -> Path:
    """The environment's bin directory; made, with every hash checked, if it is not there or its lock has changed."""
    stamp = directory / "lock.sha256"
    wanted = hashlib.sha256(LOCK.read_bytes()).hexdigest()
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"LiteLLM {LITELLM_VERSION}: installing into {directory}, which takes a minute or two", flush=True)
        shutil.rmtree(directory, ignore_errors=True)
        _run([sys.executable, "-m", "venv", str(directory)])
        pip = [str(directory / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
        _run([*pip, "--require-hashes", "--only-binary", ":all:", "--requirement", str(LOCK)])
        stamp.write_text(wanted)
    return directory / "bin"


def nginx_program(directory: Path = PEERS / "nginx") -> Path | None:
    """nginx, installed or unpacked from Debian's package, or None where there is neither it nor apt."""
    if found := shutil.which("nginx"):
        return Path(found)
    program = directory / "usr" / "sbin" / "nginx"
    if not program.exists() and shutil.which("apt-get") and shutil.which("dpkg"):
        directory.mkdir(parents=True, exist_ok=True)
        try:
            _run(["apt-get", "download", "-qq", "nginx"], directory)
            for package in directory.glob("nginx_*.deb"):
                _run(["dpkg", "-x", str(package), str(directory)])
        except PeerFailed as error:
            print(f"nginx: {error}")
    return program if program.exists() else None


def _run(command: list[str], directory: Path | None = None) -> None:
    run = subprocess.run(command, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if run.returncode:
        raise PeerFailed(f"{' '.join(command[:6])} failed:\n{run.stdout[-2000:]}")


class LiteLlm(Process):
    """Its proxy with the same job: one key, one alias, two arms with weights 95 and 5, one worker.

    server: "granian" or "uvicorn". arms: base URLs of the two arms. No database, no callbacks: they would cost more.
    """

    def __init__(self, bin: Path, directory: Path, arms: tuple[str, str], server: str, cores: set[int]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.key = "sk-" + secrets.token_hex(24)
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        models = [
            {
                "model_name": "m",
                "litellm_params": {"model": "openai/model", "api_base": arm, "api_key": "k", "weight": weight},
            }
            for arm, weight in zip(arms, (95, 5), strict=True)
        ]
        config = {"model_list": models, "general_settings": {"master_key": self.key}}
        path = directory / "litellm.yaml"
        path.write_text(json.dumps(config))  # JSON is YAML
        command = [str(bin / "litellm"), "--config", str(path), "--host", "127.0.0.1", "--port", str(port)]
        command += ["--num_workers", "1", *(["--run_granian"] if server == "granian" else [])]
        # The production mode of its documentation; its price list from the package and not from the net.
        env = os.environ | {
            "LITELLM_MODE": "PRODUCTION",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "LITELLM_LOG": "ERROR",
        }
        env.pop("PYTHONPATH", None)
        super().__init__(command, cores=cores, env=env, log=directory / f"litellm-{server}.log")

    def __enter__(self) -> Self:
        super().__enter__()
        _wait_ready(self, "/health/liveliness")
        return self


class Nginx(Process):
    """A plain proxy with kept connections and no buffering: about the least that forwarding can cost."""

    def __init__(self, program: Path, directory: Path, upstream: str, cores: set[int]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.key = ""
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        address, _, path = upstream.removeprefix("http://").partition("/")
        temporary = "".join(
            f"{kind}_temp_path {directory};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        config = f"""
daemon off; worker_processes 1; pid {directory}/nginx.pid; error_log {directory}/error.log;
events {{ worker_connections 4096; }}
http {{
  access_log {directory}/access.log; {temporary}
  upstream up {{ server {address}; keepalive 64; }}
  server {{
    listen 127.0.0.1:{port};
    location /v1/ {{
      proxy_pass http://up/{path.removesuffix("v1").rstrip("/")}/v1/;
      proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
    }}
  }}
}}
"""
        (directory / "nginx.conf").write_text(config)
        command = [str(program), "-p", str(directory), "-c", str(directory / "nginx.conf")]
        super().__init__(command, cores=cores, log=directory / "nginx.log")

    def __enter__(self) -> Self:
        super().__enter__()
        _wait_ready(self, "/v1/models")
        return self


def _wait_ready(process: LiteLlm | Nginx, path: str) -> None:
    def ready() -> bool:
        if process.process.poll() is not None:
            log = process.log.read_text()[-2000:] if process.log is not None else ""
            raise PeerFailed(f"{process.command[0]} ended with {process.process.returncode}:\n{log}")
        return call(process.url, path, limit=2).status == 200

    try:
        wait_until(ready, 180, "it was not ready", pause=0.05)
    except BaseException:
        process.kill()
        raise
    process.ready_seconds = time.monotonic() - process.started
