"""Runs stages: from a model and a corpus to a run's directory with a trained checkpoint in the published layout.

A run's directory has, beside what `loop` keeps there, `model/`: the checkpoint, once the run has ended.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from freehold.errors import CheckpointError, InvalidRequest
from freehold.headers import CheckpointIndex
from freehold.model.chat.template import ChatTemplate
from freehold.model.config import GlmConfig
from freehold.model.glm import Glm
from freehold.model.tokenizer import Tokenizer
from freehold.model.weights import load_weights
from freehold.train import saved
from freehold.train.batches import Batch, Batches, Documents
from freehold.train.corpus import Corpus, Progress, build, corpus_of
from freehold.train.data.example import Example
from freehold.train.initial import initialise
from freehold.train.jsonl import read_chats, split_held_out
from freehold.train.loop import Finished, Loop, StepReport
from freehold.train.objective import TrainingModel
from freehold.train.publish import read_config, write
from freehold.train.recipe import Stage
from freehold.train.shape import with_ends
from freehold.train.tokenizer import generated_tokenizer, train_tokenizer

MODEL_NAME = "model"
_HELD_OUT_TOKENS = 30_000
_HELD_OUT_SHARE = 0.05  # of the user's chats
Report = Callable[[StepReport], None]


@dataclass(frozen=True, slots=True)
class Start:
    """What a run begins with. model: fp32, filled. config: config.json of it. origin: where it is from, for run.json:
    it changes when the weights do."""

    model: Glm
    config: Mapping[str, Any]
    tokenizer: Tokenizer
    origin: str


def from_nothing(config: Mapping[str, Any], tokenizer: Tokenizer, seed: int) -> Start:
    """A model with initial weights, which ends what it says where the tokenizer's turns end."""
    config = with_ends(config, tokenizer)
    model = Glm(GlmConfig.from_dict(config), dtype=torch.float32)
    initialise(model, seed)
    return Start(model, config, tokenizer, f"initial weights, seed {seed}")


def from_directory(directory: Path) -> Start:
    """A run's directory (its weights as trained, fp32) or a checkpoint.

    Raises CheckpointError, ConfigError, and InvalidRequest for a quantised checkpoint or a run that has not ended.
    """
    run = directory / saved.CHECKPOINT_NAME
    files = directory / MODEL_NAME if run.exists() else directory
    if not files.is_dir():
        raise InvalidRequest(f"{directory}: {'its run has not ended' if run.exists() else 'no such directory'}")
    parsed, config = GlmConfig.from_file(files), read_config(files)
    if parsed.quantization is not None:
        raise InvalidRequest(f"{directory}: quantised weights cannot be trained; start from the checkpoint they are of")
    model = Glm(parsed, dtype=torch.float32)
    if run.exists():
        saved.load_into(run, "model", _tensors(model))
    else:
        load_weights(model, files)
    return Start(model, config, Tokenizer.from_dir(files), _identity(run if run.exists() else files))


@dataclass(frozen=True, slots=True)
class Source:
    """What a stage is trained on: the text of files, or chats in JSONL, or generated examples if neither is given."""

    text: tuple[Path, ...] = ()
    chats: tuple[Path, ...] = ()

    def corpora(
        self, directory: Path, stage: Stage, tokenizer: Tokenizer, progress: Progress
    ) -> tuple[Corpus, Corpus | None]:
        """(to train on, held out). Generated ones are kept in `directory`, and read from there when they are there.

        Raises InvalidRequest, beginning with FILE:LINE, for a line that is no chat, and for a file that is not text.
        """
        template = ChatTemplate.builtin()
        if not self.text and not self.chats:
            settings = stage.corpus()
            held_out = replace(settings, split="test", tokens=_HELD_OUT_TOKENS * 2)
            return (
                build(directory / "train", settings, tokenizer, template, progress=progress),
                build(directory / "test", held_out, tokenizer, template),
            )
        texts = [Example("text", text=_read_text(path)) for path in self.text]
        chats = [example for path in self.chats for example in read_chats(path, template)]
        kept, held = split_held_out(chats, _HELD_OUT_SHARE) if len(chats) > 1 else (chats, [])
        made = corpus_of([*texts, *kept], tokenizer, template, progress=progress)
        return made, corpus_of(held, tokenizer, template) if held else None


def new_tokenizer(source: Source, vocab_size: int) -> Tokenizer:
    """A tokenizer for text files, or for generated examples if there are none."""
    if not source.text:
        return generated_tokenizer(ChatTemplate.builtin(), vocab_size)
    return train_tokenizer(map(_read_text, source.text), vocab_size)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidRequest(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise InvalidRequest(f"{path}: not UTF-8 text") from None


def run_stage(
    stage: Stage,
    start: Start,
    corpus: Corpus,
    directory: Path,
    *,
    held_out: Corpus | None = None,
    report: Report | None = None,
) -> Finished:
    """Train `start.model` in place and publish it to `directory`/model. Goes on where the directory was left.

    held_out: a corpus whose loss, on about 30,000 tokens of it, is logged now and then. Raises as `Loop.run` does.
    """
    training = TrainingModel(start.model, stage.objective)
    batches = batches_of(corpus, stage)
    loop = Loop(
        [training, *(training.replica() for _ in range(1, min(stage.accumulate, torch.get_num_threads())))],
        dict(training.parameters()),
        _tensors(start.model),
        batches,
        stage.loop(len(corpus.ids), batches.per_epoch),
        directory,
        held_out=None if held_out is None else held_out_loss(training, batches_of(held_out, stage)),
    )
    about = {"from": start.origin, "stage": asdict(stage), "corpus": digest(corpus), "config": dict(start.config)}
    finished = loop.run(about, report)
    if finished.loss is not None or not (directory / MODEL_NAME).is_dir():
        write(start.model, start.tokenizer, start.config, directory / MODEL_NAME, replace=True)
    return finished


def batches_of(corpus: Corpus, stage: Stage) -> Batches:
    return Batches(
        Documents(corpus.ids, corpus.trained, corpus.starts),
        lengths=stage.lengths,
        tokens=stage.batch_tokens,
        seed=stage.seed,
        prompt_weight=stage.prompt_weight,
    )


def held_out_loss(training: TrainingModel, batches: Batches) -> Callable[[], float]:
    """Gives the mean of the first part of the loss (language, or the indexers' where only they learn) over the first
    batches. Leaves no trace in what `balance` reads."""
    chosen: list[Batch] = []
    while sum(batch.tokens for batch in chosen) < _HELD_OUT_TOKENS and len(chosen) < batches.per_epoch:
        chosen.append(batches[len(chosen)])
    part = "indexer" if training.objective.indexer == "warm-up" else "language"

    def loss() -> float:
        tokens, total = 0, 0.0
        with torch.no_grad():
            for batch in chosen:
                tokens += batch.tokens
                total += batch.tokens * training.losses(batch).parts[part]
        training.ops.loads = {}
        return total / tokens

    return loss


def digest(corpus: Corpus) -> str:
    """SHA-256 of the tokens and of which are trained."""
    found = hashlib.sha256()
    for array in (corpus.ids, corpus.trained, corpus.starts):
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()


def _tensors(model: Glm) -> dict[str, torch.Tensor]:
    """Everything that training may change: weights, and the routers' correction biases."""
    return dict(model.named_parameters())


def _identity(path: Path) -> str:
    """SHA-256 of a run's checkpoint, or of a checkpoint's shards."""
    shards = [path] if path.is_file() else [shard.path for shard in CheckpointIndex.open(path).shards]
    found = hashlib.sha256()
    try:
        for shard in shards:
            with shard.open("rb") as file:
                while data := file.read(1 << 20):
                    found.update(data)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    return json.dumps({"sha256": found.hexdigest()})
