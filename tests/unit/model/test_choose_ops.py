"""Which operations a model gets, what is said when the fast ones are missing, and that they run the whole model."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from freehold.errors import ConfigError
from freehold.model.cache import PagedCache
from freehold.model.config import GlmConfig
from freehold.model.glm import Glm
from freehold.model.inputs import ForwardInput, Span, single_sequence
from freehold.model.ops import library
from freehold.model.ops.choose import load_ops
from freehold.model.ops.interface import Ops
from freehold.model.ops.reference import ReferenceOps
from freehold.model.sizes import size_config
from freehold.model.tiny import make_tiny
from freehold.model.weights import load_weights
from tests.native_cases import ALL_ISAS, native, needs_native

ROOT = Path(__file__).parents[3]


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The library is looked for where there is none."""
    path = tmp_path / "_native.so"
    monkeypatch.setattr(library, "_PATH", path)
    library._libraries.cache_clear()
    yield path
    library._libraries.cache_clear()


@needs_native
def test_bf16_runs_native_and_fp32_on_the_exact_reference(capsys: pytest.CaptureFixture[str]) -> None:
    assert load_ops(torch.bfloat16).name == "native"
    assert load_ops(torch.float32).name == "reference"
    assert load_ops(torch.bfloat16, "reference").name == "reference"
    assert capsys.readouterr().err == ""


def test_without_a_library_the_reference_runs_and_says_why(missing: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert load_ops(torch.bfloat16).name == "reference"
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "slow" in said
    assert "C++ compiler" in said
    with pytest.raises(ConfigError, match="C\\+\\+ compiler"):
        load_ops(torch.bfloat16, "native")


def test_a_file_that_is_no_library_is_told(missing: Path) -> None:
    missing.write_bytes(b"not a library")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_ops(torch.bfloat16, "native")


def test_a_library_that_is_not_ours_is_told(missing: Path) -> None:
    other = next(Path(torch.__file__).parent.glob("lib/libc10.so"))
    shutil.copy(other, missing)
    with pytest.raises(ConfigError, match="another version of Freehold \\(none, not"):
        load_ops(torch.bfloat16, "native")


@needs_native
def test_a_library_of_another_version_is_told(missing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(Path(library.__file__).with_name("_native.so"), missing)
    monkeypatch.setattr(library, "VERSION", library.VERSION + 1)
    with pytest.raises(ConfigError, match="another version"):
        load_ops(torch.bfloat16, "native")


def test_without_a_compiler_the_build_succeeds_and_makes_no_library(tmp_path: Path) -> None:
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "native", tmp_path / "native")
    (tmp_path / "src" / "freehold").mkdir(parents=True)
    shutil.copy(ROOT / "src/freehold/__init__.py", tmp_path / "src/freehold")
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tmp_path,
        env={**os.environ, "CC": "/nowhere/cc", "CXX": "/nowhere/c++"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("_native.so"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Glm:
    directory = tmp_path_factory.mktemp("nano")
    make_tiny(directory, "nano")
    model = Glm(GlmConfig.from_dict(size_config("nano")), dtype=torch.bfloat16).requires_grad_(False).eval()
    load_weights(model, directory)
    return model


def run(model: Glm, ops: Ops, batches: list[ForwardInput]) -> torch.Tensor:
    cache = PagedCache(model.config, 12, 16, model.dtype)
    model.ops = ops
    with torch.inference_mode():
        return torch.cat([model.logits(model(inputs, cache)) for inputs in batches]).float()


@pytest.mark.parametrize("isa", ALL_ISAS)
def test_the_whole_model_is_as_near_to_fp32_as_the_reference_is(isa: str, model: Glm) -> None:
    """Prefill past index_topk in two chunks, then decode: bf16 rounding on both paths, so both are held to fp32."""
    tokens = torch.randint(0, 448, (100,), generator=torch.Generator().manual_seed(2)).tolist()
    batches = [single_sequence(tokens[a:b], start=a, block_size=16) for a, b in ((0, 60), (60, 90))]
    batches += [single_sequence([token], start=90 + i, block_size=16) for i, token in enumerate(tokens[90:])]
    exact = Glm(model.config, dtype=torch.float32).requires_grad_(False)
    exact.load_state_dict(model.state_dict())
    truth = run(exact, ReferenceOps(), batches)
    errors = [float((run(model, ops, batches) - truth).square().mean().sqrt()) for ops in (native(isa), ReferenceOps())]
    assert errors[0] < 1.5 * errors[1]


@pytest.mark.parametrize("isa", ALL_ISAS)
def test_decoding_together_gives_the_logits_of_decoding_alone(isa: str, model: Glm) -> None:
    """Bit for bit in bf16, whatever the lengths of the others."""
    tokens = torch.randint(0, 448, (4, 60), generator=torch.Generator().manual_seed(3))
    lengths = [3, 17, 30, 44]
    alone = []
    cache = PagedCache(model.config, 12, 16, model.dtype)
    model.ops = native(isa)
    tables = [list(range(3 * i, 3 * i + 3)) for i in range(4)]
    with torch.inference_mode():
        for i, length in enumerate(lengths):
            model(single_sequence(tokens[i, :length].tolist(), block_size=16, table=tables[i]), cache)
        for i, length in enumerate(lengths):
            one = single_sequence([int(tokens[i, length])], start=length, block_size=16, table=tables[i])
            alone.append(model.logits(model(one, cache)))
        positions = torch.tensor(lengths)
        spans = tuple(Span(i, 1, length, torch.tensor(tables[i])) for i, length in enumerate(lengths))
        slots = torch.tensor([tables[i][n // 16] * 16 + n % 16 for i, n in enumerate(lengths)])
        together = ForwardInput(tokens[torch.arange(4), positions], positions, slots, spans, 16)
        assert torch.equal(model.logits(model(together, cache)), torch.cat(alone))
