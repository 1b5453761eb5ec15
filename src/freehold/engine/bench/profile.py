"""Charges the time of engine steps to parts, by wrapping the methods that the parts are made of.

Nothing of this is in an engine that is not profiled: while a `Profiler` is on, methods of the model's modules, of its
`Ops` object, of the sampler and of the batch builder are shadowed by timed ones on those very objects, and `stop` takes
them away. So plain and profiled steps can alternate in one engine, and the difference is what profiling costs.

A module's method says which part its code belongs to (`_METHODS`); within it an operation may belong to a finer one
(`_OPERATIONS`): a `select` of the indexer is "indexer.select", its `linear` stays "indexer.project". An operation that
is not in that table, a fused one for instance, is charged to the module that called it.

**Fused kernels** do several parts in one call, and only they know how long each took. Such an `Ops` has

    def profile_parts(self) -> dict[str, float]

which returns the seconds spent by part (names of `traffic.PARTS`) since it was last called, {} if there were none. It
is called once when profiling starts and then after each operation, out of whose time its shares are taken; the rest
stays with the caller's part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from freehold.engine.bench.clock import PartClock
from freehold.engine.runner import ModelRunner
from freehold.model.decoder import DecoderLayer
from freehold.model.glm import Glm
from freehold.model.indexer import Indexer
from freehold.model.layers import MLP
from freehold.model.mla import LatentAttention
from freehold.model.moe import MoE, Router
from freehold.model.traffic import Part

_METHODS: Mapping[type[nn.Module], Mapping[str, Part]] = {
    Glm: {"forward": "other", "logits": "head"},
    DecoderLayer: {"forward": "norms"},  # what is left of it: two norms and two additions
    LatentAttention: {"forward": "attention.project"},
    Indexer: {"write_keys": "indexer.project", "select": "indexer.project"},
    MoE: {"forward": "experts"},
    Router: {"forward": "router"},
    MLP: {"forward": "mlp"},
}
_OPERATIONS: Mapping[tuple[Part, str], Part] = {
    ("attention.project", "write_cache"): "attention.write",
    ("attention.project", "absorb"): "attention.attend",
    ("attention.project", "unabsorb"): "attention.attend",
    ("attention.project", "sparse_attention"): "attention.attend",
    ("attention.project", "dense_attention"): "attention.attend",
    ("indexer.project", "select"): "indexer.select",
    ("other", "rms_norm"): "norms",  # the final one
}
_NATIVE_CLOCK = "profile_parts"


class Profiler:
    """Times the steps of one runner between `start` and `stop`."""

    def __init__(self, runner: ModelRunner) -> None:
        self.clock = PartClock()
        self._on = False
        self._native: Callable[[], Mapping[str, float]] | None = getattr(runner.model.ops, _NATIVE_CLOCK, None)
        self._timed = [
            *((owner, name, self._method(getattr(owner, name), part)) for owner, name, part in _methods(runner)),
            *(
                (runner.model.ops, name, self._operation(getattr(runner.model.ops, name), name))
                for name in _operations(runner.model.ops)
            ),
        ]

    def start(self, base: Part = "scheduler") -> None:
        """From here on time is charged: to `base` where no part is entered."""
        for owner, name, timed in self._timed:
            setattr(owner, name, timed)
        if self._native is not None:
            self._native()  # what it measured before is not ours
        self._on = True
        self.clock.start(base)

    def stop(self) -> dict[Part, float]:
        """Seconds by part; nothing is wrapped any more."""
        try:
            return self.clock.stop()
        finally:
            self._on = False
            for owner, name, _ in self._timed:
                delattr(owner, name)  # the class's method is seen again

    @contextmanager
    def charge(self, part: Part) -> Iterator[None]:
        """Charge what happens within to a part that the caller knows of; nothing while the profiler is off."""
        if not self._on:
            yield
            return
        self.clock.enter(part)
        try:
            yield
        finally:
            self.clock.leave()

    def _method(self, method: Callable[..., Any], part: Part) -> Callable[..., Any]:
        enter, leave = self.clock.enter, self.clock.leave

        def timed(*args: Any, **kwargs: Any) -> Any:
            enter(part)
            try:
                return method(*args, **kwargs)
            finally:
                leave()

        return timed

    def _operation(self, method: Callable[..., Any], name: str) -> Callable[..., Any]:
        clock, native = self.clock, self._native

        def timed(*args: Any, **kwargs: Any) -> Any:
            part = _OPERATIONS.get((clock.current, name), clock.current)
            clock.enter(part)
            before = clock.charged(part)
            try:
                return method(*args, **kwargs)
            finally:
                if native is not None:
                    clock.move(native(), before)
                clock.leave()

        return timed


def _methods(runner: ModelRunner) -> Iterator[tuple[object, str, Part]]:
    yield runner, "execute", "other"
    yield runner.batches, "build", "scheduler"
    for name in ("add", "drop", "sample", "score"):
        yield runner.sampler, name, "sampling"
    for module in runner.model.modules():
        for kind, methods in _METHODS.items():
            if isinstance(module, kind):
                for name, part in methods.items():
                    yield module, name, part


def _operations(ops: object) -> Iterator[str]:
    """The public methods of an `Ops`, whatever they are."""
    for name in dir(type(ops)):
        if not name.startswith("_") and name != _NATIVE_CLOCK and callable(getattr(type(ops), name)):
            yield name
