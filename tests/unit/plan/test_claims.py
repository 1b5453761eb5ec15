"""What docs/how-to/plan-a-deployment.md says of published claims: each figure there is computed here."""

from __future__ import annotations

import pytest

from freehold.model.cache_layout import cache_bytes_per_token, latent_bytes
from freehold.model.inspect import published_config
from freehold.plan.cost import Economics, crossover, gpu_hour
from freehold.plan.footprint import footprint
from freehold.plan.hardware import gpu
from freehold.plan.layouts import refusal, stage_cuts
from freehold.plan.models import load
from freehold.plan.prices import Tokens, api, owning, staff_a_month
from freehold.plan.types import CacheFormat, Figure, Layout
from tests.source_checks import ROOT

TEXT = " ".join((ROOT / "docs" / "how-to" / "plan-a-deployment.md").read_text().split())
MILLION = 1_048_576


def said(*figures: str) -> None:
    for figure in figures:
        assert figure in TEXT, figure


@pytest.mark.parametrize(
    ("own", "staff", "figures"),
    [
        (False, True, {"claude-opus-5.5": "594", "openai gpt-5.5": "441"}),
        (False, False, {"claude-opus-5.5": "450", "openai gpt-5.5": "334"}),
        (True, True, {"claude-opus-5.5": "365", "openai gpt-5.5": "271"}),
        (True, False, {"claude-opus-5.5": "221", "openai gpt-5.5": "164"}),
    ],
)
def test_break_even_of_one_node(own: bool, staff: bool, figures: dict[str, str]) -> None:
    """Within what one node of H200 serves, the break-even volume is its bill over the API's price."""
    hour = gpu_hour(gpu("h200"), "own" if own else "rent", owning()).scaled(8)
    money = Economics(
        hour, Figure.exact(0.7, ""), 0.771, 0, staff_a_month() if staff else 0.0, Tokens(8192, 0, 1024), 8
    )
    for name, millions in figures.items():
        found = crossover(money, api(name)).expected.first
        assert found is not None
        assert f"{found * 1024 / 1e6:.0f}" == millions
        said(f"{millions} million")


def test_cache_of_a_million_tokens() -> None:
    config = published_config("glm-5.2")
    assert 78 * 2 * 512 * 2 == 159_744
    bf16 = cache_bytes_per_token(config, "bf16", "fp8") * MILLION
    packed = cache_bytes_per_token(config, "fp8_ds_mla", "fp8") * MILLION
    assert (f"{bf16 / 1e9:.1f}", f"{packed / 1e9:.1f}") == ("97.1", "56.6")
    assert f"{78 * latent_bytes(config, 'bf16') * MILLION / 1e9:.1f}" == "94.2"
    said("159,744 bytes", "97.1 GB", "56.6 GB", "94.2 GB")


def test_twelve_h100_are_no_layout() -> None:
    model = load("glm-5.2-fp8")
    assert refusal(model, gpu("h100"), Layout(tp=12), "vllm") is not None
    assert footprint(model, gpu("h100"), Layout(tp=8), "vllm").cache_tokens == 0
    cuts = stage_cuts(model, 2)
    assert cuts is not None
    room = footprint(model, gpu("h100"), Layout(tp=8, pp=2, cuts=cuts), "vllm")
    assert 400_000 < room.cache_tokens < MILLION
    said(f"about {round(room.cache_tokens, -4):,} tokens")


def test_eight_h200_hold_half_a_million_tokens_in_fp8() -> None:
    model = load("glm-5.2-fp8")
    plain = footprint(model, gpu("h200"), Layout(tp=8), "vllm")
    assert plain.max_context < MILLION
    said(f"about {round(plain.max_context, -4):,}")
    bf16 = footprint(model, gpu("h200"), Layout(tp=8), "vllm", cache=CacheFormat("bf16"))
    said(f"about {round(bf16.max_context, -4):,}")
    cuts = stage_cuts(model, 4)
    assert cuts is not None
    staged = footprint(model, gpu("h200"), Layout(tp=2, pp=4, cuts=cuts), "vllm")
    assert staged.max_context == MILLION
    for smaller in ("glm-5.2-w4a16", "glm-5.2-nvfp4"):
        assert footprint(load(smaller), gpu("h200"), Layout(tp=8), "vllm").max_context == MILLION
    assert footprint(model, gpu("b200"), Layout(tp=8), "vllm").max_context == MILLION


def test_index_share_is_said_beside_the_claim() -> None:
    said("2.74", "2.81", "2.87", "2.9")
