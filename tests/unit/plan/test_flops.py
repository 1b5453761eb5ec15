"""FLOP a token: the closed form of the architecture, and what IndexShare saves."""

from __future__ import annotations

import pytest

from freehold.model.inspect import published_config
from freehold.plan.flops import flops_per_token, index_share


def closed_form(context: int, indexers: int, attended: int) -> float:
    """GLM-5.2's, term by term: matrices of 78 attentions, 75 sparse and 3 dense MLPs, head, and `indexers` indexers."""
    linear = 78 * 165_019_648 + 75 * 341_311_488 + 3 * 226_492_416 + 951_582_720 + indexers * 9_371_648
    seen = min(context, 2048)
    return 2 * linear + 78 * 2 * 64 * seen * attended + indexers * context * (2 * 32 * 128 + 2 * 32)


@pytest.mark.parametrize("context", [1, 2048, 8_192, 32_768, 131_072, 262_144, 524_288, 1_000_000, 1_048_576])
@pytest.mark.parametrize(("absorbed", "attended"), [(True, 1088), (False, 512)])
def test_the_closed_form(context: int, absorbed: bool, attended: int) -> None:
    config = published_config("glm-5.2")
    for shared, indexers in ((True, 21), (False, 78)):
        ours = flops_per_token(config, context, shared=shared, absorbed=absorbed)
        assert ours == closed_form(context, indexers, attended)


def test_index_share_at_a_million_tokens() -> None:
    config = published_config("glm-5.2")
    assert index_share(config, 1_048_576) == pytest.approx(2.74, abs=0.005)
    assert index_share(config, 1_048_576, absorbed=False) == pytest.approx(2.81, abs=0.005)
    assert index_share(config, 8_192) == pytest.approx(1.05, abs=0.005)


def test_a_model_without_it_saves_nothing() -> None:
    assert index_share(published_config("glm-5.1"), 1_048_576) == 1
