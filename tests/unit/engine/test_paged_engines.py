"""Engines whose experts are paged: the same tokens in any batch, what they count, and how little memory they take."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from freehold.engine import loading
from freehold.engine.draft_policy import FixedDrafts
from freehold.engine.engine import Engine
from freehold.engine.loading import EngineOptions, build_engine
from freehold.engine.request import Request
from freehold.model.sizes import size_config
from freehold.model.tiny import make_tiny, write_random_checkpoint
from freehold.types import SamplingParams
from tests.drafting import drafter_of, greedy, run, tokens, write_draftable
from tests.native_cases import needs_native
from tests.source_checks import ROOT

OPTIONS = EngineOptions(cache_bytes=1 << 20, threads=2, max_num_batched_tokens=64, quantize="int8")


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "nano"
    make_tiny(path, "nano", seed=6)
    return path


def tokens_of(engine: Engine, count: int) -> list[list[int]]:
    """What prompts of 1 to 150 tokens are answered with, sent a few steps apart; greedy and sampled by turns."""
    g = torch.Generator().manual_seed(8)
    found: dict[str, list[int]] = {str(i): [] for i in range(count)}
    waiting = [tuple(torch.randint(0, 448, (1 + 37 * i % 150,), generator=g).tolist()) for i in range(count)]
    while engine.has_work or waiting:
        for _ in range(2):
            if waiting:
                i = count - len(waiting)
                params = SamplingParams(max_tokens=20, temperature=float(i % 2), seed=i, ignore_eos=True)
                engine.add(Request(str(i), waiting.pop(0), params))
        for chunk in engine.step():
            assert chunk.error is None
            found[chunk.request_id] += chunk.token_ids
        engine.check_integrity()
    return list(found.values())


@needs_native
def test_the_same_tokens_with_batches_chunks_and_preemption(nano: Path, tmp_path: Path) -> None:
    whole, _ = build_engine(nano, OPTIONS)
    expected = tokens_of(whole, 12)
    paged, _ = build_engine(nano, replace(OPTIONS, expert_bytes=500_000, expert_dir=tmp_path))
    assert tokens_of(paged, 12) == expected
    assert whole.stats().preemptions == paged.stats().preemptions
    assert whole.stats().paging is None
    paging = paged.stats().paging
    assert paging is not None
    assert paging.reads > 100
    assert paging.wait_seconds > 0
    paged.close()


@needs_native
@pytest.mark.parametrize("caches", ["auto", "fp8"])
def test_drafts_of_paged_experts_change_no_token(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, caches: Literal["auto", "fp8"]
) -> None:
    """The MTP layer's experts are the last in the file, after a dense layer that is not in it; a prompt needs all."""
    write_draftable(tmp_path)
    prompts = [[(7 * i + 3 * n) % 400 for i in range(10 + 12 * n)] for n in range(4)]
    found: list[list[tuple[int, ...]]] = []
    for drafts, memory in ((0, None), (3, 500_000)):
        options = replace(
            OPTIONS, expert_bytes=memory, num_draft_tokens=drafts, latent_cache=caches, index_cache=caches,
            max_num_seqs=4, max_num_batched_tokens=16,
        )  # fmt: skip
        engine, _ = build_engine(tmp_path, options)
        if drafts:
            drafter_of(engine).policy = FixedDrafts(drafts)
        chunks = run(engine, [greedy(f"r{i}", prompt, 40) for i, prompt in enumerate(prompts)])
        found.append([tokens(each) for each in chunks.values()])
        stats = engine.stats()
        assert (stats.draft_accepted > 15) == (drafts > 0)
        assert stats.paging is None or stats.paging.reads > 100
        engine.close()
    assert found[0] == found[1]


@needs_native
def test_a_disk_that_fails_ends_the_requests_with_its_error(nano: Path, tmp_path: Path) -> None:
    engine, _ = build_engine(nano, replace(OPTIONS, expert_bytes=500_000, expert_dir=tmp_path))
    os.truncate(next(tmp_path.iterdir()), 1 << 16)
    engine.add(Request("a", (1, 2, 3), SamplingParams(max_tokens=3)))
    (chunk,) = engine.step()
    assert chunk.error is engine.failure
    assert engine.failure is not None
    assert "ends within expert" in engine.failure.message
    engine.close()


def test_memory_that_experts_will_take_is_not_given_to_the_cache(
    nano: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "available_memory", lambda: 40_000_000)
    sizes = []
    for memory in (None, 1_000_000):
        options = replace(OPTIONS, cache_bytes=None, expert_bytes=memory, expert_dir=tmp_path, max_model_len=1 << 20)
        engine, _ = build_engine(nano, options)
        sizes.append(engine.config.cache_bytes)
        engine.close()
    assert sizes[0] - sizes[1] == pytest.approx(500_000, abs=100_000)


_SCRIPT = """
import sys
from pathlib import Path
from freehold.engine.loading import EngineOptions, load_model
from freehold.model.config import GlmConfig
from tests.private_memory import Peak
directory, memory = Path(sys.argv[1]), int(sys.argv[2])
config = GlmConfig.from_file(directory)
options = EngineOptions(threads=1, expert_bytes=memory or None)
with Peak() as peak:
    model = load_model(directory, config, options)
print(peak.bytes)
"""


@needs_native
@pytest.mark.parametrize("start", ["first", "second", "all in memory"])
def test_loading_takes_the_memory_of_what_is_held(tmp_path_factory: pytest.TempPathFactory, start: str) -> None:
    """Experts of 57 MB in a model of 65 MB: paged, neither a first start nor a second has them in memory."""
    directory = tmp_path_factory.getbasetemp() / "memory"
    if not directory.exists():
        config = size_config("nano") | {"hidden_size": 256, "moe_intermediate_size": 128, "n_routed_experts": 48}
        write_random_checkpoint(config, directory)
    memory = "0" if start == "all in memory" else "10000000"
    run = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(directory), memory],
        capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"},
    )  # fmt: skip
    taken = int(run.stdout)
    if start == "all in memory":
        assert taken > 57e6
    else:
        assert taken < 25e6
