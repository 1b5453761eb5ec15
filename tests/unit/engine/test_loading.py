"""From a checkpoint directory to an engine: sizes, refusals, and tokens out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from freehold.engine.loading import EngineOptions, available_memory, build_engine, load_model
from freehold.engine.request import Request
from freehold.engine.runner import ModelRunner
from freehold.errors import CheckpointError, ConfigError, InsufficientMemory, InvalidRequest
from freehold.model.cache import PagedCache, cache_bytes_per_token
from freehold.model.config import GlmConfig
from freehold.model.ops.choose import OpsChoice
from freehold.model.sizes import size_config
from freehold.model.tiny import make_tiny, write_random_checkpoint
from freehold.types import FinishReason, SamplingParams
from tests.native_cases import needs_native


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "nano"
    make_tiny(directory, "nano")
    return directory


def test_an_engine_generates_and_reports_progress(nano: Path) -> None:
    seen: list[tuple[int, int]] = []
    engine, tokenizer = build_engine(nano, EngineOptions(cache_bytes=1 << 22), lambda *p: seen.append(p))
    params = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True, logprobs=2, prompt_logprobs=1)
    engine.add(Request("a", tuple(tokenizer.encode("hello there")), params))
    chunks = []
    while engine.has_work:
        chunks += engine.step()
    engine.close()
    assert [len(chunk.token_ids) for chunk in chunks] == [1] * 5
    assert chunks[-1].finish_reason is FinishReason.LENGTH
    assert chunks[0].prompt_logprobs is not None
    assert len(chunks[0].prompt_logprobs) == len(tokenizer.encode("hello there"))
    assert all(chunk.logprobs is not None and len(chunk.logprobs[0].top) == 2 for chunk in chunks)
    assert seen[-1][0] == seen[-1][1] > 0
    assert engine.config.model_name == "nano"


def test_prompt_logprobs_are_teacher_forced_scores_at_any_chunk_size(nano: Path) -> None:
    prompt = tuple(torch.randint(0, 448, (90,), generator=torch.Generator().manual_seed(0)).tolist())
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    found = []
    for budget in (16, 2048):
        options = EngineOptions(cache_bytes=1 << 22, max_num_batched_tokens=budget, max_num_seqs=4, dtype="float32")
        engine, _ = build_engine(nano, options)
        engine.add(Request("a", prompt, params))
        scores = next(chunk.prompt_logprobs for _ in range(20) for chunk in engine.step())
        assert scores is not None
        assert scores[0] is None
        assert [score.token_id for score in scores[1:] if score] == list(prompt[1:])
        found.append([score.logprob for score in scores[1:] if score])
    assert found[0] == pytest.approx(found[1], abs=1e-4)


def test_cache_bytes_are_the_formula(nano: Path) -> None:
    config = GlmConfig.from_file(nano)
    cache = PagedCache(config, 3, 64, torch.bfloat16)
    assert cache.num_bytes == 3 * 64 * cache_bytes_per_token(config, torch.bfloat16)
    engine, _ = build_engine(nano, EngineOptions(cache_bytes=1 << 22))
    assert engine.config.num_blocks == (1 << 22) // (64 * cache_bytes_per_token(config, torch.bfloat16))


def test_what_cannot_be_is_refused_in_one_line(nano: Path, tmp_path: Path) -> None:
    with pytest.raises(InsufficientMemory, match=r"1,000 bytes.*--cache-bytes"):
        build_engine(nano, EngineOptions(cache_bytes=1000))
    with pytest.raises(InsufficientMemory, match=r"would take [\d,]+ bytes, and [\d,]+ are available"):
        build_engine(nano, EngineOptions(cache_bytes=1 << 46))
    with pytest.raises(InvalidRequest, match="1048576 positions"):
        build_engine(nano, EngineOptions(max_model_len=1 << 21))
    with pytest.raises(ConfigError, match=r"no such file"):
        build_engine(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(size_config("nano")))
    with pytest.raises((CheckpointError, ConfigError)):
        build_engine(tmp_path)


def test_a_request_that_can_never_fit_is_refused_with_bytes(nano: Path) -> None:
    engine, _ = build_engine(nano, EngineOptions(cache_bytes=1 << 22))
    with pytest.raises(InsufficientMemory, match=r"need [\d,]+ bytes of cache, but the whole cache has [\d,]+ bytes"):
        engine.check(900_000, SamplingParams(max_tokens=10))


@pytest.mark.parametrize("ops", ["reference", pytest.param("native", marks=needs_native)])
def test_fp32_weights_are_never_rounded(tmp_path: Path, ops: OpsChoice) -> None:
    """Packed weights are bf16 or less, so an fp32 model has none unless it is to be quantised."""
    write_random_checkpoint(size_config("nano"), tmp_path, dtype="float32")
    model = load_model(tmp_path, GlmConfig.from_file(tmp_path), EngineOptions(ops=ops))
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    for name, tensor in model.checkpoint_tensors().items():
        assert isinstance(tensor, torch.Tensor)
        assert torch.equal(tensor, stored[name]), name
    assert model.run_few is None


def test_available_memory_is_below_the_machines() -> None:
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 0 < available_memory() <= total


@needs_native
def test_how_many_tokens_are_drafted(nano: Path, tmp_path: Path) -> None:
    def drafts(directory: Path, **options: Any) -> tuple[int, bool]:
        engine, _ = build_engine(directory, EngineOptions(cache_bytes=1 << 22, **options))
        assert isinstance(engine.runner, ModelRunner)
        return engine.config.num_draft_tokens, engine.runner.drafter is not None

    assert drafts(nano) == (3, True)
    assert drafts(nano, dtype="float32") == (3, True)
    assert drafts(nano, ops="reference") == (0, False), "torch's bf16 products of several rows are not those of one"
    assert drafts(nano, ops="reference", num_draft_tokens=2) == (2, True)
    assert drafts(nano, num_draft_tokens=0) == (0, False)
    assert drafts(nano, num_draft_tokens=7) == (7, True)
    assert drafts(nano, max_num_batched_tokens=2, max_num_seqs=1) == (1, True)
    with pytest.raises(InvalidRequest, match="0 to 15"):
        drafts(nano, num_draft_tokens=16)
    write_random_checkpoint(size_config("nano") | {"num_nextn_predict_layers": 0}, tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((nano / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_bytes((nano / "tokenizer_config.json").read_bytes())
    assert drafts(tmp_path) == (0, False)
    with pytest.raises(InvalidRequest, match="no MTP layer"):
        drafts(tmp_path, num_draft_tokens=1)
