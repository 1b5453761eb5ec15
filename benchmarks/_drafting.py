"""Engines that draft in a way that is decided here, over one loaded model, and what they do step by step."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from freehold.engine.draft_policy import DraftPolicy, FixedDrafts
from freehold.engine.engine import Engine
from freehold.engine.loading import EngineOptions, build_engine
from freehold.engine.request import Request
from freehold.engine.runner import ModelRunner
from freehold.model.cache import PagedCache
from freehold.types import SamplingParams

Prompt = Sequence[int]


class Counting(FixedDrafts):
    """Always the same number of drafts; counts what comes of them. accepted[j]: steps whose first j + 1 drafts were
    accepted; steps: those that verified as many drafts as it asks for."""

    def __init__(self, drafts: int) -> None:
        super().__init__(drafts)
        self.steps, self.accepted = 0, [0] * drafts

    def note_verified(self, outcomes: Iterable[tuple[int, int]]) -> None:
        for proposed, accepted in outcomes:
            if proposed == self.drafts:
                self.steps += 1
                for j in range(accepted):
                    self.accepted[j] += 1

    @property
    def by_position(self) -> list[float]:
        """Share of steps in which the drafts up to each position were accepted; their sum and 1 is the length."""
        return [number / max(1, self.steps) for number in self.accepted]

    @property
    def length(self) -> float:
        """Tokens a step, 1 to drafts + 1."""
        return 1.0 + sum(self.by_position)


@dataclass
class Run:
    """What some requests got. seconds, counted: of the steps in which every request was decoding, and their tokens."""

    tokens: list[tuple[int, ...]]
    seconds: float = 0.0
    counted: int = 0

    @property
    def rate(self) -> float:
        """Tokens a second, all requests together."""
        return self.counted / self.seconds


@dataclass
class Drafting:
    """One loaded model and its cache. Engines made from it must not run at the same time, unless apart."""

    base: Engine
    _number: count[int] = field(default_factory=count)

    @classmethod
    def load(cls, directory: Path, *, most: int, threads: int | None = None, sequences: int = 8) -> Drafting:
        """most: drafts that any engine may ask for."""
        options = EngineOptions(
            threads=threads, num_draft_tokens=most, max_num_seqs=sequences, max_model_len=4096, cache_bytes=1 << 28
        )
        return cls(build_engine(directory, options)[0])

    @property
    def runner(self) -> ModelRunner:
        runner = self.base.runner
        assert isinstance(runner, ModelRunner)
        return runner

    def engine(self, policy: FixedDrafts | DraftPolicy | None, most: int, *, apart: bool = False) -> Engine:
        """An engine with a scheduler of its own and no prefix cache; policy None never touches the MTP layer.

        apart: with a cache of its own, too, so that it can run beside others.
        """
        config = dataclasses.replace(self.base.config, num_draft_tokens=most, enable_prefix_cache=False)
        own = self.runner
        cache = own.cache
        if apart:
            cache = PagedCache(own.model.config, config.num_blocks, config.block_size, own.model.dtype)
        return Engine(config, ModelRunner(own.model, cache, own.sampler, policy))

    def fixed(self, drafts: int) -> Engine:
        return self.engine(FixedDrafts(drafts) if drafts else None, drafts)

    def run(self, engine: Engine, prompts: Sequence[Prompt], tokens: int) -> Run:
        """Greedy, all prompts at once, `tokens` tokens each."""
        turn = self._turn(engine, prompts, tokens)
        while engine.has_work:
            turn.step()
        return turn.result

    def beside(self, engines: Sequence[Engine], prompts: Sequence[Prompt], tokens: int) -> list[Run]:
        """As `run`, of engines with caches of their own that take turns step by step, each first as often as last: what
        else the machine does meets all of them alike."""
        turns = [self._turn(engine, prompts, tokens) for engine in engines]
        while any(engine.has_work for engine in engines):
            for turn in turns:
                if turn.engine.has_work:
                    turn.step()
            turns.reverse()
        if turns[0].engine is not engines[0]:
            turns.reverse()
        return [turn.result for turn in turns]

    def _turn(self, engine: Engine, prompts: Sequence[Prompt], tokens: int) -> _Turn:
        turn = _Turn(engine, tokens)
        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        for prompt in prompts:
            name = f"bench-{next(self._number)}"
            turn.got[name] = []
            engine.add(Request(name, tuple(prompt), params))
        return turn


@dataclass
class _Turn:
    """Requests of one engine on their way. got: tokens so far."""

    engine: Engine
    tokens: int
    got: dict[str, list[int]] = field(default_factory=dict)
    run: Run = field(default_factory=lambda: Run([]))

    def step(self) -> None:
        decoding = all(self.got.values()) and max(map(len, self.got.values())) < self.tokens
        start = time.perf_counter()
        chunks = self.engine.step()
        seconds, number = time.perf_counter() - start, 0
        for chunk in chunks:
            if chunk.error is not None:
                raise chunk.error
            self.got[chunk.request_id].extend(chunk.token_ids)
            number += len(chunk.token_ids)
        if decoding:
            self.run.seconds += seconds
            self.run.counted += number

    @property
    def result(self) -> Run:
        return Run([tuple(each) for each in self.got.values()], self.run.seconds, self.run.counted)


def interleaved(arms: Sequence[Callable[[], float]], rounds: int) -> list[list[float]]:
    """For each arm its sample of every round; each round runs all, beginning with another one."""
    samples: list[list[float]] = [[0.0] * rounds for _ in arms]
    for number in range(rounds):
        for place in range(len(arms)):
            arm = (number + place) % len(arms)
            samples[arm][number] = arms[arm]()
    return samples
