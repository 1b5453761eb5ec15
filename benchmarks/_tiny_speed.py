"""How fast an engine reads a prompt and decodes behind it, for checkpoints that take turns in one run.

Time does not depend on weights, so random ones stand for trained ones of the same config.json.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from freehold.engine.engine import Engine
from freehold.engine.loading import EngineOptions, build_engine
from freehold.engine.request import Request
from freehold.model.tiny import write_random_checkpoint
from freehold.types import SamplingParams

DECODED = 48


@dataclass(frozen=True)
class Speed:
    """Medians, tokens a second."""

    prefill: float
    decode: float


def compare(
    configs: Mapping[str, Mapping[str, Any]],
    directory: Path,
    contexts: Sequence[int],
    rounds: int,
    threads: int | None = None,
) -> dict[str, dict[int, Speed]]:
    """The speeds of each config at each context; in every round each has its turn, another one first."""
    engines: dict[str, Engine] = {}
    for number, (name, raw) in enumerate(configs.items()):
        write_random_checkpoint(raw, directory / str(number), 0)
        options = EngineOptions(
            threads=threads,
            num_draft_tokens=0,
            enable_prefix_cache=False,
            max_model_len=max(contexts) + 2 * DECODED,
            cache_bytes=1 << 28,
        )
        engines[name] = build_engine(directory / str(number), options)[0]
    names = list(engines)
    found: dict[str, dict[int, Speed]] = {name: {} for name in names}
    for context in contexts:
        samples: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        for turn in range(rounds + 1):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                sample = _run(engines[name], context, f"{context}-{turn}")
                if turn:  # the first warms up
                    samples[name].append(sample)
        for name, each in samples.items():
            found[name][context] = Speed(*(median(values) for values in zip(*each, strict=True)))
    for engine in engines.values():
        engine.close()
    return found


def _run(engine: Engine, context: int, name: str) -> tuple[float, float]:
    """Tokens a second of one request: of its prompt, and behind it."""
    prompt = tuple((37 * i + len(name)) % 3000 for i in range(context))
    engine.add(Request(name, prompt, SamplingParams(max_tokens=DECODED + 1, temperature=0.0, ignore_eos=True)))
    start, first, tokens = time.perf_counter(), 0.0, 0
    while engine.has_work:
        for chunk in engine.step():
            if chunk.error is not None:
                raise chunk.error
            tokens += len(chunk.token_ids)
        if tokens and not first:
            first = time.perf_counter()
    return context / (first - start), (tokens - 1) / (time.perf_counter() - first)
