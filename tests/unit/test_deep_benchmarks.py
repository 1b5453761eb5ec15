"""The checks inside the benchmarks of long contexts: that they hold where they should, and fail where they should."""

from __future__ import annotations

import json
from pathlib import Path

import _index_share_plot
import pytest
import torch
from index_share import SHORT, closed_form, share_config, step_bytes
from million_tokens import TOLERANCE, TOPK, Sample, million_config, worst_exchange

from freehold.model.cache import PagedCache
from freehold.model.config import GlmConfig
from freehold.model.index_keys import Fp8Keys
from freehold.model.inputs import Span
from freehold.model.ops.reference import ReferenceOps

# (context, FLOPs of GLM-5.2 with 78 indexers over those with 21), to two places.
PUBLISHED = [(8_192, 1.05), (131_072, 1.50), (262_144, 1.84), (524_288, 2.28), (1_048_576, 2.74)]


@pytest.mark.parametrize(("context", "ratio"), PUBLISHED)
def test_the_closed_form_gives_the_known_ratios(context: int, ratio: float) -> None:
    assert closed_form((context,))[context] == pytest.approx(ratio, abs=0.005)


def test_a_longer_context_adds_the_index_keys_of_full_layers_only() -> None:
    for freq, full in ((1, 18), (4, 6)):
        config = GlmConfig.from_dict(share_config(freq))
        assert len(config.full_layers) == full
        added = step_bytes(config, 1 << 20) - step_bytes(config, SHORT)
        assert added == 2 * full * ((1 << 20) - SHORT) * 64


@pytest.fixture
def sample_and_cache() -> tuple[Sample, PagedCache]:
    config = GlmConfig.from_dict(million_config())
    assert config.full_layers == (0, 4)
    g = torch.Generator().manual_seed(0)
    cache = PagedCache(config, 40, 64, torch.bfloat16, index_cache="fp8")
    keys = cache.index[4]
    assert isinstance(keys, Fp8Keys)
    keys.write(torch.arange(2560), torch.randn(2560, config.index_head_dim, generator=g))
    query = torch.randn(1, config.index_n_heads, config.index_head_dim, generator=g)
    weight, table = torch.rand(1, config.index_n_heads, generator=g), torch.randperm(40, generator=g)
    slots = ReferenceOps().select(query, weight, keys, (Span(0, 1, 2500, table),), 64, TOPK)[0]
    return Sample(4, 2500, query, weight, slots, table), cache


def test_the_right_choice_passes(sample_and_cache: tuple[Sample, PagedCache]) -> None:
    assert worst_exchange(*sample_and_cache, TOPK) == (0, 0.0)


def test_a_wrong_or_missing_choice_is_seen(sample_and_cache: tuple[Sample, PagedCache]) -> None:
    sample, cache = sample_and_cache
    span = Span(0, 1, 2500, sample.table_B)
    others = sorted(set(span.slots_P(64).tolist()) - set(sample.slots_K.tolist()))
    right = int(sample.slots_K[7])
    sample.slots_K[7] = others[len(others) // 2]
    exchanged, distance = worst_exchange(sample, cache, TOPK)
    assert exchanged == 2
    assert distance > TOLERANCE
    sample.slots_K[7] = -1
    assert worst_exchange(sample, cache, TOPK) == (1, float("inf"))
    sample.slots_K[7] = right
    assert worst_exchange(sample, cache, TOPK) == (0, 0.0)


def test_growth_of_other_engines_is_relative_to_their_shortest_context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = {
        "small bf16 decode@16384": {"llamacpp_s": [0.5, 0.6, 0.7]},
        "small bf16 decode@4096": {"llamacpp_s": [0.3]},
        "small int8 decode@4096": {"llamacpp_s": [9.0]},
        "small bf16 transformers@4096": {"decode_s": [1.0]},
        "small bf16 ceilings": {},
    }
    (tmp_path / "engine_vs_llamacpp-2026-01-01.json").write_text(json.dumps({"samples": samples}))
    monkeypatch.setattr(_index_share_plot, "RESULTS", tmp_path)
    assert _index_share_plot.peers_growth() == {"llama.cpp": {4096: 1.0, 16384: 2.0}}
