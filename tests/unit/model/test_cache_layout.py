"""Cache bytes per token, against the published layouts of GLM-5.2."""

from __future__ import annotations

import pytest

from freehold.model.cache_layout import (
    IndexFormat,
    LatentFormat,
    cache_bytes_per_token,
    index_key_bytes,
    latent_bytes,
)
from freehold.model.inspect import published_config

GLM52 = published_config("glm-5.2")


@pytest.mark.parametrize(
    ("format", "nbytes"), [("fp32", 2304), ("bf16", 1152), ("fp8_ds_mla", 656), ("fp8", 576), ("nvfp4_ds_mla", 352)]
)
def test_latent(format: LatentFormat, nbytes: int) -> None:
    assert latent_bytes(GLM52, format) == nbytes


@pytest.mark.parametrize(("format", "nbytes"), [("fp32", 512), ("bf16", 256), ("fp8", 132)])
def test_index_key(format: IndexFormat, nbytes: int) -> None:
    assert index_key_bytes(GLM52, format) == nbytes


@pytest.mark.parametrize(
    ("latent", "without", "with_mtp", "full_context"),
    [
        ("bf16", 92_628, 93_912, 97_127_497_728),
        ("fp8_ds_mla", 53_940, 54_728, 56_560_189_440),
        ("fp8", 47_700, 48_408, 50_017_075_200),
        ("nvfp4_ds_mla", 30_228, 30_712, 31_696_355_328),
    ],
)
def test_totals_with_fp8_index_keys(latent: LatentFormat, without: int, with_mtp: int, full_context: int) -> None:
    assert cache_bytes_per_token(GLM52, latent, "fp8") == without
    assert cache_bytes_per_token(GLM52, latent, "fp8", mtp=True) == with_mtp
    assert without * GLM52.max_position_embeddings == full_context


def test_without_index_share_every_layer_has_keys() -> None:
    assert cache_bytes_per_token(published_config("glm-5.1"), "bf16", "fp8") == 100_152
