"""Stages on a small real model: the three kinds, exact resume, what a run leaves, and what it starts from."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from freehold.errors import InvalidRequest
from freehold.model.chat.template import ChatTemplate
from freehold.model.glm import Glm
from freehold.train.corpus import Corpus, corpus_of
from freehold.train.data.example import Example
from freehold.train.log import read_log
from freehold.train.loop import StepReport
from freehold.train.objective import Objective
from freehold.train.optim import Optim
from freehold.train.recipe import Stage
from freehold.train.schedule import Schedule
from freehold.train.stages import Source, Start, from_directory, from_nothing, run_stage
from tests.unit.train.small import small_config, small_corpus, small_stage, small_tokenizer

WARM_UP = small_stage("indexer", Objective(mtp_weight=0.0, indexer="warm-up"))
SPARSE = small_stage("sft", Objective(indexer="sparse"), prompt_weight=0.1)


def fresh() -> Start:
    return from_nothing(small_config(), small_tokenizer(), 0)


def figures(directory: Path) -> list[tuple[float, ...]]:
    log = read_log(directory)
    return list(zip(log["step"], log["tokens"], log["norm"], log["loss"], log["language"], strict=True))


def interrupt_after(step: int) -> Callable[[StepReport], None]:
    def report(made: StepReport) -> None:
        if made.step == step:
            signal.raise_signal(signal.SIGINT)

    return report


def weights(model: Glm) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trained") / "run"
    run_stage(small_stage(), fresh(), small_corpus(), directory)
    return directory


def test_a_run_learns_and_leaves_a_checkpoint_that_loads(trained: Path) -> None:
    log = read_log(trained)
    assert sum(log["language"][-2:]) < sum(log["language"][:2]) - 0.5
    kept, published = from_directory(trained), from_directory(trained / "model")
    assert json.loads((trained / "model" / "config.json").read_text())["hidden_size"] == 48
    for name, weight in published.model.named_parameters():
        as_trained = dict(kept.model.named_parameters())[name]
        as_stored = as_trained if name.endswith("correction_bias") else as_trained.to(torch.bfloat16).float()
        assert torch.equal(weight, as_stored), name
    assert kept.origin != published.origin


@pytest.mark.parametrize("stage", [small_stage(), WARM_UP, SPARSE], ids=lambda stage: stage.name)
def test_a_stage_that_was_interrupted_goes_on_exactly(stage: Stage, tmp_path: Path, trained: Path) -> None:
    """With held-out losses on the way, which leave no trace in what balances the experts."""

    def start() -> Start:
        return fresh() if stage.name == "pretrain" else from_directory(trained)

    whole, parts, unwatched = start(), start(), start()
    run_stage(stage, whole, small_corpus(), tmp_path / "whole", held_out=small_corpus(1))
    with pytest.raises(KeyboardInterrupt):
        run_stage(stage, parts, small_corpus(), tmp_path / "parts", held_out=small_corpus(1), report=interrupt_after(3))
    assert not (tmp_path / "parts" / "model").exists()
    again = start()
    run_stage(stage, again, small_corpus(), tmp_path / "parts", held_out=small_corpus(1))
    assert figures(tmp_path / "parts") == figures(tmp_path / "whole")
    run_stage(stage, unwatched, small_corpus(), tmp_path / "unwatched")
    assert figures(tmp_path / "unwatched") == figures(tmp_path / "whole")
    for name, weight in weights(whole.model).items():
        assert torch.equal(weight, dict(again.model.named_parameters())[name]), name
        assert torch.equal(weight, dict(unwatched.model.named_parameters())[name]), name


def test_a_warm_up_moves_indexers_only_and_a_sparse_stage_everything(tmp_path: Path, trained: Path) -> None:
    before = weights(from_directory(trained).model)
    for stage, moves in ((WARM_UP, lambda name: ".indexer." in name), (SPARSE, lambda name: True)):
        start = from_directory(trained)
        run_stage(stage, start, small_corpus(), tmp_path / stage.name)
        moved = {name for name, weight in weights(start.model).items() if not torch.equal(weight, before[name])}
        expected = {name for name in before if moves(name)}
        assert moved == expected, sorted(moved ^ expected)


def test_a_batch_can_be_learned_by_heart(tmp_path: Path) -> None:
    text = "The grey cat of Mira sleeps on the roof of the old mill, and 17 mice dance below until it wakes."
    corpus = corpus_of([Example("text", text=text)], small_tokenizer(), ChatTemplate.builtin())
    tokens = 120 * len(corpus.ids)
    stage = small_stage(
        objective=Objective(indexer="sparse"), tokens=tokens, lengths=(64, 128), batch_tokens=128,
        schedule=Schedule("cosine"), optim=Optim(lr=1e-2, decay=0.0),
    )  # fmt: skip
    run_stage(stage, fresh(), corpus, tmp_path)
    log = read_log(tmp_path)
    assert log["language"][0] > 5
    assert log["language"][-1] < 0.05
    assert log["mtp"][-1] < 0.2


def test_a_run_of_another_corpus_stage_or_start_is_not_continued(trained: Path) -> None:
    with pytest.raises(InvalidRequest, match="corpus"):
        run_stage(small_stage(), fresh(), small_corpus(5), trained)
    with pytest.raises(InvalidRequest, match="prompt_weight"):
        run_stage(small_stage(prompt_weight=0.5), fresh(), small_corpus(), trained)
    with pytest.raises(InvalidRequest, match="from"):
        run_stage(small_stage(), from_nothing(small_config(), small_tokenizer(), 1), small_corpus(), trained)


def test_a_run_that_has_not_ended_and_no_directory_are_refused_as_a_start(tmp_path: Path) -> None:
    stage = small_stage()
    with pytest.raises(KeyboardInterrupt):
        run_stage(stage, fresh(), small_corpus(), tmp_path, report=interrupt_after(1))
    with pytest.raises(InvalidRequest, match="not ended"):
        from_directory(tmp_path)
    with pytest.raises(InvalidRequest, match="no such directory"):
        from_directory(tmp_path / "nothing")


def test_generated_data_is_kept_and_held_out_data_is_other(tmp_path: Path) -> None:
    stage = replace(small_stage(), mixture={"retrieval": 1.0})
    progress: list[tuple[int, int]] = []
    one, held = Source().corpora(tmp_path, stage, small_tokenizer(), lambda done, total: progress.append((done, total)))
    assert progress[-1][0] >= 3000
    count = len(progress)
    again, _ = Source().corpora(tmp_path, stage, small_tokenizer(), lambda done, total: progress.append((done, total)))
    assert len(progress) == count  # read, not made
    assert (one.ids == again.ids).all()
    assert held is not None
    assert not set(documents(one)) & set(documents(held))


def documents(corpus: Corpus) -> list[bytes]:
    return [corpus.document(i)[0].tobytes() for i in range(len(corpus))]


def test_text_files_and_chats_are_sources(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Some text of the user's.\n", encoding="utf-8")
    answer = {"role": "assistant", "content": "Yes."}
    chats = [{"messages": [{"role": "user", "content": f"Number {n}?"}, answer]} for n in range(40)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    tokenizer = small_tokenizer()
    text, none = Source(text=(tmp_path / "a.txt",)).corpora(tmp_path, small_stage(), tokenizer, lambda *_: None)
    assert none is None
    assert "Some text of the user's." in tokenizer.decode([int(i) for i in text.ids])
    kept, held = Source(chats=(tmp_path / "chats.jsonl",)).corpora(tmp_path, small_stage(), tokenizer, lambda *_: None)
    assert held is not None
    assert len(kept) + len(held) == 40


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidRequest, match="not UTF-8"):
        Source(text=(tmp_path / "binary",)).corpora(tmp_path, small_stage(), small_tokenizer(), lambda *_: None)
    with pytest.raises(InvalidRequest, match="No such file"):
        Source(text=(tmp_path / "none",)).corpora(tmp_path, small_stage(), small_tokenizer(), lambda *_: None)
