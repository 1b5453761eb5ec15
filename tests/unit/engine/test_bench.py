"""`freehold bench engine` below the command line: what is measured, to which part time goes, and that nothing stays."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from freehold.engine.batch import BatchBuilder
from freehold.engine.bench import run
from freehold.engine.bench.ceilings import last_level_cache, measure_ceilings
from freehold.engine.bench.clock import PartClock
from freehold.engine.bench.profile import Profiler
from freehold.engine.bench.run import BenchOptions, bench_engine
from freehold.engine.bench.stored import format_of, stored_formats
from freehold.engine.loading import EngineOptions, build_engine
from freehold.engine.request import Request
from freehold.engine.runner import ModelRunner
from freehold.engine.sampler import Sampler
from freehold.engine.step import SeqOutput, StepInput
from freehold.errors import EngineError, InsufficientMemory, InvalidRequest
from freehold.model.cache import PagedCache
from freehold.model.glm import Glm
from freehold.model.latents import Fp8Latents
from freehold.model.ops.reference import ReferenceOps
from freehold.model.tiny import make_tiny
from freehold.model.tokenizer import Tokenizer
from freehold.model.traffic import PARTS, Ceilings, Part, weight_formats
from freehold.types import SamplingParams

CEILINGS = Ceilings(30e9, 400e9)
QUICK = BenchOptions(contexts=(100,), batches=(1, 3), prefills=(50,), samples=4, threads=1)


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "nano"
    make_tiny(directory, "nano")
    return directory


@pytest.fixture(autouse=True)
def known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "measure_ceilings", lambda threads, dtype: CEILINGS)


def silent(tokenizer: Tokenizer) -> Callable[[int], object]:
    return lambda token_id: None


def runner_of(directory: Path) -> ModelRunner:
    engine, _ = build_engine(directory, EngineOptions(cache_bytes=1 << 22, ops="reference", threads=1))
    assert isinstance(engine.runner, ModelRunner)
    return engine.runner


def test_a_report_of_nano(nano: Path) -> None:
    said: list[str] = []
    report = bench_engine(nano, QUICK, silent, say=said.append)
    assert [(s.kind, s.context, s.batch, s.tokens) for s in report.scenarios] == [
        ("decode", 100, 1, 1), ("decode", 100, 3, 3), ("prefill", 50, 1, 50)
    ]  # fmt: skip
    assert said[-1] == "prefill of 50"
    assert report.formats == weight_formats("bf16")
    for scenario in report.scenarios:
        assert [part.part for part in scenario.parts] == list(PARTS)
        assert len(scenario.samples) == len(scenario.profiled_samples) == (4 if scenario.kind == "decode" else 3)
        assert all(part.seconds > 0 for part in scenario.parts), scenario.kind
        assert sum(part.share for part in scenario.parts) == pytest.approx(1)
        bounds = [part.bound_seconds for part in scenario.parts if part.bound_seconds is not None]
        assert scenario.bound_seconds == pytest.approx(sum(bounds))
        assert scenario.fraction == pytest.approx(scenario.bound_seconds / scenario.seconds)
        assert {part.part for part in scenario.parts if part.bound_seconds is None} == {
            "sampling", "scheduler", "tokenizer"
        }  # fmt: skip


def test_steps_are_what_they_are_said_to_be(nano: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every decode has all rows, of which the middle sample sees the context; no prompt of a decode is computed."""
    steps: list[StepInput] = []
    execute = ModelRunner.execute

    def recorded(self: ModelRunner, step: StepInput) -> list[SeqOutput]:
        steps.append(step)
        return execute(self, step)

    monkeypatch.setattr(ModelRunner, "execute", recorded)
    options = BenchOptions(contexts=(100,), batches=(3,), prefills=(), samples=4, threads=1)
    (scenario,) = bench_engine(nano, options, silent).scenarios
    assert len(steps) == options.steps
    assert all(len(step.seqs) == step.num_tokens == 3 for step in steps)
    seen = [step.seqs[0].start + 1 for step in steps[-8:]]
    assert all(seq.start + 1 in seen for step in steps[-8:] for seq in step.seqs)
    assert (seen[0], seen[4], seen[-1]) == (96, 100, 103)
    assert scenario.context_range == (96, 103)
    assert len({step.seqs[0].token_ids for step in steps}) > len(steps) // 2, "the same token again and again"


def test_the_cache_is_filled_where_nothing_was_computed(nano: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[float] = []
    attend = ReferenceOps.sparse_attention

    def recorded(self: ReferenceOps, query: Any, latent: torch.Tensor, slots: torch.Tensor, *rest: Any) -> Any:
        read.append(float(latent[slots[0, :16]].float().std()))
        return attend(self, query, latent, slots, *rest)

    monkeypatch.setattr(ReferenceOps, "sparse_attention", recorded)
    monkeypatch.setattr("freehold.engine.loading.load_ops", lambda *_: ReferenceOps())
    bench_engine(nano, BenchOptions(contexts=(200,), prefills=(), samples=3, threads=1), silent)
    assert all(0.7 < spread < 1.4 for spread in read)


SLOW: list[tuple[type, str, dict[Part, int]]] = [
    (ReferenceOps, "select", {"indexer.select": 4}),
    (ReferenceOps, "linear_fp32", {"indexer.project": 4}),
    (ReferenceOps, "write_cache", {"indexer.project": 4, "attention.write": 8}),
    (ReferenceOps, "sparse_attention", {"attention.attend": 8}),
    (ReferenceOps, "absorb", {"attention.attend": 8}),
    (ReferenceOps, "route", {"router": 5}),
    (ReferenceOps, "experts", {"experts": 5}),
    (ReferenceOps, "swiglu", {"mlp": 8}),
    (ReferenceOps, "rms_norm", {"norms": 17, "attention.project": 8}),
    (Glm, "logits", {"head": 1}),
    (Sampler, "sample", {"sampling": 1}),
    (BatchBuilder, "build", {"scheduler": 1}),
]


@pytest.mark.parametrize(("owner", "name", "expected"), SLOW, ids=[name for _, name, _ in SLOW])
def test_time_goes_to_the_part_that_spends_it(
    owner: type, name: str, expected: dict[Part, int], nano: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One slow operation at a time, in a decode step of nano: 8 layers, 4 of them full, 3 dense."""
    nap, usual = 0.004, getattr(owner, name)

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(nap)
        return usual(*args, **kwargs)

    engine, _ = build_engine(nano, EngineOptions(cache_bytes=1 << 22, ops="reference", threads=1))
    assert isinstance(engine.runner, ModelRunner)
    engine.add(Request("a", range(40), SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)))
    engine.step()  # the prompt
    engine.step()
    monkeypatch.setattr(owner, name, slow)
    profiler = Profiler(engine.runner)
    started = time.perf_counter()
    profiler.start()
    engine.step()
    parts = profiler.stop()
    for part, calls in expected.items():
        assert parts[part] >= calls * nap, part
    assert sum(parts.values()) <= time.perf_counter() - started


def test_profiling_changes_no_token_and_leaves_nothing(nano: Path) -> None:
    found = []
    for profiled in (False, True):
        engine, _ = build_engine(nano, EngineOptions(cache_bytes=1 << 22, threads=1))
        assert isinstance(engine.runner, ModelRunner)
        engine.add(Request("a", range(40), SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)))
        profiler = Profiler(engine.runner)
        tokens: list[int] = []
        while engine.has_work:
            if profiled:
                profiler.start()
            for chunk in engine.step():
                tokens += chunk.token_ids
            if profiled:
                profiler.stop()
        found.append(tokens)
        runner = engine.runner
        for owner in (runner, runner.batches, runner.sampler, runner.model.ops, *runner.model.modules()):
            assert not [name for name, value in vars(owner).items() if getattr(value, "__name__", "") == "timed"]
    assert found[0] == found[1]
    assert len(found[0]) == 8


def test_a_native_clock_says_where_a_fused_operation_spent_its_time(
    nano: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def profile_parts(self: ReferenceOps) -> dict[str, float]:
        nonlocal calls
        calls += 1
        return {"router": 1.0, "mlp": 3.0}  # of whatever operation it was, a quarter and three quarters

    monkeypatch.setattr(ReferenceOps, "profile_parts", profile_parts, raising=False)
    runner = runner_of(nano)
    profiler = Profiler(runner)
    profiler.start()
    assert calls == 1
    with torch.inference_mode():
        runner.model.ops.linear(torch.zeros(64, 256), torch.zeros(256, 256))
    parts = profiler.stop()
    assert calls == 2
    assert parts["router"] > 0
    assert parts["mlp"] == pytest.approx(3 * parts["router"])


def test_8_bit_caches_are_filled_and_counted(nano: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled: list[bool] = []
    read = Fp8Latents.rows

    def recorded(self: Fp8Latents, slots: torch.Tensor, *rest: Any) -> torch.Tensor:
        rows = read(self, slots, *rest)
        filled.append(bool(rows.isfinite().all()) and 0.5 < float(rows.float().std()) < 2.0)
        return rows

    monkeypatch.setattr(Fp8Latents, "rows", recorded)
    monkeypatch.setattr("freehold.engine.loading.load_ops", lambda *_: ReferenceOps())
    plain = BenchOptions((200,), prefills=(), samples=3, threads=1)
    reports = [
        bench_engine(nano, options, silent)
        for options in (plain, replace(plain, index_cache="fp8", latent_cache="fp8"))
    ]
    assert (reports[1].latent, reports[1].index) == ("fp8_ds_mla", "fp8")
    assert filled
    assert all(filled)
    before, after = ({part.part: part.bytes or 0 for part in report.scenarios[0].parts} for report in reports)
    for part in ("attention.attend", "attention.write", "indexer.select"):
        assert 0 < after[part] < before[part]


def test_lost_time_is_noticed(nano: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = PartClock.stop
    monkeypatch.setattr(PartClock, "stop", lambda self: stop(self) | {"attention.project": 0.0})
    with pytest.raises(EngineError, match="lost or counted twice"):
        bench_engine(nano, QUICK, silent)


def test_formats_of_what_is_loaded(nano: Path) -> None:
    runner = runner_of(nano)
    assert stored_formats(runner).latent == stored_formats(runner).index == "bf16"
    runner.cache = PagedCache(runner.model.config, 1, 16, torch.bfloat16, index_cache="fp8", latent_cache="fp8")
    assert (stored_formats(runner).latent, stored_formats(runner).index) == ("fp8_ds_mla", "fp8")

    class Packed:
        kind = "int4"

    assert format_of(Packed()) == "int4"
    with pytest.raises(EngineError, match="float16"):
        format_of(torch.zeros(2, dtype=torch.float16))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (BenchOptions(contexts=(1 << 20,)), "--context 1048576"),
        (BenchOptions(prefills=(1 << 20,)), "--prefill 1048576"),
        (BenchOptions(batches=(0,)), "--batch 0"),
        (BenchOptions(batches=(1025,)), "--batch 1025"),
        (BenchOptions(contexts=(), prefills=()), "nothing to measure"),
    ],
)
def test_refusals(options: BenchOptions, message: str, nano: Path) -> None:
    with pytest.raises(InvalidRequest, match=message):
        bench_engine(nano, options, silent)


def test_the_first_token_may_be_one_that_ends(nano: Path, tmp_path: Path) -> None:
    shutil.copytree(nano, tmp_path / "model")
    raw = json.loads((nano / "config.json").read_text()) | {"eos_token_id": [0]}
    (tmp_path / "model" / "config.json").write_text(json.dumps(raw))
    options = BenchOptions(contexts=(20,), prefills=(), samples=3, threads=1)
    assert len(bench_engine(tmp_path / "model", options, silent).scenarios) == 1


def test_a_cache_that_does_not_fit_is_refused(nano: Path) -> None:
    with pytest.raises(InsufficientMemory):
        bench_engine(nano, BenchOptions(contexts=(1_000_000,), batches=(1000,), prefills=()), silent)


def test_ceilings_of_this_machine() -> None:
    before = torch.get_num_threads()
    found = measure_ceilings(1, torch.bfloat16, 1 << 24)
    assert 1e8 < found.bytes_per_second < 1e13
    assert 1e8 < found.flops_per_second < 1e15
    assert torch.get_num_threads() == before
    assert last_level_cache() >= 0
    with pytest.raises(InsufficientMemory, match="bandwidth"):
        measure_ceilings(1, torch.bfloat16, 1 << 60)
    assert math.isfinite(found.flops_per_second)
