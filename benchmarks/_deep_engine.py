"""An engine over a random checkpoint whose cache holds one long context."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from freehold.engine.engine import Engine, EngineConfig
from freehold.engine.guide import GuideCompiler
from freehold.engine.loading import EngineOptions, load_model
from freehold.engine.runner import ModelRunner
from freehold.engine.sampler import Sampler
from freehold.model.cache import IndexCache, PagedCache, cache_bytes_per_token
from freehold.model.config import GlmConfig
from freehold.model.glm import Glm
from freehold.model.tiny import write_random_checkpoint
from freehold.model.tokenizer import Tokenizer

BLOCK = 64
SPARE_BLOCKS = 16  # for the tokens that are generated


@dataclass(frozen=True)
class Assembled:
    """The parts that `loading.build_engine` puts together, for scripts that look into them."""

    model: Glm
    cache: PagedCache
    engine: Engine


def assemble(
    raw: dict[str, Any], directory: Path, tokens: int, threads: int, index_cache: IndexCache = "auto"
) -> Assembled:
    """Write a random checkpoint of this config.json to `directory`, and load it with a cache for `tokens` tokens."""
    write_random_checkpoint(raw, directory, seed=0)
    config = GlmConfig.from_file(directory)
    model = load_model(directory, config, EngineOptions(threads=threads))
    blocks = -(-tokens // BLOCK) + SPARE_BLOCKS
    cache = PagedCache(config, blocks, BLOCK, model.dtype, index_cache=index_cache)
    guides = GuideCompiler(Tokenizer.from_dir(directory), config.eos_token_ids)
    sampler = Sampler(config.vocab_size, config.eos_token_ids, guides)
    engine_config = EngineConfig(
        model_name="benchmark",
        max_model_len=config.max_position_embeddings,
        num_blocks=blocks,
        block_size=BLOCK,
        eos_token_ids=config.eos_token_ids,
        vocab_size=config.vocab_size,
        cache_bytes_per_token=cache_bytes_per_token(config, model.dtype, index_cache),
    )
    return Assembled(model, cache, Engine(engine_config, ModelRunner(model, cache, sampler)))
