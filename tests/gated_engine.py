"""An `AsyncEngine` whose steps wait at a gate, so that tests decide when it advances."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Sequence

from freehold.engine.async_engine import AsyncEngine
from freehold.engine.engine import Engine, EngineConfig
from freehold.engine.step import SeqOutput, StepInput
from freehold.types import SamplingParams, TokenChunk


class Gate:
    """Counts up for every request. While `closed`, steps wait, so that tests decide when the engine advances."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.fail: Exception | None = None
        self.threads: set[str] = set()
        self.steps = 0
        self.seconds = 0.0  # that a step takes
        self.is_closed = False

    def execute(self, step: StepInput) -> list[SeqOutput]:
        self.threads.add(threading.current_thread().name)
        self.open.wait(30)
        time.sleep(self.seconds)
        self.steps += 1
        if self.fail is not None:
            raise self.fail
        return [
            SeqOutput(seq.request_id, (seq.start + len(seq.token_ids),) if seq.samples else ()) for seq in step.seqs
        ]

    def release(self, request_ids: tuple[str, ...]) -> None:
        self.threads.add(threading.current_thread().name)

    def close(self) -> None:
        self.threads.add(threading.current_thread().name)
        self.is_closed = True


def make(**options: object) -> tuple[AsyncEngine, Gate]:
    gate = Gate()
    sizes = {
        "model_name": "m",
        "max_model_len": 5000,
        "num_blocks": 400,
        "eos_token_ids": (4999,),
        "vocab_size": 5000,
        "cache_bytes_per_token": 10,
        "block_size": 8,
        "max_num_seqs": 4,
        "max_queue": 4,
    }
    return AsyncEngine(Engine(EngineConfig(**{**sizes, **options}), gate)), gate  # type: ignore[arg-type]


def ask(engine: AsyncEngine, name: str, max_tokens: int = 5) -> AsyncGenerator[TokenChunk, None]:
    return engine.submit(name, [1, 2, 3], SamplingParams(max_tokens=max_tokens))


async def collect(stream: AsyncGenerator[TokenChunk, None]) -> list[TokenChunk]:
    return [chunk async for chunk in stream]


async def until(condition: object, seconds: float = 10.0) -> None:
    """Wait for what the engine's thread will bring about."""
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it did not come about"
        await asyncio.sleep(0.002)


def empty(engine: AsyncEngine) -> bool:
    stats = engine.stats()
    return (stats.running, stats.waiting, stats.kv_usage) == (0, 0, 0.0)


def tokens_of(chunks: Sequence[TokenChunk]) -> list[int]:
    return [token for chunk in chunks for token in chunk.token_ids]
