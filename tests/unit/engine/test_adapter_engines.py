"""Engines with adapters: in whatever company and order, each request gets what its merged checkpoint gives it alone."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from freehold import LLM
from freehold.engine.block_manager import root_digest
from freehold.engine.draft_policy import FixedDrafts
from freehold.engine.engine import Engine, EngineConfig
from freehold.engine.loading import EngineOptions, build_engine
from freehold.engine.request import Request
from freehold.engine.runner import ModelRunner
from freehold.engine.step import SeqOutput, StepInput
from freehold.errors import CheckpointError, ConfigError, InvalidRequest, NotFound
from freehold.model.config import GlmConfig
from freehold.types import SamplingParams, TokenChunk
from tests.adapting import ATTENTION, EVERYTHING, matrices, write_adapter, write_merged
from tests.drafting import WORDS, greedy, run, tokens, write_draftable
from tests.native_cases import needs_native

ARMS = (None, "one", "two")
COUNT = 20  # tokens of an answer
SIZES = EngineOptions(
    max_model_len=128, max_num_seqs=4, max_num_batched_tokens=48, block_size=8, cache_bytes=1 << 22, threads=1
)
FP32 = replace(SIZES, dtype="float32", num_draft_tokens=3)
NATIVE = replace(SIZES, num_draft_tokens=3)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose drafts are often right, two adapters, and what each makes of it when merged."""
    made = tmp_path_factory.mktemp("made")
    write_draftable(made / "base")
    write_adapter(made / "one", made / "base", EVERYTHING, seed=1, size=0.1)
    write_adapter(made / "two", made / "base", ATTENTION, seed=2, size=0.3, use_rslora=True)
    for name in ("one", "two"):
        write_merged(made / f"{name}-merged", made / "base", made / name)
    return made


def directory_of(made: Path, arm: str | None) -> Path:
    return made / ("base" if arm is None else f"{arm}-merged")


def serve(made: Path, options: EngineOptions, names: Sequence[str] = ("one", "two")) -> Engine:
    """The base with adapters; how much is drafted does not depend on how long steps take."""
    engine, _ = build_engine(made / "base", replace(options, lora=tuple((name, made / name) for name in names)))
    runner = engine.runner
    assert isinstance(runner, ModelRunner)
    for drafter in (runner.drafter, *(drafter for _, drafter in runner._adapted.values())):
        if drafter is not None:
            drafter.policy = FixedDrafts(3)
    return engine


def prompts(count: int, longest: int = 60) -> list[tuple[int, ...]]:
    """With long beginnings in common: below and above index_topk."""
    draw = random.Random(5)
    text = [draw.randrange(WORDS) for _ in range(longest)]
    lengths = [4 + (23 * i + 7) % (longest - 8) for i in range(count)]
    return [(*text[:length], *(draw.randrange(WORDS) for _ in range(4))) for length in lengths]


def asked(name: str, prompt: Sequence[int], arm: str | None) -> Request:
    """Greedy and seeded by turns."""
    params = SamplingParams(max_tokens=COUNT, temperature=0.7 * (len(prompt) % 2), seed=len(prompt), ignore_eos=True)
    return Request(name, prompt, params, adapter=arm)


def alone(made: Path, options: EngineOptions, wanted: Sequence[tuple[str | None, Sequence[int]]]) -> list[list[int]]:
    """What the merged checkpoints answer to each prompt by itself, without drafts and prefix cache."""
    plain = replace(options, num_draft_tokens=0, enable_prefix_cache=False, max_num_batched_tokens=256)
    engines = {arm: build_engine(directory_of(made, arm), plain)[0] for arm in ARMS}
    return [
        list(tokens(run(engines[arm], [asked(str(n), prompt, None)])[str(n)])) for n, (arm, prompt) in enumerate(wanted)
    ]


def together(engine: Engine, wanted: Sequence[tuple[str | None, Sequence[int]]], seed: int = 0) -> list[list[int]]:
    """All of them, arriving between steps, with preemptions."""
    draw = random.Random(seed)
    found: dict[str, list[int]] = {str(n): [] for n in range(len(wanted))}
    waiting = [asked(str(n), prompt, arm) for n, (arm, prompt) in enumerate(wanted)]
    while waiting or engine.has_work:
        while waiting and (draw.random() < 0.5 or not engine.has_work):
            engine.add(waiting.pop(0))
        if draw.random() < 0.05:
            engine.scheduler.preempt_youngest()
        for chunk in engine.step():
            assert chunk.error is None, chunk.error
            found[chunk.request_id] += chunk.token_ids
        engine.check_integrity()
    return list(found.values())


def everyone(count: int) -> list[tuple[str | None, tuple[int, ...]]]:
    return [(ARMS[(n + n // 3) % 3], prompt) for n, prompt in enumerate(prompts(count))]


def test_any_company_gives_the_tokens_of_the_merged_checkpoints_in_fp32(made: Path) -> None:
    wanted = everyone(18)
    expected, engine = alone(made, FP32, wanted), serve(made, FP32)
    assert together(engine, wanted) == expected
    stats = engine.stats()
    assert stats.prefix_hits > 0
    assert stats.draft_accepted > 0
    assert stats.preemptions > 0
    # The adapters matter: the same prompts without them are answered otherwise.
    plain = alone(made, FP32, [(None, prompt) for _, prompt in wanted])
    changed = [arm for (arm, _), one, other in zip(wanted, expected, plain, strict=True) if one != other]
    assert changed.count("one") > 4
    assert changed.count("two") > 4
    engine.close()


@needs_native
@pytest.mark.parametrize("options", [NATIVE, replace(NATIVE, quantize="int8")])
def test_any_company_gives_the_tokens_of_the_merged_checkpoints_natively(made: Path, options: EngineOptions) -> None:
    """In steps of few rows, which is what is promised there: prompts of up to 12 tokens, four at a time at most."""
    wanted = [(arm, prompt) for arm in ARMS for prompt in prompts(5, longest=12)]
    options = replace(options, max_num_batched_tokens=16)
    engine = serve(made, options)
    assert all(own.run_few is not None and own.mtp_few is not None for own, _ in engine.runner._adapted.values())  # type: ignore[attr-defined]
    assert together(engine, wanted) == alone(made, options, wanted)
    assert engine.stats().draft_accepted > 0
    engine.close()


class SharesAcrossAdapters(Request):
    """A wrong request: the prefix cache is not told of its adapter."""

    __slots__ = ()

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.table.root = root_digest(self.cache_salt)


class FollowsTheFirst(ModelRunner):
    """A wrong runner: computes all of a step with the adapter of its first sequence."""

    def execute(self, step: StepInput) -> list[SeqOutput]:
        own = dict(self._adapter_of)
        first = self._adapter_of.get(step.seqs[0].request_id)
        for seq in step.seqs if first is not None else ():
            self._adapter_of[seq.request_id] = first
        try:
            return super().execute(step)
        finally:
            self._adapter_of = own | {new.request_id: new.adapter for new in step.new if new.adapter is not None}


def test_a_prefix_cache_shared_by_adapters_would_be_seen(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = prompts(24)[17]
    wanted = [(arm, long) for arm in ARMS]
    expected = alone(made, FP32, wanted)
    assert together(serve(made, FP32), wanted) == expected
    monkeypatch.setattr("tests.unit.engine.test_adapter_engines.Request", SharesAcrossAdapters)
    engine = serve(made, FP32)
    assert together(engine, wanted) != expected


def test_a_batch_computed_with_one_adapter_would_be_seen(made: Path) -> None:
    wanted = everyone(12)
    engine = serve(made, FP32)
    engine.runner.__class__ = FollowsTheFirst
    assert together(engine, wanted) != alone(made, FP32, wanted)


def test_one_prompt_and_every_adapter_share_no_block(made: Path) -> None:
    engine = serve(made, FP32)
    prompt = prompts(1)[0] * 2
    for arm in ARMS:
        assert run(engine, [asked("first", prompt, arm)])["first"][-1].usage.cached_tokens == 0
        assert run(engine, [asked("again", prompt, arm)])["again"][-1].usage.cached_tokens > 0


def test_logprobs_and_scored_prompts_are_the_adapters_own(made: Path) -> None:
    prompt = prompts(3)[2]

    def scores(engine: Engine, arm: str | None) -> list[object]:
        request = greedy("r", prompt, 4, logprobs=2, prompt_logprobs=1)
        request.adapter = arm
        chunks: list[TokenChunk] = run(engine, [request])["r"]
        return [chunks[0].prompt_logprobs, *(chunk.logprobs for chunk in chunks)]

    options = replace(FP32, num_draft_tokens=0, max_num_batched_tokens=128)
    engine = serve(made, options)
    for arm in ARMS:
        merged, _ = build_engine(directory_of(made, arm), options)
        assert scores(engine, arm) == scores(merged, None)


def test_from_python(made: Path) -> None:
    prompt, params = prompts(1)[0], SamplingParams(max_tokens=COUNT, temperature=0.0, ignore_eos=True)

    def answers(directory: Path, adapter: str | None, **options: Any) -> list[Any]:
        with LLM(directory, dtype="float32", max_model_len=128, cache_bytes=1 << 22, threads=1, **options) as llm:
            chat = llm.chat([{"role": "user", "content": "hi"}], adapter=adapter, max_tokens=8, temperature=0)
            return [llm.generate(prompt, params, adapter=adapter)[0].text, chat[0].content, chat[0].reasoning]

    found = answers(made / "base", "one", lora={"one": str(made / "one")})
    assert found == answers(made / "one-merged", None)
    assert found != answers(made / "base", None)


def test_totals_by_adapter(made: Path) -> None:
    engine = serve(made, FP32)
    wanted = [("one", prompts(2)[0]), ("one", prompts(2)[1]), (None, prompts(1)[0])]
    together(engine, wanted)
    totals = engine.metrics.adapters
    assert (totals["one"].finished, totals["one"].generation_tokens) == (2, 2 * COUNT)
    assert totals["one"].prompt_tokens == sum(map(len, prompts(2)))
    assert (totals["two"].finished, totals["two"].generation_tokens, totals["two"].prompt_tokens) == (0, 0, 0)
    engine.add(asked("gone", prompts(1)[0], "two"))
    engine.abort("gone")
    engine.step()
    assert (totals["two"].finished, totals["two"].prompt_tokens) == (1, 0)
    assert not engine.metrics._adapter_of
    values = {
        (sample.name, sample.labels["adapter"]): sample.value
        for family in engine.metrics.collect()
        for sample in family.samples
        if "adapter" in sample.labels
    }
    assert values["freehold_adapter_requests_finished_total", "one"] == 2
    assert values["freehold_adapter_generation_tokens_total", "one"] == 2 * COUNT
    assert values["freehold_adapter_prompt_tokens_total", "two"] == 0


def test_what_an_adapter_costs_is_said(made: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "freehold.engine.loading"):
        serve(made, SIZES, ["two"]).close()
    (record,) = caplog.records
    changed = matrices(GlmConfig.from_file(made / "base"), ATTENTION).values()
    num_bytes = sum(2 * outputs * inputs for outputs, inputs in changed)  # in bf16; packing adds nothing to these
    assert record.getMessage() == f"adapter two: rank 4, 45 matrices, {num_bytes:,} bytes beside the model"


def test_names_must_tell_adapters_apart(made: Path) -> None:
    def refused(message: str, *lora: tuple[str, Path], kind: type[Exception] = InvalidRequest) -> None:
        with pytest.raises(kind, match=message):
            build_engine(made / "base", replace(FP32, lora=lora))

    refused("--lora one=.*: each adapter needs a name of its own", ("one", made / "one"), ("one", made / "two"))
    refused("--lora  =.*: each adapter needs a name of its own", (" ", made / "one"))
    refused("--lora base=.*: each adapter needs a name of its own", ("base", made / "one"))
    refused("adapter_config.json: no such file", ("one", made / "base"), kind=CheckpointError)
    with pytest.raises(ConfigError, match="need names of their own"):
        EngineConfig(
            model_name="m", max_model_len=8, num_blocks=1, eos_token_ids=(), vocab_size=8, cache_bytes_per_token=1,
            adapters=("a", "a"),
        )  # fmt: skip


def test_an_adapter_that_is_not_loaded_is_refused(made: Path) -> None:
    engine = serve(made, FP32, ["one"])
    with pytest.raises(NotFound, match="adapter 'two' is not loaded; loaded are: one"):
        engine.add(asked("r", [1, 2, 3], "two"))
    assert not engine.has_work
