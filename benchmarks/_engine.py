"""Freehold's side of the comparisons: one loaded model, timed through `Engine.step`.

Everything a request goes through is counted: scheduler, batch, model and sampler (greedy). Several engines with chunks
of different sizes may share the model and its cache, one at a time.
"""

from __future__ import annotations

import dataclasses
import time
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from freehold.engine.block_manager import BlockTable
from freehold.engine.engine import Engine
from freehold.engine.loading import EngineOptions, build_engine
from freehold.engine.request import Request
from freehold.engine.runner import ModelRunner
from freehold.model.cache import cache_bytes_per_token
from freehold.model.config import GlmConfig
from freehold.model.inputs import single_sequence
from freehold.types import SamplingParams, TokenChunk

CHUNKS = (512, 1024, 2048, 4096)
_SAMPLED = 512  # tokens whose really computed cache rows give the random ones their mean and spread


def prompt_of(length: int, seed: int, vocabulary: int) -> tuple[int, ...]:
    """Random token ids, the same for every engine."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, vocabulary - 200, (length,), generator=generator).tolist())  # no special tokens


class Ours:
    """cache_tokens: room in the cache. weights: bf16, int8 or int4, quantised from the checkpoint while loading."""

    def __init__(self, directory: Path, weights: str, threads: int, cache_tokens: int, sequences: int) -> None:
        quantize: dict[str, Any] = {} if weights == "bf16" else {"quantize": weights}
        cache_bytes = cache_tokens * cache_bytes_per_token(GlmConfig.from_file(directory), torch.bfloat16)
        options = EngineOptions(
            threads=threads, max_num_seqs=sequences, cache_bytes=cache_bytes, num_draft_tokens=0, **quantize
        )
        self.engine, _ = build_engine(directory, options)
        runner = self.engine.runner
        assert isinstance(runner, ModelRunner)
        # The benchmark fills the one and compares the logits of the other.
        self.cache, self.model = runner.cache, runner.model
        self.vocabulary = self.engine.config.vocab_size
        self._number = count()

    def close(self) -> None:
        self.engine.close()

    def logits(self, prompt: tuple[int, ...]) -> Tensor:
        """Logits of every position, [T, V] fp32. Overwrites the first blocks of the cache: before anything else."""
        with torch.inference_mode():
            logits: Tensor = self.model.logits(self.model(single_sequence(prompt), self.cache))
        return logits.float()

    def prefill(self, length: int, seed: int, chunk: int) -> float:
        """Seconds from an idle engine to the first token of a new prompt."""
        config = dataclasses.replace(self.engine.config, max_num_batched_tokens=chunk)
        engine = Engine(config, self.engine.runner)  # with a block manager of its own: nothing is cached
        self._add(engine, prompt_of(length, seed, self.vocabulary), 1)
        start = time.perf_counter()
        while engine.has_work:
            engine.step()
        seconds = time.perf_counter() - start
        # It wrote into blocks that the main engine's prefix cache may know.
        self.engine.scheduler.blocks.evict()
        return seconds

    def decode(self, prompts: list[tuple[int, ...]], tokens: int) -> list[float]:
        """Seconds of each step in which every request got a token. Prompts that ran before are in the prefix cache."""
        for prompt in prompts:
            self._add(self.engine, prompt, tokens + 1)
        steps = []
        while self.engine.has_work:
            start = time.perf_counter()
            chunks = self.engine.step()
            seconds = time.perf_counter() - start
            if _decoded(chunks, len(prompts)):
                steps.append(seconds)
        return steps[-tokens:]

    def fill(self, length: int, seed: int) -> tuple[int, ...]:
        """A prompt of `length` tokens that the prefix cache takes for computed, all but its last block: its latents and
        index keys are normal random numbers with the mean and spread that each dimension has after a real prefill."""
        sample = prompt_of(_SAMPLED + 1, seed + 1, self.vocabulary)
        self.decode([sample], 1)
        blocks = self.engine.scheduler.blocks
        real_S = self._slots(blocks.find_prefix(BlockTable(), sample))
        prompt, table = prompt_of(length, seed, self.vocabulary), BlockTable()
        if not blocks.allocate(table, length):
            raise RuntimeError(f"the cache has no room for {length} tokens")
        slots_S = self._slots(table.blocks)[:length]
        generator = torch.Generator().manual_seed(seed)
        for rows in (*self.cache.latent[: len(self.model.layers)], *self.cache.index[: len(self.model.layers)]):
            if rows is not None:
                real = rows[real_S].float()
                random = torch.randn(length, real.shape[1], generator=generator)
                rows[slots_S] = (random * real.std(0) + real.mean(0)).to(rows.dtype)
        blocks.publish(table, prompt, length)
        blocks.free(table)
        self.expect_cached(prompt)
        return prompt

    def expect_cached(self, prompt: tuple[int, ...]) -> None:
        """Fail unless all full blocks before the last token are in the prefix cache."""
        blocks = self.engine.scheduler.blocks
        found, wanted = len(blocks.find_prefix(BlockTable(), prompt)), (len(prompt) - 1) // blocks.block_size
        if found != wanted:
            raise RuntimeError(f"{found} of {wanted} blocks of the prompt are in the cache")

    def _slots(self, blocks: list[int]) -> Tensor:
        size = self.cache.block_size
        slots_BS: Tensor = torch.tensor(blocks)[:, None] * size + torch.arange(size)
        return slots_BS.flatten()

    def _add(self, engine: Engine, prompt: tuple[int, ...], tokens: int) -> None:
        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        engine.add(Request(f"bench-{next(self._number)}", prompt, params))


def _decoded(chunks: list[TokenChunk], requests: int) -> bool:
    for chunk in chunks:
        if chunk.error is not None:
            raise chunk.error
    return sum(bool(chunk.token_ids) for chunk in chunks) == requests


def best_chunk(ours: Ours, length: int) -> int:
    """The chunk that prefills `length` tokens fastest, of two runs each. Warms up, too."""
    chunks = [chunk for chunk in CHUNKS if chunk <= max(length, CHUNKS[0])]
    return min(chunks, key=lambda chunk: median(ours.prefill(length, 1000 + i, chunk) for i in range(2)))
