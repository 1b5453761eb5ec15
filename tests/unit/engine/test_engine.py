"""The engine: steps, failures, totals."""

from __future__ import annotations

import pytest

from freehold.engine.engine import Engine, EngineConfig
from freehold.engine.request import Request
from freehold.engine.step import SeqOutput, StepInput
from freehold.errors import INTERNAL_ERROR, ConfigError, EngineError, InvalidRequest, Unavailable
from freehold.types import FinishReason, SamplingParams


class Echo:
    """Generates 1, 2, 3, … for every request, and remembers what it was told."""

    def __init__(self) -> None:
        self.released: list[str] = []
        self.closed = 0
        self.fail: Exception | None = None

    def execute(self, step: StepInput) -> list[SeqOutput]:
        self.release(step.finished)
        if self.fail is not None:
            raise self.fail
        return [
            SeqOutput(seq.request_id, (seq.start + len(seq.token_ids),) if seq.samples else ()) for seq in step.seqs
        ]

    def release(self, request_ids: tuple[str, ...]) -> None:
        self.released += request_ids

    def close(self) -> None:
        self.closed += 1


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def make(**options: object) -> tuple[Engine, Echo]:
    runner = Echo()
    sizes = {
        "model_name": "m",
        "max_model_len": 100,
        "num_blocks": 16,
        "eos_token_ids": (99,),
        "vocab_size": 100,
        "cache_bytes_per_token": 10,
        "block_size": 4,
    }
    return Engine(EngineConfig(**{**sizes, **options}), runner, clock=Clock()), runner  # type: ignore[arg-type]


def test_runs_to_the_end_and_releases_the_runner() -> None:
    engine, runner = make()
    engine.add(Request("a", [1, 2, 3], SamplingParams(max_tokens=3)))
    chunks = []
    while engine.has_work:
        chunks += engine.step()
    assert [chunk.token_ids for chunk in chunks] == [(3,), (4,), (5,)]
    assert chunks[-1].finish_reason is FinishReason.LENGTH
    assert runner.released == ["a"], "though no step followed"
    assert engine.step() == []
    engine.check_integrity()


def test_an_abort_is_handed_out_by_the_next_step() -> None:
    engine, runner = make()
    engine.add(Request("a", [1], SamplingParams(max_tokens=9)))
    engine.step()
    engine.abort("a")
    engine.abort("nobody")
    assert engine.stats().kv_usage == 0.0
    assert engine.has_work
    [chunk] = engine.step()
    assert chunk.finish_reason is FinishReason.ABORT
    assert not engine.has_work
    assert runner.released == ["a"]


def test_a_failing_runner_ends_everything_and_is_final() -> None:
    engine, runner = make(max_num_seqs=1)
    engine.add(Request("a", [1], SamplingParams(max_tokens=9)))
    engine.add(Request("b", [1], SamplingParams(max_tokens=9)))
    engine.step()
    runner.fail = RuntimeError("out of memory")
    chunks = engine.step()
    assert {chunk.request_id: chunk.finish_reason for chunk in chunks} == {
        "a": FinishReason.ERROR,
        "b": FinishReason.ERROR,
    }
    assert isinstance(engine.failure, EngineError)
    assert engine.failure.message == INTERNAL_ERROR
    assert engine.failure.__cause__ is runner.fail
    assert not engine.has_work
    assert engine.stats().kv_usage == 0.0
    with pytest.raises(Unavailable, match="internal error"):
        engine.add(Request("c", [1], SamplingParams()))


def test_prompt_tokens_must_be_in_the_vocabulary() -> None:
    engine, _ = make()
    for wrong in (100, -1):
        with pytest.raises(InvalidRequest, match=f"token id {wrong} is not in the vocabulary"):
            engine.add(Request("a", [1, wrong, 2], SamplingParams()))
    engine.add(Request("a", [0, 99], SamplingParams()))


def test_close_ends_what_is_left_once() -> None:
    engine, runner = make()
    engine.add(Request("a", [1], SamplingParams(max_tokens=9)))
    engine.step()
    engine.close()
    engine.close()
    assert runner.closed == 1
    assert [chunk.finish_reason for chunk in engine.step()] == [FinishReason.ABORT]
    with pytest.raises(Unavailable, match="closed"):
        engine.add(Request("b", [1], SamplingParams()))


def test_stats() -> None:
    engine, _ = make(max_num_seqs=1)
    for name in "ab":
        engine.add(Request(name, list(range(9)), SamplingParams(max_tokens=2)))
    engine.step()
    stats = engine.stats()
    assert (stats.running, stats.waiting) == (1, 1)
    assert stats.kv_usage == 3 / 16
    assert stats.acceptance_rate is None
    assert stats.acceptance_length is None
    while engine.has_work:
        engine.step()
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.kv_usage) == (0, 0, 0.0)
    assert (stats.prompt_tokens, stats.generation_tokens) == (18, 4)
    assert (stats.prefix_hits, stats.prefix_queries) == (8, 18)
    assert stats.finished[FinishReason.LENGTH] == 2


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_blocks": 0}, "num_blocks = 0"),
        ({"max_queue": -1}, "max_queue = -1"),
        ({"max_num_batched_tokens": 3, "num_draft_tokens": 3}, "max_num_batched_tokens = 3"),
    ],
)
def test_impossible_sizes_are_refused(options: dict[str, int], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        make(**options)
