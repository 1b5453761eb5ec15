"""The wheel: it builds without a compiler, holds every file of the package, and by default needs no torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from tests.source_checks import ROOT, tracked


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    # Built from a copy: setuptools leaves build/ and *.egg-info beside the sources it reads.
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for file in tracked("src", "native", "setup.py", "MANIFEST.in", "pyproject.toml", "README.md", "LICENSE"):
        target = copy / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    # Without a compiler: the kernels are optional, and compiling them takes longer than everything else here.
    environment = {**os.environ, "CC": "false", "CXX": "false"}
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(copy)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_every_file_of_the_package_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    ours = {str(file.relative_to(ROOT / "src")) for file in tracked("src/freehold")}
    assert ours <= set(wheel.namelist()), sorted(ours - set(wheel.namelist()))


def test_nothing_else_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    folders = {Path(name).parts[0] for name in wheel.namelist()}
    assert {name.partition("-")[0] for name in folders} == {"freehold"}


def test_the_default_install_needs_no_torch(wheel: zipfile.ZipFile) -> None:
    name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(wheel.read(name).decode())
    default = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert default
    assert not [line for line in default if line.startswith(("torch", "transformers", "safetensors"))]
    engine = [line for line in metadata.get_all("Requires-Dist", []) if 'extra == "engine"' in line]
    assert [line for line in engine if line.startswith("torch")]


def test_the_licence_and_the_entry_point_are_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert [name for name in names if name.endswith("licenses/LICENSE")]
    entry_points = next(name for name in names if name.endswith("entry_points.txt"))
    assert "freehold = freehold.cli.main:main" in wheel.read(entry_points).decode()
