"""The caches: exactly the bytes that the formulas say, in every format, and what 8-bit keys and latents change."""

from __future__ import annotations

import mmap
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from freehold.engine.loading import EngineOptions, load_model
from freehold.errors import ConfigError
from freehold.model import cache_layout
from freehold.model.cache import IndexCache, LatentCache, PagedCache, cache_bytes_per_token, cache_formats
from freehold.model.config import GlmConfig
from freehold.model.glm import Glm
from freehold.model.index_keys import Fp8Keys
from freehold.model.inputs import single_sequence
from freehold.model.inspect import published_config
from freehold.model.latents import Fp8Latents
from freehold.model.ops.fused import FusedLayers
from freehold.model.ops.interface import Ops
from freehold.model.ops.reference import ReferenceOps
from freehold.model.sizes import size_config
from freehold.model.tiny import make_tiny
from tests.native_cases import ALL_ISAS, generator, native

NANO = GlmConfig.from_dict(size_config("nano"))


@pytest.mark.parametrize("index_cache", ["auto", "fp8"])
@pytest.mark.parametrize("latent_cache", ["auto", "fp8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", ["nano", "small", "medium"])
def test_a_cache_takes_exactly_what_its_layout_says(
    size: str, dtype: torch.dtype, latent_cache: LatentCache, index_cache: IndexCache
) -> None:
    config = GlmConfig.from_dict(size_config(size))
    latent, index = cache_formats(dtype, index_cache, latent_cache)
    assert (latent == "fp8_ds_mla") == (latent_cache == "fp8")
    assert (index == "fp8") == (index_cache == "fp8")
    per_token = cache_layout.cache_bytes_per_token(config, latent, index, mtp=True)
    assert cache_bytes_per_token(config, dtype, index_cache, latent_cache) == per_token
    cache = PagedCache(config, 3, 64, dtype, index_cache=index_cache, latent_cache=latent_cache)
    assert cache.num_bytes == 3 * 64 * per_token


def test_eight_bit_caches_of_the_full_model_take_what_the_specification_says() -> None:
    """A latent 1,152 or 656 bytes, a key 132; 79 latents and 22 keys, the MTP layer's among them."""
    config = published_config("glm-5.2")
    assert cache_bytes_per_token(config, torch.bfloat16, "fp8") == 79 * 1152 + 22 * 132 == 93_912
    assert cache_bytes_per_token(config, torch.bfloat16, "fp8", "fp8") == 79 * 656 + 22 * 132 == 54_728
    without_mtp = replace(config, num_nextn_predict_layers=0)
    assert cache_bytes_per_token(without_mtp, torch.bfloat16, "fp8") == 92_628
    assert cache_bytes_per_token(without_mtp, torch.bfloat16, "fp8", "fp8") == 53_940


def test_there_is_no_cache_of_fp16() -> None:
    with pytest.raises(ConfigError, match="there is no cache of"):
        cache_formats(torch.float16)


def test_a_latent_that_does_not_fit_into_records_is_refused() -> None:
    with pytest.raises(ConfigError, match="this model has 66 and 32"):
        PagedCache(replace(NANO, kv_lora_rank=66), 1, 16, torch.bfloat16, latent_cache="fp8")


def test_a_key_that_one_scale_cannot_cover_is_refused() -> None:
    with pytest.raises(ConfigError, match="index_head_dim <= 128; this model has 192"):
        PagedCache(replace(NANO, index_head_dim=192), 1, 16, torch.bfloat16, index_cache="fp8")


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="huge pages are asked for on Linux")
def test_a_large_cache_commits_pages_only_when_they_are_written() -> None:
    def resident() -> int:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * mmap.PAGESIZE

    before = resident()
    cache = PagedCache(NANO, 8192, 64, torch.bfloat16, index_cache="fp8")
    assert cache.num_bytes > 1 << 29
    latents = cache.latent[3]
    assert isinstance(latents, torch.Tensor)
    latents[-1] = 1.0
    assert resident() - before < 1 << 26


@pytest.fixture(scope="module")
def model() -> Glm:
    torch.manual_seed(0)
    model = Glm(NANO, dtype=torch.bfloat16).requires_grad_(False).eval()
    for name, tensor in model.checkpoint_tensors().items():
        scale = 1.0 if tensor.dim() == 1 or "embed" in name else tensor.shape[-1] ** -0.5
        tensor.normal_(0, scale)
    return model


def run(
    model: Glm, ops: Ops, length: int, index_cache: IndexCache, latent_cache: LatentCache = "auto"
) -> tuple[torch.Tensor, PagedCache]:
    """Hidden states of a prefill in two chunks and three decode steps."""
    tokens = torch.randint(0, 448, (length,), generator=torch.Generator().manual_seed(2)).tolist()
    cache = PagedCache(NANO, 16, 16, torch.bfloat16, index_cache=index_cache, latent_cache=latent_cache)
    cuts = [0, length // 2, length - 3, length - 2, length - 1, length]
    model.ops = ops
    with torch.inference_mode():
        parts = [model(single_sequence(tokens[a:b], start=a, block_size=16), cache) for a, b in pairwise(cuts)]
    return torch.cat(parts).float(), cache


@pytest.mark.parametrize("isa", ALL_ISAS)
def test_within_index_topk_the_format_of_index_keys_changes_nothing(isa: str, model: Glm) -> None:
    for ops in (native(isa), ReferenceOps()):
        eight, cache = run(model, ops, NANO.index_topk, "fp8")
        assert all(isinstance(cache.index[layer], Fp8Keys) for layer in NANO.full_layers)
        assert torch.equal(eight, run(model, ops, NANO.index_topk, "auto")[0])


@pytest.mark.parametrize("isa", ALL_ISAS)
def test_eight_bit_keys_are_near_the_ones_they_stand_for(isa: str, model: Glm) -> None:
    """Layer 0 sees the same input in both formats. A value keeps 3 bits after its first, in a range of 448 · scale."""
    _, plain = run(model, native(isa), 100, "auto")
    _, eight = run(model, native(isa), 100, "fp8")
    exact, keys = plain.index[0], eight.index[0]
    assert isinstance(exact, torch.Tensor)
    assert isinstance(keys, Fp8Keys)
    values, scales = keys.rows(torch.arange(100))
    error = (values * scales[:, None] - exact[:100].float()).abs()
    # Half a unit in the last place of a number, or of the smallest normal one.
    assert bool((error <= torch.maximum(exact[:100].float().abs() / 16, scales[:, None] * 2**-10)).all())
    assert bool((error > 0).any())


@pytest.mark.parametrize("isa", ALL_ISAS)
def test_eight_bit_latents_are_near_the_ones_they_stand_for(isa: str, model: Glm) -> None:
    """Layer 0 sees the same input in both formats: its rope keys are equal, its latents rounded to 4 bits."""
    _, plain = run(model, native(isa), 100, "auto")
    out, eight = run(model, native(isa), 100, "auto", "fp8")
    exact, latents = plain.latent[0], eight.latent[0]
    assert isinstance(exact, torch.Tensor)
    assert isinstance(latents, Fp8Latents)
    read, wanted = latents.rows(torch.arange(100)), exact[:100].float()
    rank = NANO.kv_lora_rank
    assert torch.equal(read[:, rank:], wanted[:, rank:])
    error, scales = (read - wanted)[:, :rank].abs(), latents.scales_SG[:100]
    assert bool((error <= torch.maximum(wanted[:, :rank].abs() / 16, scales * 2**-10)).all())
    assert bool((error > 0).any())
    assert bool(out.isfinite().all())


@pytest.mark.parametrize("isa", ALL_ISAS)
def test_eight_bit_latents_on_kernels_are_those_of_the_reference(isa: str, model: Glm) -> None:
    """Within index_topk, where no selection can differ. Rounding to 4 bits turns small differences into larger ones, so
    outputs are compared as far as bf16 latents let them agree, times a few."""
    agree = {
        stored: [run(model, ops, NANO.index_topk, "auto", stored)[0] for ops in (native(isa), ReferenceOps())]
        for stored in ("auto", "fp8")
    }
    (kernels, reference), (plain, twin) = agree["fp8"], agree["auto"]
    assert not torch.equal(kernels, plain)
    assert (
        float((kernels - reference).norm() / reference.norm()) < 4 * float((plain - twin).norm() / twin.norm()) + 0.02
    )
    assert float((kernels - reference).norm()) < 0.7 * float((reference - twin).norm())


@pytest.mark.parametrize("latent_cache", ["auto", "fp8"])
@pytest.mark.parametrize("isa", ALL_ISAS)
def test_layers_in_one_call_read_eight_bit_caches_as_separate_calls_do(
    isa: str, latent_cache: LatentCache, tmp_path: Path
) -> None:
    """Bit for bit: prefill past index_topk, then steps of one row and of several."""
    make_tiny(tmp_path, "nano")
    ops = native(isa)
    model = load_model(tmp_path, NANO, EngineOptions(ops="native"))
    results = []
    for run_few in (None, FusedLayers(ops, NANO, model.decoder_layers)):
        model.ops, model.run_few = ops, run_few
        cache = PagedCache(NANO, 16, 16, torch.bfloat16, index_cache="fp8", latent_cache=latent_cache)
        tokens = torch.randint(0, 448, (100,), generator=generator(2)).tolist()
        with torch.inference_mode():
            parts = [
                model(single_sequence(tokens[a:b], start=a, block_size=16), cache)
                for a, b in pairwise((0, 60, 61, 62, 70, 86, 87, 100))
            ]
        keys = cache.index[NANO.full_layers[-1]]
        assert isinstance(keys, Fp8Keys)
        latents = cache.latent[-2]
        held = latents.records_SB if isinstance(latents, Fp8Latents) else latents
        assert (held.dtype is torch.uint8) == (latent_cache == "fp8")
        results.append((torch.cat(parts), keys.values_SD[:100], keys.scales_S[:100], held[:100]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
