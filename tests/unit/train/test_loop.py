"""The loop: exact resume after any kind of stop, and what it refuses."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from freehold.errors import CheckpointError, DiskFull, InvalidRequest, TrainingFailed
from freehold.train import saved
from freehold.train.log import Log, read_log
from freehold.train.loop import Loop, StepReport
from freehold.train.optim import Optim
from freehold.train.run_directory import run_lock
from tests.unit.train.stand_in import StandIn, settings

ROOT = Path(__file__).parents[3]


def figures(directory: Path) -> list[tuple[float, ...]]:
    """The log without times."""
    log = read_log(directory)
    return list(zip(log["step"], log["tokens"], log["lr_factor"], log["norm"], log["loss"], log["square"], strict=True))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StandIn]:
    """An uninterrupted run."""
    directory, model = tmp_path_factory.mktemp("whole"), StandIn()
    model.loop(directory, settings()).run({})
    return directory, model


def test_a_run_logs_every_step_and_learns(whole: tuple[Path, StandIn]) -> None:
    log = read_log(whole[0])
    assert log["step"] == list(range(12))
    assert log["tokens"] == sorted(log["tokens"])
    assert log["seconds"] == sorted(log["seconds"])
    model = StandIn()
    model.loop(whole[0].parent / "longer", settings(300)).run({})
    losses = read_log(whole[0].parent / "longer")["loss"]
    assert sum(losses[-30:]) < 0.5 * sum(losses[:30])


def test_the_loss_of_a_step_is_the_mean_over_the_tokens_of_its_batches(tmp_path: Path) -> None:
    model, reports = StandIn(), list[StepReport]()
    model.loop(tmp_path, settings(1, accumulate=3)).run({}, reports.append)
    torch.manual_seed(0)
    fresh, total, tokens = StandIn(), 0.0, 0
    with torch.random.fork_rng():
        torch.manual_seed(0)
        from tests.unit.train.stand_in import NumberedPoints

        for number in range(3):
            batch = NumberedPoints()[number]
            total += batch.tokens * float(fresh.losses(batch).total.detach())
            tokens += batch.tokens
    assert reports[0].loss == pytest.approx(total / tokens)
    assert reports[0].tokens == tokens


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_run_that_was_stopped_goes_on_exactly(number: int, whole: tuple[Path, StandIn], tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.unit.train.stand_in", str(tmp_path), "0.1"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])},
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) == 7:
            process.send_signal(number)
            break
    process.communicate(timeout=60)
    expected = {signal.SIGKILL: -9, signal.SIGINT: -2, signal.SIGTERM: 143}  # Python dies of SIGINT by the signal
    assert process.returncode == expected[signal.Signals(number)]
    step = saved.facts(tmp_path / saved.CHECKPOINT_NAME)["step"]
    assert step == 5 if number == signal.SIGKILL else 7 <= step < 12

    model = StandIn()
    finished = model.loop(tmp_path, settings()).run({})
    assert finished.steps == 12
    assert figures(tmp_path) == figures(whole[0])
    for name, tensor in whole[1].named_parameters():
        assert torch.equal(tensor, dict(model.named_parameters())[name]), name


def test_without_the_optimisers_state_a_resumed_run_would_differ(
    whole: tuple[Path, StandIn], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison above can fail."""
    with pytest.raises(KeyboardInterrupt):
        StandIn().loop(tmp_path, settings()).run({}, lambda made: _interrupt(made.step == 7))
    monkeypatch.setattr("freehold.train.optim.Optimiser.load_state", lambda self, state: None)
    StandIn().loop(tmp_path, settings()).run({})
    assert figures(tmp_path)[:7] == figures(whole[0])[:7]
    assert figures(tmp_path)[8:] != figures(whole[0])[8:]


def _interrupt(now: bool) -> None:
    if now:
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("learners", [1, 2])
def test_gradients_are_added_up_as_they_come(learners: int, tmp_path: Path) -> None:
    """So what is in memory does not grow with the batches of a step."""
    model, found = StandIn(), list[bool]()

    class Watching:
        def losses(self, batch: object) -> object:
            found.append(model.first.grad is not None)
            return model.losses(batch)  # type: ignore[arg-type]

        def balance(self) -> None:
            return

    loop = model.loop(tmp_path, settings(1, accumulate=4))
    loop._learners = (Watching(),) * learners
    loop.run({})
    assert not found[0]
    assert found[learners:] == [True] * (4 - learners)


@pytest.mark.parametrize("when", ["while it saves the last step", "with nothing left to do"])
def test_a_stop_that_comes_late_is_not_lost(when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = StandIn()
    if when == "while it saves the last step":
        monkeypatch.setattr(Loop, "_save", _then_interrupt(Loop._save, 12))
    else:
        model.loop(tmp_path, settings()).run({})
        monkeypatch.setattr(Loop, "_resume", _then_interrupt(Loop._resume, 12))
    with pytest.raises(KeyboardInterrupt):
        StandIn().loop(tmp_path, settings()).run({})
    assert saved.facts(tmp_path / saved.CHECKPOINT_NAME)["step"] == 12


def _then_interrupt(method: Callable[[Any], None], step: int) -> Callable[[Any], None]:
    def wrapped(loop: Any) -> None:
        method(loop)
        _interrupt(loop._step == step)

    return wrapped


def test_a_finished_run_is_left_as_it_is(whole: tuple[Path, StandIn]) -> None:
    before = figures(whole[0])
    model = StandIn()
    finished = model.loop(whole[0], settings()).run({})
    assert (finished.steps, finished.loss) == (12, None)
    assert figures(whole[0]) == before
    assert torch.equal(model.first, whole[1].first)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    model = StandIn()
    model.spoil = lambda call: call >= 14  # the first batch of step 7
    with pytest.raises(TrainingFailed, match=r"step 7: the loss is nan; the checkpoint of step 5 is kept"):
        model.loop(tmp_path, settings()).run({})
    assert saved.facts(tmp_path / saved.CHECKPOINT_NAME)["step"] == 5
    assert len(read_log(tmp_path)["step"]) == 7
    assert all(
        bool(tensor.isfinite().all()) for tensor in saved.load(tmp_path / saved.CHECKPOINT_NAME, "model").values()
    )


def test_a_gradient_that_is_not_finite_stops(tmp_path: Path) -> None:
    model = StandIn()
    model.first.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(TrainingFailed, match=r"step 0: the norm of the gradients is .*nothing was saved"):
        model.loop(tmp_path, settings()).run({})


def test_other_settings_do_not_continue_a_run(whole: tuple[Path, StandIn]) -> None:
    with pytest.raises(InvalidRequest, match=r"settings\.optim\.lr: 0\.02 there, 0\.01 here"):
        StandIn().loop(whole[0], settings(optim=Optim(lr=0.01))).run({})
    with pytest.raises(InvalidRequest, match="corpus is not there"):
        StandIn().loop(whole[0], settings()).run({"corpus": "abc"})
    StandIn().loop(whole[0], settings(save_seconds=1.0)).run({})  # how often it saves may change


def test_two_processes_do_not_train_in_one_directory(tmp_path: Path) -> None:
    with run_lock(tmp_path), pytest.raises(InvalidRequest, match="another process"):
        StandIn().loop(tmp_path, settings()).run({})
    StandIn().loop(tmp_path, settings()).run({})


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Files cannot grow beyond `size` bytes: stands for a full disk, where a write fails midway."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        StandIn().loop(tmp_path, settings()).run({}, lambda made: _interrupt(made.step == 6))
    with largest_file(2048), pytest.raises(DiskFull):
        StandIn().loop(tmp_path, settings()).run({})
    assert saved.facts(tmp_path / saved.CHECKPOINT_NAME)["step"] == 6
    assert not list(tmp_path.glob("*.tmp"))


def test_a_damaged_checkpoint_is_refused(whole: tuple[Path, StandIn], tmp_path: Path) -> None:
    data = (whole[0] / saved.CHECKPOINT_NAME).read_bytes()
    (tmp_path / saved.CHECKPOINT_NAME).write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        StandIn().loop(tmp_path, settings()).run({})


def test_the_checkpoint_of_another_model_is_refused(whole: tuple[Path, StandIn]) -> None:
    path = whole[0] / saved.CHECKPOINT_NAME
    with pytest.raises(CheckpointError, match="extra is in the model only"):
        saved.load_into(path, "model", {**dict(StandIn().named_parameters()), "extra": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"bias is \[1\], expected \[2\]"):
        saved.load_into(path, "model", {**dict(StandIn().named_parameters()), "bias": torch.zeros(2)})


def test_held_out_losses_are_logged_when_due(tmp_path: Path) -> None:
    calls = []
    StandIn().loop(tmp_path, settings(7, evaluate_steps=3), held_out=lambda: calls.append(1) or 0.5).run({})
    log = read_log(tmp_path)["held_out"]
    assert [step for step, value in enumerate(log) if value == 0.5] == [2, 5, 6]
    assert len(calls) == 3


def test_a_line_that_was_cut_is_dropped_and_later_ones_too(tmp_path: Path) -> None:
    log = Log(tmp_path, 0)
    for step in range(4):
        log.write({"step": step, "tokens": 1, "seconds": 1.0, "lr_factor": 1.0, "norm": 1.0, "loss": 1.0})
    log.close()
    with (tmp_path / "log.csv").open("a") as file:
        file.write("4,1,1")
    Log(tmp_path, 3).close()
    assert read_log(tmp_path)["step"] == [0, 1, 2]


def test_a_log_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        read_log(tmp_path)
    (tmp_path / "log.csv").write_text("a,b\n1,2\n")
    with pytest.raises(CheckpointError, match="not the log"):
        read_log(tmp_path)
