"""`freehold gateway` and the faulty upstream as processes, for benchmarks and for tests of the whole."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Self

from _http import Answer, call
from _processes import ROOT, Process, wait_until

KEY = "fh-test-" + "k3y" * 12
ADMIN_KEY = "fh-admin-" + "adm1n" * 8
UPSTREAM_KEY = "sk-upstream-" + "s3cret" * 6


def environment(**more: str) -> dict[str, str]:
    """This process's, with the modules of this tree first, and the keys that configurations below name."""
    paths = [str(ROOT / "src"), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    keys = {"UPSTREAM_KEY": UPSTREAM_KEY, "GATEWAY_ADMIN_KEY": ADMIN_KEY}
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | keys | more


class Upstream:
    """The running faulty upstream. `base(NAME)` is the base URL that behaves as the script NAME says."""

    def __init__(self, process: Process, url: str) -> None:
        self.process, self.url = process, url

    def base(self, name: str) -> str:
        return f"{self.url}/{name}/v1"

    def script(self, name: str, *scripts: Mapping[str, Any], **script: Any) -> None:
        """Several scripts with shares of the requests, or one."""
        self._control("PUT", f"/control/scripts/{name}", json.dumps(list(scripts) or [script]).encode())

    def reset(self) -> None:
        self._control("POST", "/control/reset", b"")

    def totals(self) -> dict[str, dict[str, int]]:
        found: dict[str, dict[str, int]] = self._control("GET", "/control/totals")
        return found

    def calls(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._control("GET", "/control/calls")
        return found

    def sockets(self) -> int:
        return int(self._control("GET", "/control/sockets")["open"])

    def _control(self, method: str, path: str, body: bytes | None = None) -> Any:
        answer = call(self.url, path, body, method=method, limit=30)
        if not answer.ok:
            raise RuntimeError(f"{method} {path}: {answer.status} {answer.error} {bytes(answer.body[:300])!r}")
        return answer.json()


@contextmanager
def upstream(*, cores: set[int] | None = None, keep_headers: bool = False) -> Iterator[Upstream]:
    command = [sys.executable, "-m", "tests.faults.upstream", *(["--keep-headers"] if keep_headers else [])]
    with Process(command, cores=cores) as process:
        yield Upstream(process, process.line(20))


class Gateway(Process):
    """The real command on a free port. text: its file, without `[gateway]`; options: of that table.

    `text` may use the keys `KEY` (by `key_table`), and upstreams `key_env = "UPSTREAM_KEY"`.
    """

    def __init__(
        self,
        directory: Path,
        text: str,
        *,
        options: str = "",
        cores: set[int] | None = None,
        env: Mapping[str, str] | None = None,
        port: int = 0,
    ) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.config = directory / "gateway.toml"
        self.options, self.port = options, port
        self.write(text)
        log = directory / "gateway.log"
        command = [sys.executable, "-m", "freehold.cli.main", "gateway", "run", str(self.config)]
        super().__init__(command, cores=cores, env=env or environment(), log=log)
        self.log_file = log
        self.url = ""

    def write(self, text: str) -> None:
        """Its file, new. A running gateway takes it up by itself."""
        head = f'[gateway]\nport = {self.port}\ndata_dir = "{self.directory / "data"}"\n'
        head += 'admin_key_env = "GATEWAY_ADMIN_KEY"\n' + self.options + "\n"
        self.config.write_text(head + text)

    def __enter__(self) -> Self:
        seen = self.log_file.stat().st_size if self.log_file.exists() else 0
        super().__enter__()

        def address() -> bool:
            if self.process.poll() is not None:
                raise RuntimeError(f"the gateway ended with {self.process.returncode}:\n{self.log_text()[-3000:]}")
            found = re.search(r"^ready: .*(http://127\.0\.0\.1:\d+)", self.log_text()[seen:], re.MULTILINE)
            self.url = found[1] if found else ""
            return bool(found)

        try:
            wait_until(address, 30, "the gateway said no address", pause=0.005)
            wait_until(lambda: call(self.url, "/ready", limit=5).status == 200, 30, "it was not ready", pause=0.005)
        except BaseException:
            self.kill()
            raise
        self.ready_seconds = time.monotonic() - self.started
        return self

    def log_text(self) -> str:
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    def ask(self, path: str = "/v1/chat/completions", body: Any = None, key: str = KEY, **how: Any) -> Answer:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return call(self.url, path, body, headers | how.pop("headers", {}), **how)

    def admin(self, path: str, body: Any = None, **how: Any) -> Answer:
        return self.ask(path, body, key=ADMIN_KEY, **how)

    @property
    def database(self) -> Path:
        """Raises RuntimeError if there is none."""
        found = sorted((self.directory / "data").glob("*.sqlite3"))
        if not found:
            raise RuntimeError(f"no database among {sorted((self.directory / 'data').glob('*'))}")
        return found[0]

    def rows(self) -> list[dict[str, Any]]:
        """Rows of the ledger that are on the disk now, by time."""
        with closing(sqlite3.connect(f"file:{self.database}?mode=ro", uri=True)) as database:
            database.row_factory = sqlite3.Row
            return [dict(row) for row in database.execute("select * from calls order by row_id")]


def chat(text: str = "hi", model: str = "m", **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}], **more}


def key_table(name: str = "tester", key: str = KEY, **settings: Any) -> str:
    """A `[keys.NAME]` table for a key."""
    lines = [f"[keys.{name}]", f'sha256 = "{hashlib.sha256(key.encode()).hexdigest()}"']
    return "\n".join([*lines, *(f"{field} = {json.dumps(value)}" for field, value in settings.items())]) + "\n"


def upstream_table(name: str, url: str, *, price: tuple[float, float] = (1.0, 2.0), more: str = "") -> str:
    """An `[upstreams.NAME]` table with one model, "model". more: lines of the table and its sub-tables."""
    return f"""
[upstreams.{name}]
url = "{url}"
key_env = "UPSTREAM_KEY"
models.model.prices = {{ input = {price[0]}, output = {price[1]} }}
{more}
"""


def alias_table(name: str, *upstreams: str, fallback: tuple[str, ...] = ()) -> str:
    """A `[models.NAME]` table with an arm, named as it is, for each upstream."""
    arms = ", ".join(f'{{ name = "{one}", upstream = "{one}", model = "model" }}' for one in upstreams)
    return f"[models.{name}]\narms = [{arms}]\nfallback = {json.dumps(list(fallback))}\n"
