"""Models whose MTP layer is right often, but not always, made without training.

The embedding outweighs what the layers add, so the next token depends mostly on the last one, and somewhat on all
others through attention; the MTP layer passes the embedding of the next token on and adds its own. It therefore ranks
tokens nearly as the target would.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from freehold.engine.draft_policy import FixedDrafts, Policy
from freehold.engine.drafts import Drafter
from freehold.engine.engine import Engine, EngineConfig
from freehold.engine.guide import GuideCompiler
from freehold.engine.request import Request
from freehold.engine.runner import ModelRunner
from freehold.engine.sampler import Sampler
from freehold.model.cache import PagedCache
from freehold.model.config import GlmConfig
from freehold.model.glm import Glm
from freehold.model.sizes import Size, size_config
from freehold.model.tiny import write_random_checkpoint
from freehold.types import SamplingParams, TokenChunk

WORDS = 400  # token ids below every special token of the nano vocabulary


@cache
def draftable(loudness: float = 4.0, *, shares: bool = True, topk: int = 8, seed: int = 7) -> Glm:
    """A nano model in fp32. loudness: of the embedding, over what the layers add: more makes more drafts right."""
    sizes = {"index_topk": topk, "dtype": "float32", "index_share_for_mtp_iteration": shares}
    config = GlmConfig.from_dict(size_config("nano") | sizes)
    glm = Glm(config, dtype=torch.float32).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in glm.named_parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            parameter.data.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
    glm.embed_tokens.data.normal_(std=loudness, generator=generator)
    assert glm.mtp is not None
    hidden = config.hidden_size
    glm.mtp.input.eh_proj.weight.data.zero_()
    glm.mtp.input.eh_proj.weight.data[:, :hidden].copy_(torch.eye(hidden) * loudness)
    glm.mtp.input.eh_proj.weight.data[:, hidden:].copy_(torch.eye(hidden) * 0.3)
    return glm


def write_draftable(directory: Path, loudness: float = 8.0, size: Size = "nano", dtype: str = "bfloat16") -> None:
    """The same idea as a checkpoint: one with random weights, its embedding louder, its eh_proj passing it on."""
    from safetensors.torch import load_file, save_file

    config = size_config(size)
    write_random_checkpoint(config, directory, seed=7, dtype=dtype)
    (file,) = directory.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"] *= loudness / tensors["model.embed_tokens.weight"].float().std()
    joined = tensors[f"model.layers.{config['num_hidden_layers']}.eh_proj.weight"]
    hidden = config["hidden_size"]
    joined.zero_()
    joined[:, :hidden] = torch.eye(hidden) * loudness
    joined[:, hidden:] = torch.eye(hidden) * 0.3
    save_file(tensors, file, metadata={"format": "pt"})


def new_engine(
    model: Glm,
    num_drafts: int,
    *,
    blocks: int = 64,
    block_size: int = 8,
    seqs: int = 4,
    budget: int = 64,
    prefix_cache: bool = True,
    guides: GuideCompiler | None = None,
    policy: Policy | None = None,
) -> Engine:
    """num_drafts: for each request and step, always so many unless a policy says otherwise."""
    config = model.config
    if policy is None and num_drafts:
        policy = FixedDrafts(num_drafts)
    sampler = Sampler(config.vocab_size, config.eos_token_ids, guides)
    runner = ModelRunner(model, PagedCache(config, blocks, block_size, model.dtype), sampler, policy)
    sizes = EngineConfig(
        model_name="draftable",
        max_model_len=512,
        block_size=block_size,
        num_blocks=blocks,
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
        eos_token_ids=config.eos_token_ids,
        vocab_size=config.vocab_size,
        cache_bytes_per_token=1,
        enable_prefix_cache=prefix_cache,
        num_draft_tokens=num_drafts,
    )
    return Engine(sizes, runner)


def drafter_of(engine: Engine) -> Drafter:
    assert isinstance(engine.runner, ModelRunner)
    assert engine.runner.drafter is not None
    return engine.runner.drafter


def run(engine: Engine, requests: Sequence[Request]) -> dict[str, list[TokenChunk]]:
    """All requests at once, to their ends."""
    for request in requests:
        engine.add(request)
    chunks: dict[str, list[TokenChunk]] = {request.request_id: [] for request in requests}
    while engine.has_work:
        for chunk in engine.step():
            assert chunk.error is None, chunk.error
            chunks[chunk.request_id].append(chunk)
        engine.check_integrity()
    return chunks


def tokens(chunks: Sequence[TokenChunk]) -> tuple[int, ...]:
    return tuple(token for chunk in chunks for token in chunk.token_ids)


def greedy(name: str, prompt: Sequence[int], count: int = 24, **params: object) -> Request:
    asked = {"max_tokens": count, "temperature": 0.0, "ignore_eos": True, **params}
    return Request(name, prompt, SamplingParams(**asked))  # type: ignore[arg-type]
