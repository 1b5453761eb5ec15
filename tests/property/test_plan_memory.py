"""Properties of footprints and searches: more memory never holds less, longer contexts never need less."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from freehold.plan.footprint import fewest_gpus, footprint
from freehold.plan.hardware import gpus
from freehold.plan.layouts import layouts_of, refusal, support
from freehold.plan.models import bundled, load
from freehold.plan.types import ENGINES, CacheFormat

MODELS = st.sampled_from(bundled()).map(load)
GPUS = st.sampled_from(list(gpus().values()))
ENGINE = st.sampled_from(ENGINES)
LATENT = st.sampled_from(["bf16", "fp8_ds_mla", "fp8", "nvfp4_ds_mla"])


@given(MODELS, GPUS, ENGINE, st.sampled_from([1, 2, 4, 8, 16]), st.floats(1.0, 3.0), st.booleans(), st.data())
@settings(max_examples=60, deadline=None)
def test_more_memory_never_fits_less(model, gpu, engine, count, factor, mtp, data) -> None:  # type: ignore[no-untyped-def]
    found = list(layouts_of(model, gpu, count, engine))
    if not found:
        return
    layout = data.draw(st.sampled_from(found))
    cache = CacheFormat(data.draw(LATENT))
    larger = replace(gpu, memory=int(gpu.memory * factor))
    one = footprint(model, gpu, layout, engine, cache=cache, mtp=mtp)
    two = footprint(model, larger, layout, engine, cache=cache, mtp=mtp)
    assert two.cache_tokens >= one.cache_tokens
    assert two.max_context >= one.max_context
    assert two.max_sequences(4096) >= one.max_sequences(4096)
    assert two.fits or not one.fits


@given(MODELS, GPUS, st.integers(1, 300_000), st.integers(1, 300_000))
@settings(max_examples=15, deadline=None)
def test_a_longer_context_never_needs_fewer_gpus(model, gpu, short, long) -> None:  # type: ignore[no-untyped-def]
    short, long = sorted((short, long))
    fewest = [fewest_gpus(model, gpu, "vllm", context=context) for context in (short, long)]
    assert fewest[1] is None or fewest[0] is not None
    assert fewest[1] is None or fewest[0] <= fewest[1]


@given(MODELS, GPUS, ENGINE, st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 72]))
@settings(max_examples=60, deadline=None)
def test_every_layout_is_allowed_and_has_exactly_these_gpus(model, gpu, engine, count) -> None:  # type: ignore[no-untyped-def]
    for layout in layouts_of(model, gpu, count, engine):
        assert layout.gpus == count
        assert layout.tp <= gpu.domain
        assert refusal(model, gpu, layout, engine) is None
        assert all(model.config.indexer_types[cut] == "full" for cut in layout.cuts)


@given(MODELS, GPUS, ENGINE, LATENT)
@settings(max_examples=40, deadline=None)
def test_fewer_bits_a_token_hold_more_of_them(model, gpu, engine, latent) -> None:  # type: ignore[no-untyped-def]
    for layout in layouts_of(model, gpu, gpu.node, engine):
        whole = footprint(model, gpu, layout, engine, cache=CacheFormat("bf16", "bf16"))
        small = footprint(model, gpu, layout, engine, cache=CacheFormat(latent))
        assert small.cache_tokens >= whole.cache_tokens
        every = footprint(model, gpu, layout, engine, cache=CacheFormat(latent, all_layers=True))
        assert every.cache_tokens <= small.cache_tokens


@given(MODELS, GPUS, ENGINE)
def test_support_is_the_same_whoever_asks(model, gpu, engine) -> None:  # type: ignore[no-untyped-def]
    renamed = replace(gpu, name="a name of one's own", key="own")
    assert support(engine, renamed, model) == support(engine, gpu, model)
