"""A model whose experts are paged: equal bit for bit to the one that holds them all, however little memory it has."""

from __future__ import annotations

import gc
import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from freehold.engine.loading import EngineOptions, load_model
from freehold.errors import CheckpointError, ConfigError, EngineError, InsufficientMemory
from freehold.model import paged as paged_module
from freehold.model import weights
from freehold.model.cache import PagedCache
from freehold.model.config import GlmConfig
from freehold.model.glm import Glm
from freehold.model.inputs import single_sequence
from freehold.model.paged import PagedStack, packing_digest
from freehold.model.pager import ExpertPager
from freehold.model.quantize import quantize_checkpoint
from freehold.model.sizes import size_config
from freehold.model.tiny import write_random_checkpoint
from tests.faults.pagers import CarelessPager, EarlyPager, ForgetfulPager, SwappedPager
from tests.native_cases import needs_native

CONFIG = size_config("nano") | {"n_routed_experts": 24, "num_experts_per_tok": 3}
TINY = 24 * 12288 * 2
"""Room for the experts of one layer of bf16, or of a few of int4 and the MTP layer's int8."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "nano"
    write_random_checkpoint(CONFIG, path, seed=3)
    return path


@pytest.fixture
def files(tmp_path: Path) -> Path:
    return tmp_path / "experts"


def load(directory: Path, **options: Any) -> Glm:
    return load_model(directory, GlmConfig.from_file(directory), EngineOptions(threads=2, **options))


def run(model: Glm, *, prompt: int = 60, tokens: int = 40, seed: int = 1) -> Tensor:
    """Hidden states of a prompt in two chunks, then tokens one by one, then a few at once."""
    cache = PagedCache(model.config, 4, 64, model.dtype)
    ids = torch.randint(0, 448, (prompt + tokens + 5,), generator=torch.Generator().manual_seed(seed)).tolist()
    cuts = [0, prompt - 7, *range(prompt, prompt + tokens + 1), len(ids)]
    found = []
    with torch.inference_mode():
        for start, stop in itertools.pairwise(cuts):
            inputs = single_sequence(ids[start:stop], start=start, table=range(4))
            found.append(model(inputs, cache).clone())
    return torch.cat(found)


def paging(model: Glm) -> ExpertPager:
    assert model.pager is not None
    return model.pager


@needs_native
@pytest.mark.parametrize("quantize", [None, "int8", "int4", "fp8"])
@pytest.mark.parametrize("fused", [True, False], ids=["one call", "layer by layer"])
def test_equal_to_all_in_memory_bit_for_bit(directory: Path, files: Path, quantize: Any, fused: bool) -> None:
    expected = run(load(directory, quantize=quantize))
    model = load(directory, quantize=quantize, expert_bytes=TINY, expert_dir=files)
    assert model.run_few is not None
    if not fused:
        model.run_few = None
    assert torch.equal(run(model), expected)
    stats = paging(model).stats
    assert stats.reads > 2 * 24, "everything was in memory: nothing was tested"
    paging(model).close()


@needs_native
@pytest.mark.parametrize("scheme", ["int8", "int4", "fp8"])
def test_a_quantised_checkpoint(directory: Path, tmp_path: Path, files: Path, scheme: Any) -> None:
    stored = tmp_path / "stored"
    quantize_checkpoint(directory, stored, scheme)
    model = load(stored, expert_bytes=TINY, expert_dir=files)
    assert torch.equal(run(model), run(load(stored)))
    paging(model).close()


def test_on_the_reference(directory: Path, files: Path) -> None:
    options = {"ops": "reference", "quantize": "int8"}
    model = load(directory, expert_bytes=TINY, expert_dir=files, **options)
    assert torch.equal(run(model, tokens=5), run(load(directory, **options), tokens=5))
    assert paging(model).stats.reads > 0
    paging(model).close()


@needs_native
@pytest.mark.parametrize("wrong", [EarlyPager, ForgetfulPager, SwappedPager])
def test_wrong_pagers_are_noticed(
    directory: Path, files: Path, wrong: type[ExpertPager], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(load(directory))
    monkeypatch.setattr(paged_module, "ExpertPager", wrong)
    model = load(directory, expert_bytes=TINY, expert_dir=files)
    assert not torch.equal(run(model), expected)
    paging(model).close()


@needs_native
def test_a_pager_that_does_not_bring_what_it_was_asked_for_is_an_error(
    directory: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paged_module, "ExpertPager", CarelessPager)
    model = load(directory, expert_bytes=TINY, expert_dir=files)
    with pytest.raises(EngineError, match="was not brought into memory"):
        run(model)
    paging(model).close()


def test_the_file_is_made_once(directory: Path, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    put = weights._put

    def noting(source: Any, target: Any, name: str) -> None:
        read.append(name)
        put(source, target, name)

    monkeypatch.setattr(weights, "_put", noting)
    for expected in (True, False):
        read.clear()
        model = load(directory, quantize="int8", expert_bytes=TINY, expert_dir=files)
        assert any(".mlp.experts." in name for name in read) is expected
        assert any(".shared_experts." in name for name in read)
        paging(model).close()
    assert len(list(files.iterdir())) == 1
    os.utime(directory / "config.json")  # a checkpoint that was changed
    paging(load(directory, quantize="int8", expert_bytes=TINY, expert_dir=files)).close()
    assert len(list(files.iterdir())) == 2


def test_an_interrupted_start_goes_on(directory: Path, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("freehold.model.expert_file._COMMIT", 1)
    loaded: list[int] = []
    put = PagedStack.load

    def stopping(stack: PagedStack, source: Any, index: int = 0, first: int = 0, *, name: str = "weight") -> None:
        if len(loaded) == 100:
            raise KeyboardInterrupt
        loaded.append(index)
        put(stack, source, index, first, name=name)

    monkeypatch.setattr(PagedStack, "load", stopping)
    with pytest.raises(KeyboardInterrupt):
        load(directory, quantize="int8", expert_bytes=TINY, expert_dir=files)
    gc.collect()
    monkeypatch.undo()
    monkeypatch.setattr(PagedStack, "load", lambda *args, **more: (loaded.append(0), put(*args, **more))[1])
    model = load(directory, quantize="int8", expert_bytes=TINY, expert_dir=files)
    assert len(loaded) == 3 * 24 * 6  # each once
    assert torch.equal(run(model, tokens=4), run(load(directory, quantize="int8"), tokens=4))
    paging(model).close()


@needs_native
def test_the_file_lies_in_the_checkpoint_unless_said(directory: Path) -> None:
    model = load(directory, expert_bytes=TINY)
    assert paging(model).file.path.parent == directory / ".freehold"
    assert paging(model).file.path.stat().st_mode & 0o777 == 0o600
    paging(model).close()


@needs_native
def test_a_read_that_fails_is_the_error_of_the_step(directory: Path, files: Path) -> None:
    model = load(directory, expert_bytes=TINY, expert_dir=files)
    os.truncate(paging(model).file.path, 4096 * 8)
    for fused in (True, False):
        model.run_few = model.run_few if fused else None
        with pytest.raises(CheckpointError, match=r"experts-.*: ends within expert"):
            run(model, prompt=8)
    paging(model).close()


def test_damage_is_found_with_verify(directory: Path, files: Path) -> None:
    options = {"quantize": "int8", "expert_bytes": TINY, "expert_dir": files}
    pager = paging(load(directory, **options))
    pager.close()
    with pager.file.path.open("r+b") as file:
        file.seek(4096 * 20 + 11)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    paging(load(directory, **options)).close()
    with pytest.raises(CheckpointError, match="is damaged; delete the file"):
        load(directory, **options, verify=True)


def test_refusals(directory: Path, files: Path) -> None:
    with pytest.raises(InsufficientMemory, match="all 24 experts of a layer"):
        load(directory, quantize="int8", expert_bytes=50_000, expert_dir=files / "not made")
    assert not (files / "not made").exists(), "a refusal takes no room on the disk"
    with pytest.raises(ConfigError, match="--expert-memory needs"):
        load(directory, dtype="float32", expert_bytes=TINY, expert_dir=files)


def test_a_change_of_the_packing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    before = packing_digest()
    assert before == packing_digest()
    pairs = paged_module.PackedWeight._put

    def other(weight: Any, start: int, codes: Tensor, scales: Tensor) -> None:
        pairs(weight, start, codes.flip(0).contiguous(), scales)

    monkeypatch.setattr(paged_module.PackedWeight, "_put", other)
    assert packing_digest() != before
