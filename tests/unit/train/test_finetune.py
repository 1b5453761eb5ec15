"""Fine-tuning: held-out chats get better, a killed run goes on exactly, and what cannot be done is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from freehold.engine.loading import EngineOptions
from freehold.errors import InsufficientMemory, InvalidRequest
from freehold.headers import CheckpointIndex
from freehold.model.adapters import WEIGHTS_NAME, read_adapter
from freehold.model.config import GlmConfig
from freehold.model.inspect import inspect
from freehold.model.quantize import quantize_checkpoint
from freehold.model.tiny import make_tiny
from freehold.model.weights import read_tensor
from freehold.train import finetune as module
from freehold.train.data.example import Example, assistant, user
from freehold.train.finetune import FinetuneSettings, Reports, finetune
from freehold.train.log import LOG_NAME
from freehold.train.loop import StepReport
from freehold.train.lora import TARGETS, LoraSettings
from freehold.train.measure import measure
from freehold.train.merge import merge_adapter

OPTIONS = EngineOptions(dtype="float32", threads=1, max_model_len=512, cache_bytes=1 << 24)
WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu".split()
CHATS = [Example("x", (user(f"Say {word}."), assistant(f"<<{word}>>"))) for word in WORDS]
TRAIN, HELD = CHATS[:9], CHATS[9:]


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("nano") / "source"
    make_tiny(directory, "nano", seed=5)
    return directory


def settings(method: str = "lora", epochs: float = 12, lr: float = 5e-3) -> FinetuneSettings:
    return FinetuneSettings(
        method=method,  # type: ignore[arg-type]
        lora=LoraSettings(rank=4, targets=TARGETS),
        epochs=epochs,
        lr=lr,
    )


@pytest.mark.parametrize("method", ["lora", "full"])
def test_held_out_chats_become_likelier_and_the_report_is_of_what_was_written(
    nano: Path, tmp_path: Path, method: str
) -> None:
    steps: list[StepReport] = []
    phases: list[str] = []
    reports = Reports(lambda phase, done, total: phases.append(phase), steps.append)
    result = finetune(nano, TRAIN, HELD, tmp_path / "run", settings(method), options=OPTIONS, reports=reports)
    assert result.before is not None
    assert result.after is not None
    assert result.after.loss < 0.8 * result.before.loss
    assert (len(steps), phases[0], phases[-1]) == (12, "before", "after")
    facts = json.loads((tmp_path / "run" / "results.json").read_text())
    assert facts["after"]["loss"] == result.after.loss
    assert facts["settings"]["method"] == method
    if method == "full":
        assert inspect(result.artefact).problems == ()
    else:
        read = read_adapter(result.artefact, GlmConfig.from_file(nano))
        assert read.num_parameters == result.weights
        merge_adapter(nano, result.artefact, tmp_path / "merged")
        assert measure(tmp_path / "merged", HELD, options=OPTIONS) == result.after


def test_lora_leaves_the_checkpoint_alone_and_full_training_leaves_correction_biases(
    nano: Path, tmp_path: Path
) -> None:
    before = {file.name: file.read_bytes() for file in nano.iterdir()}
    finetune(nano, TRAIN, [], tmp_path / "lora", settings("lora", epochs=2))
    result = finetune(nano, TRAIN, [], tmp_path / "full", settings("full", epochs=2))
    assert {file.name: file.read_bytes() for file in nano.iterdir()} == before
    old, new = CheckpointIndex.open(nano), CheckpointIndex.open(result.artefact)
    same = [name for name in old.tensors if torch.equal(read_tensor(old, name), read_tensor(new, name))]
    assert all(name.endswith("e_score_correction_bias") for name in same), same[:3]
    assert len(same) == len([name for name in old.tensors if name.endswith("e_score_correction_bias")])


def test_a_stopped_run_goes_on_to_the_same_adapter(nano: Path, tmp_path: Path) -> None:
    whole = finetune(nano, TRAIN, [], tmp_path / "whole", settings(epochs=6))

    def stop(report: StepReport) -> None:
        if report.step == 3:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        real = module.LoopSettings
        patch.setattr(module, "LoopSettings", lambda *args, **more: real(*args, **more, save_steps=1))
        with pytest.raises(KeyboardInterrupt):
            finetune(nano, TRAIN, [], tmp_path / "cut", settings(epochs=6), reports=Reports(step=stop))
    assert not (tmp_path / "cut" / "adapter").exists()
    resumed = finetune(nano, TRAIN, [], tmp_path / "cut", settings(epochs=6))
    assert (resumed.artefact / WEIGHTS_NAME).read_bytes() == (whole.artefact / WEIGHTS_NAME).read_bytes()
    losses = [_column(tmp_path / name / LOG_NAME, "loss") for name in ("whole", "cut")]
    assert losses[0] == losses[1]


def _column(path: Path, name: str) -> Sequence[str]:
    lines = [line.split(",") for line in path.read_text().splitlines()]
    return [line[lines[0].index(name)] for line in lines[1:]]


def test_answers_that_were_learnt_are_exactly_right_and_others_are_not(nano: Path, tmp_path: Path) -> None:
    few = [*TRAIN[:3], Example("x", (user("Think."), assistant("done", thinking="so")), effort="high")]
    result = finetune(nano, few, few, tmp_path / "run", settings("full", epochs=40), options=OPTIONS)
    assert result.before is not None
    assert result.after is not None
    assert (result.before.exact, result.after.exact) == (0, 4)
    assert result.after.answers[-1] == "done"  # without the thinking
    other = [
        Example("x", (each.messages[0], assistant(f"{each.messages[1]['content']}.")), effort="none") for each in few
    ]
    assert measure(result.artefact, other, options=OPTIONS).exact == 0


def test_another_run_in_the_directory_is_refused(nano: Path, tmp_path: Path) -> None:
    finetune(nano, TRAIN, [], tmp_path / "run", settings(epochs=1))
    for other in (settings(epochs=2), settings(epochs=1, lr=1e-3)):
        with pytest.raises(InvalidRequest, match="other settings"):
            finetune(nano, TRAIN, [], tmp_path / "run", other)
    with pytest.raises(InvalidRequest, match="chats"):
        finetune(nano, TRAIN[:5], [], tmp_path / "run", settings(epochs=1))


def test_a_quantised_checkpoint_gets_an_adapter(nano: Path, tmp_path: Path) -> None:
    quantize_checkpoint(nano, tmp_path / "int8", "int8")
    result = finetune(tmp_path / "int8", TRAIN, HELD, tmp_path / "run", settings(epochs=4), options=OPTIONS)
    assert result.before is not None
    assert result.after is not None
    assert result.after.loss < result.before.loss
    full = finetune(tmp_path / "int8", TRAIN, [], tmp_path / "full", settings("full", epochs=1))
    assert GlmConfig.from_file(full.artefact).quantization is None
    assert inspect(full.artefact).problems == ()


def test_chats_that_are_too_long_are_counted(nano: Path, tmp_path: Path) -> None:
    long = Example("x", (user("word " * 50), assistant("b")))
    tight = FinetuneSettings(longest=40)
    with pytest.raises(InvalidRequest, match=r"2 of 11 chats have more than 40 tokens, the longest \d+"):
        finetune(nano, [*TRAIN, long, long], [], tmp_path / "run", tight)


def test_what_does_not_fit_in_memory_is_refused_before_it_is_loaded(
    nano: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "available_memory", lambda: 15_000_000)
    finetune(nano, TRAIN, [], tmp_path / "lora", settings(epochs=1))
    with pytest.raises(InsufficientMemory, match=r"21,569,024 bytes at least, and 15,000,000.*method lora"):
        finetune(nano, TRAIN, [], tmp_path / "full", settings("full", epochs=1))
    monkeypatch.setattr(module, "available_memory", lambda: 1_000_000)
    with pytest.raises(InsufficientMemory):
        finetune(nano, TRAIN, [], tmp_path / "lora2", settings(epochs=1))


def test_nothing_to_train_on_is_refused(nano: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no chats"):
        finetune(nano, [], HELD, tmp_path / "run")
    for wrong in ({"method": "dora"}, {"epochs": 0}, {"epochs": float("inf")}, {"longest": 1}, {"batch_tokens": 0}):
        with pytest.raises(InvalidRequest):
            FinetuneSettings(**wrong)  # type: ignore[arg-type]


def test_the_rate_of_lora_falls_with_the_width() -> None:
    rates = [FinetuneSettings().optim(width).lr for width in (192, 400, 6144)]
    assert rates[:2] == [2e-3, 2e-3]
    assert rates[2] == pytest.approx(0.8 / 6144)
    assert FinetuneSettings(lr=1e-3).optim(6144).lr == 1e-3
    assert {FinetuneSettings(method="full").optim(width).lr for width in (192, 6144)} == {2e-4}
