"""The training loop: accumulate gradients, clip, step, balance, log, save; and go on exactly after a kill.

What step n does depends on the settings, on what was saved before it, and on batches n·a to n·a + a - 1, which are
functions of their number. So a run that was killed repeats the steps since its last checkpoint with the same losses,
bit for bit on the same machine and number of threads.

A run's directory:

    run.json                  the settings it was begun with; another run refuses to go on in it
    log.csv                   a line a step
    checkpoint.safetensors    the last checkpoint, replaced whole
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from freehold.errors import InvalidRequest, TrainingFailed
from freehold.train import saved
from freehold.train.log import Log
from freehold.train.optim import Optim, Optimiser
from freehold.train.run_directory import begin, run_lock
from freehold.train.schedule import Schedule


class Sized(Protocol):
    """A batch: `tokens` is how many tokens of documents it has."""

    @property
    def tokens(self) -> int: ...


B = TypeVar("B", bound=Sized)
B_contra = TypeVar("B_contra", bound=Sized, contravariant=True)
B_co = TypeVar("B_co", bound=Sized, covariant=True)


class Losses(Protocol):
    """total: a mean over the batch, to be minimised. parts: what it is made of, and other figures, for the log."""

    @property
    def total(self) -> Tensor: ...

    @property
    def parts(self) -> Mapping[str, float]: ...


class Learner(Protocol[B_contra]):
    """What is trained: gives losses, and is told after each step of the optimiser.

    Several learners may share one set of parameters (`replica`): they work side by side, each on a batch of its own.
    """

    def losses(self, batch: B_contra, /) -> Losses: ...

    def balance(self) -> None: ...


class Numbered(Protocol[B_co]):
    """Batches by number; every number has one, and the same each time."""

    def __getitem__(self, number: int, /) -> B_co: ...


@dataclass(frozen=True, slots=True)
class LoopSettings:
    """steps: of the optimiser. accumulate: batches for each. save_seconds: between checkpoints; save_steps: likewise, 0
    for never by count. evaluate_steps: between losses on held-out data."""

    steps: int
    optim: Optim = field(default_factory=Optim)
    schedule: Schedule = field(default_factory=Schedule)
    accumulate: int = 1
    seed: int = 0
    save_seconds: float = 120.0
    save_steps: int = 0
    evaluate_steps: int = 200

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "evaluate_steps"):
            if getattr(self, name) < 1:
                raise InvalidRequest(f"{name} = {getattr(self, name)} must be at least 1", param=name)


@dataclass(frozen=True, slots=True)
class StepReport:
    """One step, as a progress bar shows it. seconds: of this step."""

    step: int
    steps: int
    loss: float
    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Finished:
    """steps and tokens in all; seconds of computing; loss of the last step, None if there was nothing left to do."""

    steps: int
    tokens: int
    seconds: float
    loss: float | None


class Loop(Generic[B]):
    """One run in one directory.

    parameters: those to optimise, by name. tensors: everything that training changes, by name: parameters, and what
    `balance` moves. held_out: gives the loss that is logged as `held_out` now and then; it must change nothing.
    """

    def __init__(
        self,
        learners: Learner[B] | Sequence[Learner[B]],
        parameters: Mapping[str, nn.Parameter],
        tensors: Mapping[str, Tensor],
        batches: Numbered[B],
        settings: LoopSettings,
        directory: Path,
        *,
        held_out: Callable[[], float] | None = None,
    ) -> None:
        self._learners = tuple(learners) if isinstance(learners, Sequence) else (learners,)
        self._parameters = dict(parameters)
        self._tensors, self._batches, self._held_out = tensors, batches, held_out
        self._settings, self._directory = settings, directory
        self._optimiser = Optimiser(parameters.items(), settings.optim)
        self._step, self._tokens, self._seconds = 0, 0, 0.0
        self._saved = -1
        self._asked_to_stop = 0

    def run(self, about: Mapping[str, Any], report: Callable[[StepReport], None] | None = None) -> Finished:
        """Train to the end, from where the directory left off. about: facts that the run must have been begun with, in
        JSON's types; they stand in run.json beside the settings.

        SIGINT and SIGTERM save first, then raise KeyboardInterrupt and SystemExit(143). Raises InvalidRequest if the
        directory is in use or belongs to another run; TrainingFailed if a loss or gradient is not finite (the last
        checkpoint stays); DiskFull and CheckpointError.
        """
        with run_lock(self._directory), _deterministic(self._settings.seed), self._signals():
            begin(self._directory, {**about, "settings": _comparable(self._settings)})
            loss = None
            if (self._directory / saved.CHECKPOINT_NAME).exists():
                self._resume()
            log = Log(self._directory, self._step)
            try:
                last_save = time.monotonic()
                while self._step < self._settings.steps:
                    made = self._one_step(log)
                    loss = made.loss
                    if report is not None:
                        report(made)
                    count = self._settings.save_steps
                    late = time.monotonic() - last_save > self._settings.save_seconds
                    if late or (count and self._step % count == 0) or self._asked_to_stop:
                        self._save()
                        last_save = time.monotonic()
                    if self._asked_to_stop:
                        raise KeyboardInterrupt if self._asked_to_stop == signal.SIGINT else SystemExit(143)
                if self._saved != self._step:
                    self._save()
            finally:
                log.close()
        return Finished(self._step, self._tokens, self._seconds, loss)

    def _one_step(self, log: Log) -> StepReport:
        started = time.perf_counter()
        settings, first = self._settings, self._step * self._settings.accumulate
        batches = [self._batches[first + i] for i in range(settings.accumulate)]
        tokens = sum(batch.tokens for batch in batches)
        self._optimiser.zero_grad()
        parts: dict[str, float] = {}
        loss = 0.0
        for batch, losses in zip(batches, self._gradients(batches, tokens), strict=True):
            share = batch.tokens / max(tokens, 1)
            total = float(losses.total.detach())
            if not math.isfinite(total):
                raise self._failed(f"the loss is {total}")
            loss += share * total
            for name, value in losses.parts.items():
                parts[name] = parts.get(name, 0.0) + share * value
        norm = self._optimiser.clip()
        if not math.isfinite(norm):
            raise self._failed(f"the norm of the gradients is {norm}")
        factor = settings.schedule.factor(self._step, settings.steps)
        self._optimiser.step(factor)
        for learner in self._learners:
            learner.balance()
        parts |= self._evaluate()
        seconds = time.perf_counter() - started
        self._tokens, self._seconds = self._tokens + tokens, self._seconds + seconds
        row = {"step": self._step, "tokens": self._tokens, "seconds": round(self._seconds, 3), "lr_factor": factor}
        log.write({**row, "norm": norm, "loss": loss, **parts})
        self._step += 1
        return StepReport(self._step, settings.steps, loss, tokens, seconds)

    def _gradients(self, batches: Sequence[B], tokens: int) -> list[Losses]:
        """Losses of the batches; their gradients, weighted by tokens, are added up in the parameters' `.grad`.

        With several learners, each has a thread and takes every so-manieth batch. The sums are made in the order of
        the batches, so they do not depend on which thread is faster.
        """
        wanted = [parameter for parameter in self._parameters.values() if parameter.requires_grad]

        def work(place: int) -> list[tuple[Losses, tuple[Tensor | None, ...]]]:
            done: list[tuple[Losses, tuple[Tensor | None, ...]]] = []
            for batch in batches[place :: len(self._learners)]:
                losses = self._learners[place].losses(batch)
                share = batch.tokens / max(tokens, 1)
                done.append((losses, torch.autograd.grad(losses.total * share, wanted, allow_unused=True)))
            return done

        if len(self._learners) == 1:
            found = [work(0)]
        else:
            with _threads_each(1), ThreadPoolExecutor(len(self._learners)) as pool:
                found = list(pool.map(work, range(len(self._learners))))
        ordered = [found[i % len(found)][i // len(found)] for i in range(len(batches))]
        for _, gradients in ordered:
            for parameter, gradient in zip(wanted, gradients, strict=True):
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        return [losses for losses, _ in ordered]

    def _evaluate(self) -> dict[str, float]:
        """The held-out loss when it is due; nan otherwise, so that the log has the column."""
        if self._held_out is None:
            return {}
        due = (self._step + 1) % self._settings.evaluate_steps == 0 or self._step + 1 == self._settings.steps
        return {"held_out": self._held_out() if due else math.nan}

    def _failed(self, what: str) -> TrainingFailed:
        kept = f"the checkpoint of step {self._saved} is kept" if self._saved >= 0 else "nothing was saved before"
        return TrainingFailed(
            f"step {self._step}: {what}; {kept} in {self._directory}. A new run with a lower learning rate or a "
            f"smaller clipping norm may hold"
        )

    def _save(self) -> None:
        groups = {
            "model": self._tensors,
            "optimiser": self._optimiser.state(),
            "random": {"torch": torch.get_rng_state()},
        }
        facts = {"step": self._step, "tokens": self._tokens, "seconds": self._seconds}
        saved.save(self._directory / saved.CHECKPOINT_NAME, groups, facts)
        self._saved = self._step

    def _resume(self) -> None:
        path = self._directory / saved.CHECKPOINT_NAME
        facts = saved.facts(path)
        saved.load_into(path, "model", self._tensors)
        self._optimiser.load_state(saved.load(path, "optimiser"))
        torch.set_rng_state(saved.load(path, "random")["torch"])
        self._step, self._tokens, self._seconds = int(facts["step"]), int(facts["tokens"]), float(facts["seconds"])
        self._saved = self._step

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM lets the step end and be saved; the second acts at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, frame: FrameType | None) -> None:
            self._asked_to_stop = number
            for each, handler in before.items():
                signal.signal(each, handler)

        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in before:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def _deterministic(seed: int) -> Iterator[None]:
    """The same numbers each time: seeded, and no operation that adds in an order of its own."""
    memory: Any = torch.utils.deterministic  # its one setting is a property that type checkers do not see
    before, fill = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False  # costs time, and nothing here reads such memory
    try:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            yield
    finally:
        torch.use_deterministic_algorithms(before)
        memory.fill_uninitialized_memory = fill


@contextmanager
def _threads_each(count: int) -> Iterator[None]:
    """Within it, operations use `count` threads of their own."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _comparable(settings: LoopSettings) -> dict[str, Any]:
    """What a run must be continued with: all but how often it saves."""
    return {name: value for name, value in asdict(settings).items() if not name.startswith("save_")}
