"""Comparing two checkpoints' predictions: the figures by another way, what they must show, and what is refused."""

from __future__ import annotations

import gc
import math
import random
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from freehold.engine import compare as module
from freehold.engine.compare import CACHES, CacheComparison, Comparison, compare_caches, compare_checkpoints
from freehold.engine.loading import EngineOptions, load_model
from freehold.errors import ConfigError, DiskFull, EngineError, InvalidRequest
from freehold.model.cache import PagedCache
from freehold.model.config import GlmConfig
from freehold.model.glm import Glm
from freehold.model.inputs import single_sequence
from freehold.model.latents import Fp8Latents
from freehold.model.quantize import Scheme, quantize_checkpoint
from freehold.model.sizes import size_config
from freehold.model.tiny import make_tiny, write_random_checkpoint
from freehold.model.tokenizer import Tokenizer

generator = random.Random(1)
TEXT = "".join(generator.choice("abcdefghij klmnop, qrstuvwxyz.\n") for _ in range(400))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fp32, so that nothing but the weights differs; and what is made of it."""
    base = tmp_path_factory.mktemp("made")
    write_random_checkpoint(size_config("nano"), base / "fp32", 7, dtype="float32")
    schemes: tuple[Scheme, ...] = ("int8", "int4")
    for scheme in schemes:
        quantize_checkpoint(base / "fp32", base / scheme, scheme)
    return base


@pytest.fixture(scope="module")
def found(made: Path) -> dict[str, Comparison]:
    return {scheme: compare_checkpoints(made / "fp32", made / scheme, TEXT) for scheme in ("int8", "int4")}


def test_a_checkpoint_does_not_differ_from_itself(made: Path) -> None:
    seen: list[tuple[int, int]] = []
    same = compare_checkpoints(made / "int8", made / "int8", TEXT, progress=lambda *done: seen.append(done))
    assert same.total.kl_mean == same.total.kl_p99 == same.total.perplexity_change == 0
    assert same.total.top1 == 1
    assert seen == sorted(seen)
    assert seen[-1] == (2 * same.tokens, 2 * same.tokens)


def test_int4_differs_more_than_int8(found: dict[str, Comparison]) -> None:
    int8, int4 = found["int8"].total, found["int4"].total
    assert 0 < int8.kl_mean < int4.kl_mean < 0.2
    assert 0 < int8.kl_median < 0.5 * int4.kl_median
    assert int8.kl_median < 0.005
    assert int8.top1 > int4.top1 > 0.5
    assert int8.top1 > 0.8


def test_positions_are_counted_by_how_sparse_attention_is(found: dict[str, Comparison]) -> None:
    report = found["int8"]
    assert report.index_topk == 16
    assert [(bucket.start, bucket.stop) for bucket in report.buckets] == [(0, 16), (16, 32), (32, None)]
    full, rest = divmod(report.tokens, 64)
    assert report.windows == full + 1
    assert rest > 33  # so that the last window reaches every bucket
    assert [bucket.positions for bucket in report.buckets] == [16 * (full + 1), 16 * (full + 1), 31 * full + rest - 33]
    assert report.total.positions == report.tokens - report.windows
    means = [bucket.kl_mean * bucket.positions for bucket in report.buckets]
    assert sum(means) == pytest.approx(report.total.kl_mean * report.total.positions)


def test_the_figures_by_another_way(made: Path, found: dict[str, Comparison]) -> None:
    """Each window in one pass, all logits at once, float64."""
    tokens = Tokenizer.from_dir(made / "fp32").encode(TEXT, special=False)
    kl, same, losses = [], [], [[], []]
    models = [load_model(made / name, GlmConfig.from_file(made / name), EngineOptions()) for name in ("fp32", "int4")]
    for start in range(0, len(tokens), 64):
        window = tokens[start : start + 64]
        with torch.inference_mode():
            p, q = (
                model.logits(model(single_sequence(window), PagedCache(model.config, 1, 64, model.dtype)))[:-1]
                .double()
                .log_softmax(-1)
                for model in models
            )
        kl.append((p.exp() * (p - q)).sum(-1))
        same.append(p.argmax(-1) == q.argmax(-1))
        for loss, logprobs in zip(losses, (p, q), strict=True):
            loss.append(torch.nn.functional.nll_loss(logprobs, torch.tensor(window[1:]), reduction="none"))
    total = found["int4"].total
    assert total.kl_mean == pytest.approx(float(torch.cat(kl).mean()), rel=1e-3)
    assert total.kl_p99 == pytest.approx(float(torch.cat(kl).quantile(0.99)), rel=1e-2)
    assert total.top1 == pytest.approx(float(torch.cat(same).double().mean()))
    assert total.perplexity == pytest.approx(math.exp(float(torch.cat(losses[0]).mean())), rel=1e-4)
    assert total.perplexity_other == pytest.approx(math.exp(float(torch.cat(losses[1]).mean())), rel=1e-4)


@pytest.fixture(scope="module")
def caches(made: Path) -> tuple[CacheComparison, ...]:
    return compare_caches(made / "fp32", TEXT)


def test_8_bit_index_keys_change_only_what_is_selected(caches: tuple[CacheComparison, ...]) -> None:
    """Within index_topk everything is attended to, whatever the scores: what differs there is the rounding of sums,
    where other tokens of a chunk chose other experts."""
    keys = caches[0]
    assert (keys.latent, keys.index) == ("fp32", "fp8")
    within, *beyond = keys.comparison.buckets
    assert within.kl_p99 < 1e-6
    assert within.top1 == 1
    assert all(bucket.kl_mean > 1e-4 for bucket in beyond)


def test_8_bit_latents_change_every_position_a_little(caches: tuple[CacheComparison, ...]) -> None:
    _, latents, both = caches
    assert [(each.latent, each.index) for each in (latents, both)] == [("fp8_ds_mla", "fp32"), ("fp8_ds_mla", "fp8")]
    for bucket in latents.comparison.buckets:
        assert 0 < bucket.kl_mean < 0.05
        assert bucket.top1 > 0.7
    assert both.bytes_per_token < latents.bytes_per_token < latents.bytes_as_computed


def test_latents_that_are_read_wrongly_are_seen(
    made: Path, caches: tuple[CacheComparison, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Fp8Latents.rows

    def with_the_scale_of_the_slot_before(self: Fp8Latents, slots: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        rows, before = read(self, slots, dtype), self.scales_SG[(slots - 1).clamp(min=0)]
        factor = (before / self.scales_SG[slots]).repeat_interleave(self.rank, dim=-1)
        return torch.cat((rows[..., : self.rank] * factor, rows[..., self.rank :]), dim=-1)

    monkeypatch.setattr(Fp8Latents, "rows", with_the_scale_of_the_slot_before)
    wrong = compare_caches(made / "fp32", TEXT)[1].comparison.total
    right = caches[1].comparison.total
    assert wrong.kl_mean > 3 * right.kl_mean
    assert wrong.top1 < right.top1


def test_the_figures_of_caches_by_another_way(made: Path, caches: tuple[CacheComparison, ...]) -> None:
    """Each window in one pass, all logits at once, float64."""
    tokens = Tokenizer.from_dir(made / "fp32").encode(TEXT, special=False)
    config = GlmConfig.from_file(made / "fp32")
    model = load_model(made / "fp32", config, EngineOptions())
    for (latent_cache, index_cache), found in zip(CACHES, caches, strict=True):
        kl = []
        for start in range(0, len(tokens), 64):
            inputs = single_sequence(tokens[start : start + 64])
            with torch.inference_mode():
                plain = PagedCache(config, 1, 64, model.dtype)
                eight = PagedCache(config, 1, 64, model.dtype, index_cache=index_cache, latent_cache=latent_cache)
                p, q = (model.logits(model(inputs, cache))[:-1].double().log_softmax(-1) for cache in (plain, eight))
            kl.append((p.exp() * (p - q)).sum(-1))
        assert found.comparison.total.kl_mean == pytest.approx(float(torch.cat(kl).mean()), rel=1e-3)


def test_chunks_and_dtypes_may_differ(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: dict[str, Comparison]
) -> None:
    monkeypatch.setattr(module, "_CHUNK", 24)
    monkeypatch.setattr(module, "_ROWS", 7)
    again = compare_checkpoints(made / "fp32", made / "int8", TEXT)
    assert again.total.kl_mean == pytest.approx(found["int8"].total.kl_mean, rel=1e-3)
    make_tiny(tmp_path / "bf16", "nano", seed=7)  # the same values, rounded
    rounded = compare_checkpoints(made / "fp32", tmp_path / "bf16", TEXT)
    assert 0 < rounded.total.kl_median < 0.01


def test_one_model_is_in_memory_at_a_time(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models: list[weakref.ref[Glm]] = []

    def watched(*args: Any, **options: Any) -> Glm:
        assert all(model() is None for model in models)
        model = load_model(*args, **options)
        models.append(weakref.ref(model))
        return model

    gc.disable()  # so that nothing but the code under test collects
    try:
        monkeypatch.setattr(module, "load_model", watched)
        compare_checkpoints(made / "fp32", made / "int8", TEXT)
    finally:
        gc.enable()
    assert len(models) == 2


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_what_cannot_be_compared(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequest, match="the text has 2 tokens"):
        compare_checkpoints(made / "fp32", made / "int8", "abc")
    write_random_checkpoint(size_config("nano") | {"vocab_size": 600}, tmp_path / "other", 7)
    with pytest.raises(ConfigError, match="its tokenizer is not that of"):
        compare_checkpoints(made / "fp32", tmp_path / "other", TEXT)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 40, 1 << 40, 1000))
    with pytest.raises(DiskFull, match=r"the logits take \d{3},\d{3} bytes, but 1,000 are free; set TMPDIR"):
        compare_checkpoints(made / "fp32", made / "int8", TEXT)


def test_broken_logits_are_not_averaged(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> Glm:
        model = load_model(*args, **options)
        model.lm_head.weight.data[3] = math.nan
        return model

    monkeypatch.setattr(module, "load_model", broken)
    with pytest.raises(EngineError, match="logits at position 0 or after are NaN or infinite"):
        compare_checkpoints(made / "fp32", made / "int8", TEXT)


def test_nothing_stays_on_disk(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    compare_checkpoints(made / "fp32", made / "int8", TEXT)
    assert not list(tmp_path.iterdir())
