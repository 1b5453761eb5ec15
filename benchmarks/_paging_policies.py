"""Which experts should stay in memory? Traces of routing, and policies that are driven with them without a disk.

Ours is the engine's own pager, with a file that reads nothing. The others differ from it in what goes first: least
recently used; fewest uses ever; and, knowing the future, the one that is used again last, which no policy can beat
(reads ahead aside).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from freehold.model.expert_file import ExpertFile, Layout, MatrixBytes
from freehold.model.pager import ExpertPager

if TYPE_CHECKING:
    from torch import Tensor

Use = tuple[int, NDArray[np.int64]]
"""A layer, and the experts that its rows were sent to, one for each row and choice."""


@dataclass(frozen=True)
class Trace:
    name: str
    layers: int
    experts: int
    steps: list[list[Use]]  # of each step, every layer in turn
    prompts: frozenset[int] = frozenset()  # which steps compute a prompt


class NoFile:
    """Stands for an expert file where only counts matter."""

    def __init__(self, layers: int, experts: int) -> None:
        matrix = MatrixBytes(1, 2048, 0)
        self.layout = Layout(((matrix, matrix),) * layers, experts)

    def read(self, layer: int, expert: int, into: memoryview) -> None:
        pass

    def close(self) -> None:
        pass


class Ours(ExpertPager):
    name = "fading counts"


class Lru(ExpertPager):
    name = "least recently used"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.used: dict[int, int] = defaultdict(int)
        self.now = 0

    def _worth(self, records: NDArray[np.int64], layer: int) -> NDArray[np.float64]:
        return np.array([self.used[record] for record in records.tolist()], np.float64)


class Counts(ExpertPager):
    name = "counts for ever"

    def __init__(self, file: ExpertFile, budget: int, **options: Any) -> None:
        super().__init__(file, budget, **options, half_life=1 << 62)


class Oracle(Lru):
    name = "knowing the future"
    future: dict[int, list[int]]  # record → times of its uses, last first

    def _worth(self, records: NDArray[np.int64], layer: int) -> NDArray[np.float64]:
        times = []
        for record in records.tolist():
            left = self.future.get(record, [])
            while left and left[-1] <= self.now:
                left.pop()
            times.append(-left[-1] if left else -(1 << 60))
        return np.array(times, np.float64)


POLICIES: tuple[type[ExpertPager], ...] = (Ours, Lru, Counts, Oracle)


def hit_rate(policy: type[ExpertPager], trace: Trace, share: float, **options: Any) -> float:
    """Part of the uses in decode steps, each expert of a layer and step once, that found their expert in memory.

    share: of all experts that fit into memory. The first fifth of the steps is not counted.
    """
    file: Any = NoFile(trace.layers, trace.experts)
    slots = max(trace.experts, int(share * trace.layers * trace.experts))
    pager = policy(file, slots * file.layout.record_bytes(0), readers=1, **options)
    if isinstance(pager, Oracle):
        pager.future, now = defaultdict(list), 0
        for step in trace.steps:
            for layer, ids in step:
                now += 1
                for expert in np.unique(ids).tolist():
                    pager.future[layer * trace.experts + expert].append(now)
        for times in pager.future.values():
            times.reverse()
    hits = uses = now = 0
    for number, step in enumerate(trace.steps):
        for layer, ids in step:
            now += 1
            first = layer * trace.experts
            wanted = np.unique(ids)
            present = int(np.sum(pager._slot_of[first + wanted] >= 0))
            np.add.at(pager._uses, first + ids, 1)
            if isinstance(pager, Lru):
                pager.now = now
                pager.used.update((first + expert, now) for expert in wanted.tolist())
            if present < len(wanted):
                pager.need(layer, ids)
            if number >= len(trace.steps) // 5 and number not in trace.prompts:
                hits, uses = hits + present, uses + len(wanted)
    pager.close()
    return hits / uses


def made_trace(
    *, layers: int = 20, experts: int = 64, chosen: int = 8, tokens: int = 3000, skew: float = 1.0, drift: int = 600,
    prompt: int = 0, every: int = 500, seed: int = 0,
) -> Trace:  # fmt: skip
    """Routing as published measurements of trained models describe it, made: experts' popularity falls as rank^-skew,
    the ranks change a little with every `drift` tokens, and a prompt of `prompt` tokens comes `every` tokens."""
    g = np.random.default_rng(seed)
    logits = -skew * np.log(1 + np.stack([g.permutation(experts) for _ in range(layers)]))
    other = -skew * np.log(1 + np.stack([g.permutation(experts) for _ in range(layers)]))
    steps: list[list[Use]] = []
    prompts = set()
    for token in range(tokens):
        if token % drift == drift - 1:
            logits, other = other, -skew * np.log(1 + np.stack([g.permutation(experts) for _ in range(layers)]))
        share = token % drift / drift
        now = logits * (1 - share) + other * share
        rows = 1
        if prompt and token % every == 0:
            prompts.add(token)
            rows = prompt
        noisy = now[:, None] + g.gumbel(size=(layers, rows, experts))
        ids = np.argpartition(-noisy, chosen, axis=-1)[..., :chosen]
        steps.append([(layer, ids[layer].reshape(-1)) for layer in range(layers)])
    return Trace(f"made, skew {skew:g}" + (f", prompts of {prompt}" if prompt else ""), layers, experts, steps,
                 frozenset(prompts))  # fmt: skip


class _Recorder:
    """A loaded checkpoint that reads a prompt and then random tokens, one at a time, with its routers' inputs and
    choices."""

    def __init__(self, directory: Path) -> None:
        from freehold.engine.loading import EngineOptions, load_model
        from freehold.model.config import GlmConfig
        from freehold.model.moe import MoE, Router

        self.config = GlmConfig.from_file(directory)
        self.model = load_model(directory, self.config, EngineOptions())
        self.model.run_few = None
        self.routers = [layer.mlp.gate for layer in self.model.decoder_layers if isinstance(layer.mlp, MoE)]
        self.found: list[tuple[Router, Tensor, Tensor]] = []
        for router in self.routers:
            router.register_forward_hook(lambda r, args, result: self.found.append((r, args[1], result[0])))

    def steps(self, prompt: int, tokens: int, seed: int = 0) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Of each step, of each layer: what its router was given, and the experts that it chose."""
        import torch

        from freehold.model.cache import PagedCache
        from freehold.model.inputs import single_sequence

        blocks = -(-(prompt + tokens) // 64)
        cache = PagedCache(self.config, blocks, 64, torch.bfloat16)
        g = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, self.config.vocab_size, (prompt + tokens,), generator=g).tolist()
        with torch.inference_mode():
            for start, stop in [(0, prompt), *((i, i + 1) for i in range(prompt, prompt + tokens))]:
                self.found.clear()
                self.model(single_sequence(ids[start:stop], start=start, table=range(blocks)), cache)
                yield [(x, ids_TX) for _, x, ids_TX in self.found]


def recorded_trace(directory: Path, tokens: int, prompt: int) -> Trace:
    """The routing of a checkpoint."""
    recorder = _Recorder(directory)
    steps = [
        [(layer, ids_TX.reshape(-1).numpy().copy()) for layer, (_, ids_TX) in enumerate(step)]
        for step in recorder.steps(prompt, tokens)
    ]
    layers = len(recorder.routers)
    return Trace("recorded, random weights", layers, recorder.config.n_routed_experts, steps, frozenset({0}))


@dataclass(frozen=True)
class Guess:
    """What a layer's router says when it is given the layer before's input instead of its own, while decoding.

    recall: experts it names, of those the layer will choose. missing: the same, of those that are not in memory.
    useful: of the experts it names that are not in memory, those that the layer will choose: the others would be read,
    and push others out, for nothing.
    """

    recall: float
    missing: float
    useful: float


def router_ahead(directory: Path, tokens: int, share: float) -> Guess:
    """share: of all experts that fit into memory, where our pager keeps them."""
    recorder = _Recorder(directory)
    layers, experts = len(recorder.routers), recorder.config.n_routed_experts
    file: Any = NoFile(layers, experts)
    pager = Ours(file, max(experts, int(share * layers * experts)) * file.layout.record_bytes(0), readers=1)
    named = chosen = named_missing = chosen_missing = both_missing = 0
    for number, step in enumerate(recorder.steps(256, tokens)):
        for layer, (_, ids_TX) in enumerate(step):
            own = set(ids_TX.reshape(-1).tolist())
            if number > tokens // 5 and layer > 0:
                guess, _ = recorder.routers[layer].forward(recorder.model.ops, step[layer - 1][0])
                guessed = set(guess[0].tolist())
                held = set((np.flatnonzero(pager._slot_of[layer * experts :][:experts] >= 0)).tolist())
                named, chosen = named + len(guessed & own), chosen + len(own)
                named_missing, chosen_missing = named_missing + len(guessed - held), chosen_missing + len(own - held)
                both_missing += len((guessed & own) - held)
            np.add.at(pager._uses, layer * experts + ids_TX.reshape(-1).numpy(), 1)
            pager.need(layer, list(own))
    pager.close()
    return Guess(named / chosen, both_missing / chosen_missing, both_missing / named_missing)
