"""The runner: what it hands back for each sequence, and that one request's broken numbers stay its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from freehold.engine.runner import ModelRunner
from freehold.engine.sampler import Sampler
from freehold.engine.step import NewRequest, ScheduledSeq, StepInput
from freehold.errors import EngineError
from freehold.model.cache import PagedCache
from freehold.model.config import GlmConfig
from freehold.model.glm import Glm
from freehold.model.sizes import size_config
from freehold.model.tiny import write_random_checkpoint
from freehold.model.weights import load_weights
from freehold.types import SamplingParams

GREEDY = SamplingParams(max_tokens=4, temperature=0.0)
SCORED = SamplingParams(max_tokens=4, temperature=0.0, prompt_logprobs=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Glm:
    directory: Path = tmp_path_factory.mktemp("nano")
    write_random_checkpoint(size_config("nano"), directory, dtype="float32")
    model = Glm(GlmConfig.from_file(directory), dtype=torch.float32).requires_grad_(False)
    load_weights(model, directory)
    return model


def runner_of(model: Glm) -> ModelRunner:
    config = model.config
    cache = PagedCache(config, 8, 64, model.dtype)
    return ModelRunner(model, cache, Sampler(config.vocab_size, config.eos_token_ids, None))


def first_step(params: dict[str, SamplingParams], length: int = 20) -> StepInput:
    new = tuple(NewRequest(name, tuple(range(length)), each) for name, each in params.items())
    seqs = tuple(ScheduledSeq(name, tuple(range(length)), 0, (block,), 0, True) for block, name in enumerate(params))
    return StepInput(1, seqs, new)


def test_each_sequence_gets_what_it_asked_for(model: Glm) -> None:
    plain, scored = runner_of(model).execute(first_step({"plain": GREEDY, "scored": SCORED}))
    assert plain.token_ids == scored.token_ids
    assert plain.prompt_logprobs is None
    assert scored.prompt_logprobs is not None
    assert [score.token_id for score in scored.prompt_logprobs] == list(range(1, 20))


def test_a_chunk_that_ends_before_the_prompt_samples_nothing(model: Glm) -> None:
    runner = runner_of(model)
    chunk = ScheduledSeq("a", tuple(range(12)), 0, (0,), 0, False)
    (output,) = runner.execute(StepInput(1, (chunk,), (NewRequest("a", tuple(range(20)), SCORED),)))
    assert output.token_ids == ()
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == 12


def test_broken_logits_of_a_scored_prompt_fail_that_request_alone(model: Glm, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = model.logits

    def broken(hidden_RH: torch.Tensor) -> torch.Tensor:
        """NaN where a whole prompt is scored; the rows that are sampled are two."""
        return torch.full((len(hidden_RH), 512), torch.nan) if len(hidden_RH) > 2 else logits(hidden_RH)

    monkeypatch.setattr(model, "logits", broken)
    plain, scored = runner_of(model).execute(first_step({"plain": GREEDY, "scored": SCORED}))
    assert isinstance(scored.error, EngineError)
    assert plain.error is None
    assert len(plain.token_ids) == 1
