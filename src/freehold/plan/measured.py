"""Runs that somebody measured: the bundled ones, and results of load generators. Torch-free.

A `Measured` is a setup, a load, and what came of it. Bundled ones are in `calibration.toml`, in groups that share
hardware and precision. `read_results` takes one's own: AIPerf's or vLLM bench's JSON, which say what was sent but not
to what, so the setup is given beside them.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from freehold.errors import InvalidRequest
from freehold.plan.footprint import footprint
from freehold.plan.hardware import gpu
from freehold.plan.lengths import Lengths
from freehold.plan.models import load
from freehold.plan.roofline import Efficiencies, StepTimes
from freehold.plan.simulate import EngineLimits, Loop, Run, simulate
from freehold.plan.types import CacheFormat, Engine, Gpu, Layout, ModelSpec, Source
from freehold.plan.workload import Workload

_PER_CALLER = 10  # requests of a run for each caller, in InferenceX
_SPREAD = 0.8  # shortest length over nominal there
_MOST_BYTES = 1 << 28


@dataclass(frozen=True)
class Setup:
    """What was measured. group: runs that are left out together. fraction, chunk: as the engine was told."""

    group: str
    model: ModelSpec
    gpu: Gpu
    engine: Engine
    layout: Layout
    cache: CacheFormat
    fraction: float
    chunk: int

    def times(self, drafts: int) -> StepTimes:
        return StepTimes(self.model, self.gpu, self.layout, self.engine, self.cache, drafts=drafts)

    def limits(self, drafts: int) -> EngineLimits:
        room = footprint(
            self.model,
            self.gpu,
            self.layout,
            self.engine,
            cache=self.cache,
            mtp=drafts > 0,
            fraction=self.fraction,
        )
        return EngineLimits(self.chunk, room.cache_tokens * self.layout.dp)


@dataclass(frozen=True)
class Measured:
    """A run and its means, in seconds; None where the source gives none. requests: sent in all."""

    setup: Setup
    workload: Workload
    requests: int
    ttft: float | None
    tpot: float | None
    source: Source

    @property
    def name(self) -> str:
        load = self.workload
        return f"{self.setup.group}, {load.prompt_lengths.high}/{load.output_lengths.high} x {load.concurrency}"

    def simulate(self, efficiencies: Efficiencies) -> Run:
        """The same run with the planner's clock: from the burst at its beginning to its last answer."""
        load = self.workload
        loop = Loop(load.draw(self.requests), concurrency=load.concurrency, acceptance=load.acceptance)
        return simulate(self.setup.times(load.drafts), efficiencies, loop, self.setup.limits(load.drafts))


@cache
def table() -> Mapping[str, Any]:
    return tomllib.loads(resources.files("freehold.plan").joinpath("calibration.toml").read_text(encoding="utf-8"))


@cache
def runs() -> tuple[Measured, ...]:
    """The runs that the bundled efficiencies are fitted to."""
    return _runs("groups")


@cache
def checks() -> tuple[Measured, ...]:
    """Runs that nothing is fitted to."""
    return _runs("checks")


def _runs(kind: str) -> tuple[Measured, ...]:
    made = []
    for group in table()[kind]:
        setup = Setup(
            group["name"],
            load(group["model"]),
            gpu(group["gpu"]),
            group["engine"],
            Layout(tp=group["tp"]),
            CacheFormat(group["cache"], all_layers=group.get("all_layers", False)),
            group["fraction"],
            group["chunk"],
        )
        source = Source(**table()["sources"][group["source"]])
        spread, each = group.get("spread", _SPREAD), group.get("per_caller", _PER_CALLER)
        for prompt, output, concurrency, ttft, tpot in group["rows"]:
            workload = Workload(
                Lengths(int(prompt * spread), prompt),
                Lengths(int(output * spread), output),
                concurrency,
                drafts=group.get("drafts", 0),
                acceptance_length=group.get("acceptance"),
            )
            seen = [value / 1e3 if value else None for value in (ttft, tpot)]
            made.append(Measured(setup, workload, each * concurrency, seen[0], seen[1], source))
    return tuple(made)


# ── own runs ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_results(path: str | Path, setup: Setup, *, drafts: int = 0, acceptance: float | None = None) -> Measured:
    """A run of one's own: AIPerf's `profile_export_aiperf.json`, or what `vllm bench serve` or SGLang's bench saves.

    Only closed loops of one turn can be compared. Raises InvalidRequest naming what is missing.
    """
    path = Path(path)
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise InvalidRequest(f"{path}: larger than {_MOST_BYTES:,} bytes; give the summary", param="results")
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"{path}: not readable as JSON: {error}", param="results") from None
    if not isinstance(document, Mapping):
        raise InvalidRequest(f"{path}: expected a JSON object", param="results")
    numbers = _aiperf(path, document) if "time_to_first_token" in document else _bench(path, document)
    concurrency, requests = round(numbers["concurrency"]), round(numbers["requests"])
    workload = Workload(
        _fixed(numbers["prompt"]),
        _fixed(numbers["output"]),
        concurrency,
        drafts=drafts,
        acceptance_length=acceptance,
    )
    if drafts and acceptance is None:
        raise InvalidRequest("a run with drafts needs its acceptance length: the same head gives from 1.6 to 6")
    named = replace(setup, group=setup.group or path.name)
    return Measured(named, workload, requests, numbers["ttft"], numbers["tpot"], Source(str(path), "own run"))


def _fixed(mean: float) -> Lengths:
    tokens = max(1, round(mean))
    return Lengths(tokens, tokens)


def _aiperf(path: Path, document: Mapping[str, Any]) -> dict[str, float]:
    """AIPerf's metrics are objects with a unit and statistics; its input is in input_config."""
    names = {
        "ttft": "time_to_first_token",
        "tpot": "inter_token_latency",
        "prompt": "input_sequence_length",
        "output": "output_sequence_length",
        "requests": "request_count",
    }
    found = {}
    for name, metric in names.items():
        entry = document.get(metric)
        value = entry.get("avg") if isinstance(entry, Mapping) else None
        found[name] = _number(path, f"{metric}.avg", value)
        if name in ("ttft", "tpot") and isinstance(entry, Mapping) and entry.get("unit") == "ms":
            found[name] /= 1e3
    found["concurrency"] = _number(path, "concurrency", _find(document.get("input_config"), "concurrency"))
    return found


def _find(value: Any, key: str) -> Any:
    """The first number under `key`, however deep."""
    if isinstance(value, Mapping):
        if isinstance(value.get(key), int | float):
            return value[key]
        return next((found for inner in value.values() if (found := _find(inner, key)) is not None), None)
    if isinstance(value, list):
        return next((found for inner in value if (found := _find(inner, key)) is not None), None)
    return None


def _bench(path: Path, document: Mapping[str, Any]) -> dict[str, float]:
    """`vllm bench serve` and `sglang.bench_serving`: flat, in milliseconds."""
    completed = _number(path, "completed", document.get("completed"))
    return {
        "ttft": _number(path, "mean_ttft_ms", document.get("mean_ttft_ms")) / 1e3,
        "tpot": _number(path, "mean_tpot_ms", document.get("mean_tpot_ms")) / 1e3,
        "prompt": _number(path, "total_input_tokens", document.get("total_input_tokens")) / completed,
        "output": _number(path, "total_output_tokens", document.get("total_output_tokens")) / completed,
        "requests": completed,
        "concurrency": _number(path, "max_concurrency", document.get("max_concurrency")),
    }


def _number(path: Path, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise InvalidRequest(
            f"{path}: {name} = {value!r}; expected a result of AIPerf, vllm bench serve or sglang.bench_serving for a "
            "closed loop (with a maximum concurrency)",
            param="results",
        )
    return float(value)
