"""The model as a whole: published names and shapes at full size, gradients, and that attention is sparse."""

from __future__ import annotations

import torch

from freehold.model.cache import PagedCache, cache_bytes_per_token
from freehold.model.config import GlmConfig
from freehold.model.glm import Glm
from freehold.model.inputs import single_sequence
from freehold.model.inspect import published_config
from freehold.model.names import tensor_specs
from freehold.model.ops.reference import ReferenceOps
from freehold.model.sizes import size_config


def published() -> GlmConfig:
    """GLM-5.2 (zai-org/GLM-5.2, config.json)."""
    return published_config("glm-5.2")


def test_the_full_model_on_meta_has_the_published_tensors() -> None:
    config = published()
    tensors = Glm(config, device="meta").checkpoint_tensors()
    assert len(tensors) == 59_585
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        spec.name: spec.shape for spec in tensor_specs(config)
    }
    bias = [tensor for name, tensor in tensors.items() if name.endswith("e_score_correction_bias")]
    assert all(tensor.dtype == torch.float32 for tensor in bias)
    assert sum(tensor.numel() for tensor in bias) == 19_456
    assert sum(tensor.numel() for tensor in tensors.values()) - 19_456 == 753_329_921_024


def test_cache_bytes_of_the_full_model() -> None:
    # bf16 latents on 79 layers and bf16 index keys on 22: 79 * 1152 + 22 * 256.
    assert cache_bytes_per_token(published(), torch.bfloat16) == 96_640


def nano(dtype: torch.dtype = torch.float32) -> Glm:
    torch.manual_seed(0)
    model = Glm(GlmConfig.from_dict(size_config("nano")), dtype=dtype)
    with torch.no_grad():
        for name, tensor in model.checkpoint_tensors().items():
            scale = 1.0 if tensor.dim() == 1 or "embed" in name else tensor.shape[-1] ** -0.5
            tensor.normal_(0, scale)
    return model


def test_gradients_reach_every_parameter_the_output_depends_on() -> None:
    model = nano()
    cache = PagedCache(model.config, 2, 64, torch.float32)
    model.logits(model(single_sequence(list(range(60))), cache)).square().mean().backward()
    silent = {
        name.split(".", 2)[-1]
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.grad is None and not name.startswith("mtp.")
    }
    # A selection has no gradient: the indexer is trained on its own loss.
    assert all(name.startswith("self_attn.indexer.") for name in silent), silent


def test_attention_reads_at_most_topk_latents_a_query() -> None:
    model = nano()
    seen: list[int] = []

    class Watching(ReferenceOps):
        def sparse_attention(self, query_RNL, latent_SL, slots_RK, rank, scale):  # type: ignore[no-untyped-def]
            seen.append(slots_RK.shape[1])
            return super().sparse_attention(query_RNL, latent_SL, slots_RK, rank, scale)

        def dense_attention(self, query_TNC, latent_SL, kv_b_OV, span, block_size, nope, scale):  # type: ignore[no-untyped-def]
            seen.append(span.end)
            return super().dense_attention(query_TNC, latent_SL, kv_b_OV, span, block_size, nope, scale)

    model.ops = Watching()
    with torch.inference_mode():
        model(single_sequence([1] * 200), PagedCache(model.config, 4, 64, torch.float32))
    assert seen
    assert max(seen) <= model.config.index_topk


def test_rows_do_not_depend_on_what_else_is_in_the_batch_or_in_other_blocks() -> None:
    model = nano()
    prompt = list(range(100))
    with torch.inference_mode():
        cache = PagedCache(model.config, 4, 64, torch.float32)
        expected = model(single_sequence(prompt), cache)
        cache = PagedCache(model.config, 8, 64, torch.float32)
        for tensor in (*cache.latent, *cache.index):
            if tensor is not None:
                tensor.fill_(float("nan"))
        found = model(single_sequence(prompt, table=[6, 3]), cache)
    assert torch.allclose(found, expected, atol=1e-5)
