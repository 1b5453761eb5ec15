"""Fine-tune a checkpoint on one's own chats, by LoRA or whole, and say what that did to chats it did not see.

A run's directory has what `loop` keeps there, and at the end

    adapter/        of LoRA: the adapter as PEFT saves it, for `freehold serve --lora` and `freehold train merge`
    model/          of a full run: a checkpoint in the published layout, not quantised
    results.json    the settings, and the held-out chats before and after

Given again, a run that was stopped goes on where it was; one that has ended is only measured again.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from freehold.engine.loading import EngineOptions, available_memory
from freehold.errors import InsufficientMemory, InvalidRequest
from freehold.headers import CheckpointIndex
from freehold.model.chat.template import ChatTemplate
from freehold.model.checkpoint_files import write_json
from freehold.model.config import GlmConfig
from freehold.model.glm import Glm
from freehold.model.names import tensor_specs
from freehold.model.tokenizer import Tokenizer
from freehold.model.weights import load_weights
from freehold.train import publish
from freehold.train.batches import Batch, Batches, Documents
from freehold.train.corpus import Corpus, corpus_of
from freehold.train.data.example import Example
from freehold.train.loop import Finished, Loop, LoopSettings, StepReport
from freehold.train.lora import Lora, LoraSettings, adapter_bytes
from freehold.train.measure import Measured, measure
from freehold.train.objective import Losses, Objective, TrainingModel
from freehold.train.optim import Optim
from freehold.train.schedule import Schedule
from freehold.train.stages import digest

Method: TypeAlias = Literal["lora", "full"]
METHODS: tuple[Method, ...] = get_args(Method)
ADAPTER_NAME = "adapter"
MODEL_NAME = "model"
RESULTS_NAME = "results.json"
# Peak rates. LoRA's falls with the width, as what it adds grows: 2e-3 up to a width of 400, 1.3e-4 at GLM-5.2's.
_LORA_RATE, _LORA_RATE_TIMES_WIDTH = 2e-3, 0.8
_FULL_RATE = 2e-4
_SHORTEST_ROW = 128
_MTP_WEIGHT = 0.3

Phase: TypeAlias = Literal["before", "training", "after"]


@dataclass(frozen=True, slots=True)
class FinetuneSettings:
    """epochs: how often every chat is seen. lr: the peak rate; None: what suits the method. batch_tokens: of a step,
    about. longest: tokens of the longest chat that is allowed. held_out: share of the chats that are not trained on."""

    method: Method = "lora"
    lora: LoraSettings = field(default_factory=LoraSettings)
    epochs: float = 10.0
    lr: float | None = None
    batch_tokens: int = 2048
    longest: int = 2048
    held_out: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InvalidRequest(f"method {self.method!r} is not one of {', '.join(METHODS)}", param="method")
        if not (math.isfinite(self.epochs) and self.epochs > 0):
            raise InvalidRequest(f"epochs {self.epochs} must be above 0", param="epochs")
        if self.batch_tokens < 1 or self.longest < 2:
            raise InvalidRequest("batch_tokens must be at least 1, and longest 2")

    def optim(self, hidden_size: int) -> Optim:
        """For a model of this width."""
        suits = min(_LORA_RATE, _LORA_RATE_TIMES_WIDTH / hidden_size) if self.method == "lora" else _FULL_RATE
        return Optim(kind="adamw", lr=suits if self.lr is None else self.lr, decay=0.0)


@dataclass(frozen=True, slots=True)
class Finetuned:
    """artefact: the adapter or the checkpoint. trained_on, held_out: chats. weights: how many were trained. before and
    after are of the held-out chats, None where none were held out."""

    artefact: Path
    method: Method
    trained_on: int
    held_out: int
    weights: int
    finished: Finished
    before: Measured | None
    after: Measured | None

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, without the answers."""

        def figures(measured: Measured | None) -> dict[str, Any] | None:
            if measured is None:
                return None
            facts = asdict(measured)
            facts.pop("answers")
            return {**facts, "perplexity": measured.perplexity, "exact_share": measured.exact_share}

        return {
            "artefact": self.artefact.name,
            "method": self.method,
            "chats_trained_on": self.trained_on,
            "chats_held_out": self.held_out,
            "weights_trained": self.weights,
            "steps": self.finished.steps,
            "tokens": self.finished.tokens,
            "seconds": self.finished.seconds,
            "before": figures(self.before),
            "after": figures(self.after),
        }


@dataclass(frozen=True, slots=True)
class Reports:
    """Called as things get on: with (phase, chats done, chats in all) while measuring, and after each step."""

    measuring: Callable[[Phase, int, int], None] = lambda phase, done, total: None
    step: Callable[[StepReport], None] = lambda report: None


def finetune(
    model: str | Path,
    train: Sequence[Example],
    held_out: Sequence[Example],
    directory: str | Path,
    settings: FinetuneSettings | None = None,
    *,
    options: EngineOptions | None = None,
    reports: Reports | None = None,
) -> Finetuned:
    """Fine-tune the checkpoint `model` on `train` in the run's directory.

    held_out: chats to measure before and after; none skips that. options: of the engine that measures. Quantised
    weights are dequantised to be trained; the adapter fits the quantised checkpoint too. Raises InvalidRequest for a
    chat that is too long, or a directory with another run in it; InsufficientMemory; ConfigError, CheckpointError,
    DiskFull; TrainingFailed.
    """
    settings, reports = settings or FinetuneSettings(), reports or Reports()
    source, directory = Path(model), Path(directory)
    config, tokenizer = GlmConfig.from_file(source), Tokenizer.from_dir(source)
    template = ChatTemplate.from_dir(source).for_tokenizer(tokenizer)
    if not train:
        raise InvalidRequest("there are no chats to train on")
    _check_memory(config, settings)
    corpus = _corpus(train, tokenizer, template, settings)

    def measured(phase: Phase, checkpoint: Path, adapter: Path | None = None) -> Measured | None:
        if not held_out:
            return None

        def progress(done: int, total: int) -> None:
            reports.measuring(phase, done, total)

        return measure(checkpoint, held_out, adapter=adapter, options=options, progress=progress)

    before = measured("before", source)
    weights, finished = _train(source, config, tokenizer, corpus, directory, settings, reports)
    gc.collect()
    if settings.method == "full":
        artefact = directory / MODEL_NAME
        after = measured("after", artefact)
    else:
        artefact = directory / ADAPTER_NAME
        after = measured("after", source, artefact)
    result = Finetuned(artefact, settings.method, len(train), len(held_out), weights, finished, before, after)
    write_json(directory / RESULTS_NAME, {"settings": asdict(settings), **result.as_dict()})
    return result


@dataclass(frozen=True, slots=True)
class _Adapting:
    """What the loop trains: a model whose weights are made of the frozen ones and an adapter, once a pass."""

    training: TrainingModel
    lora: Lora

    def losses(self, batch: Batch) -> Losses:
        with self.lora.once():
            return self.training.losses(batch)

    def balance(self) -> None:
        """The routers' biases are the base model's: they stay."""
        self.training.ops.loads = {}


def _train(
    source: Path,
    config: GlmConfig,
    tokenizer: Tokenizer,
    corpus: Corpus,
    directory: Path,
    settings: FinetuneSettings,
    reports: Reports,
) -> tuple[int, Finished]:
    """(weights trained, how it went); leaves the adapter or the checkpoint in the directory."""
    model = Glm(config, dtype=torch.float32)
    index = load_weights(model, source)
    objective = Objective(mtp_weight=_MTP_WEIGHT if config.has_mtp else 0.0, indexer="sparse", balance_rate=0.0)
    training = TrainingModel(model, objective)
    learner: TrainingModel | _Adapting = training
    parameters: dict[str, nn.Parameter]
    tensors: dict[str, Tensor]
    if settings.method == "lora":
        lora = Lora(model, settings.lora, seed=settings.seed)
        training.ops.teach = False  # indexers are frozen: nothing is to be recorded for them
        learner = _Adapting(training, lora)
        parameters = dict(lora.named_parameters())
        tensors = dict(parameters)
    else:
        parameters = dict(training.parameters())
        tensors = dict(model.named_parameters())
    batches = _batches(corpus, settings)
    steps = max(1, math.ceil(settings.epochs * batches.per_epoch))
    schedule = Schedule(kind="cosine", warmup=0.1, floor=0.05)
    loop_settings = LoopSettings(steps, settings.optim(config.hidden_size), schedule, seed=settings.seed)
    loop = Loop(learner, parameters, tensors, batches, loop_settings, directory)
    about = {"kind": "finetune", "model": _identity(index), "chats": digest(corpus), "finetune": asdict(settings)}
    finished = loop.run(about, reports.step)
    if settings.method == "lora":
        lora.save(directory / ADAPTER_NAME, base=str(source), replace=True)
    else:
        raw = publish.read_config(source)
        raw.pop("quantization_config", None)
        publish.write(model, tokenizer, raw, directory / MODEL_NAME, replace=True)
    return sum(parameter.numel() for parameter in parameters.values()), finished


def _corpus(
    examples: Sequence[Example], tokenizer: Tokenizer, template: ChatTemplate, settings: FinetuneSettings
) -> Corpus:
    """Raises InvalidRequest for chats that are too long, naming how many and the longest."""
    corpus = corpus_of(examples, tokenizer, template)
    lengths = [int(end - start) for start, end in zip(corpus.starts[:-1], corpus.starts[1:], strict=True)]
    too_long = sum(length > settings.longest for length in lengths)
    if too_long:
        raise InvalidRequest(
            f"{too_long} of {len(lengths)} chats have more than {settings.longest} tokens, the longest {max(lengths)}: "
            "shorten them, or allow more, which takes more memory",
            param="longest",
        )
    return corpus


def _batches(corpus: Corpus, settings: FinetuneSettings) -> Batches:
    longest = int((corpus.starts[1:] - corpus.starts[:-1]).max())
    lengths = [_SHORTEST_ROW]
    while lengths[-1] < longest:
        lengths.append(2 * lengths[-1])
    documents = Documents(corpus.ids, corpus.trained, corpus.starts)
    return Batches(
        documents,
        lengths=lengths,
        tokens=max(settings.batch_tokens, lengths[-1]),
        seed=settings.seed,
        prompt_weight=0.0,
    )


def _check_memory(config: GlmConfig, settings: FinetuneSettings) -> None:
    """Raises InsufficientMemory if weights, gradients and the optimiser's state cannot fit, activations not counted."""
    specs = list(tensor_specs(config))
    weights = sum(spec.size for spec in specs)
    if settings.method == "full":
        needed = 16 * weights  # fp32: weight, gradient, two moments
    else:
        changed = sum(spec.size for spec in specs if spec.part in settings.lora.targets)
        needed = 4 * weights + 4 * changed + 4 * adapter_bytes(config, settings.lora)
    available = available_memory()
    if needed > available:
        raise InsufficientMemory(
            f"training needs {needed:,} bytes at least, and {available:,} are available"
            + ("; method lora takes less" if settings.method == "full" else "")
        )


def _identity(index: CheckpointIndex) -> list[list[Any]]:
    """Names, sizes and times of a checkpoint's shards: another one has others."""
    status = [(shard.path.name, shard.path.stat()) for shard in index.shards]
    return [[name, found.st_size, found.st_mtime_ns] for name, found in status]
