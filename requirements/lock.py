"""Writes run.txt and dev.txt: every package but torch, pinned with hashes. `make lock` calls this.

`run.txt` is pyproject's dependencies and the `engine` extra; `dev.txt` adds the extras that tests use. Versions already
in the files are kept; give pip-compile's `--upgrade` or `--upgrade-package NAME` to raise them. torch is left out
(torch.txt says why); of what torch needs, the pure Python packages are in run.txt and the vendor libraries of its GPU
builds come with torch.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
OWN_PINS = ("torch",)
TESTED_EXTRAS = ("engine", "oracle", "postgres", "parquet", "otel", "dev")
# What torch 2.13 needs on every platform; the lock is made without torch, so pip-compile cannot see these.
TORCH_NEEDS = ("filelock", "fsspec", "jinja2", "networkx", "setuptools", "sympy", "typing-extensions")
HEADER = """\
# Made by `make lock`; do not edit. {what}, pinned with hashes; torch.txt is apart.
"""


def requirements(*extras: str) -> list[str]:
    """The requirement lines of pyproject's dependencies and of these extras, without torch."""
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]
    lines = list(project["dependencies"])
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    return [line for line in lines if not line.startswith(OWN_PINS)]


def compile_lock(lines: list[str], output: Path, what: str, options: list[str]) -> None:
    """Run pip-compile on `lines`, starting from the pins in `output`."""
    with tempfile.TemporaryDirectory() as scratch:
        source, result = Path(scratch, "in.txt"), Path(scratch, "out.txt")
        source.write_text("\n".join(lines) + "\n")
        if output.exists():
            result.write_text(output.read_text())
        quiet = ["--quiet", "--strip-extras", "--no-header", "--no-annotate", "--no-emit-index-url"]
        quiet += ["--no-emit-find-links", "--no-emit-trusted-host", "--no-emit-options"]
        pins = ["--generate-hashes", "--allow-unsafe"]  # "unsafe" is pip's word for pinning setuptools and pip too
        command = [sys.executable, "-m", "piptools", "compile", *quiet, *pins, *options]
        subprocess.run([*command, "--output-file", str(result), str(source)], check=True)
        output.write_text(HEADER.format(what=what) + result.read_text())


def main(options: list[str]) -> None:
    run, dev = HERE / "run.txt", HERE / "dev.txt"
    compile_lock([*requirements("engine"), *TORCH_NEEDS], run, "What Freehold runs with", options)
    pinned = [line.split()[0] for line in run.read_text().splitlines() if "==" in line]
    compile_lock([*requirements(*TESTED_EXTRAS), *pinned], dev, "What Freehold runs and is tested with", options)


if __name__ == "__main__":
    main(sys.argv[1:])
