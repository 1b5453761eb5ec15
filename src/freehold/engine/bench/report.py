"""What `freehold bench engine` found, and its JSON form, whose names and units stay. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Literal

from freehold.model.cache_layout import IndexFormat, LatentFormat
from freehold.model.traffic import PARTS, Ceilings, Matrix, Part, Traffic, WeightFormat, bound_seconds

SCHEMA = 1
"""Raised when a name in the JSON changes its meaning or goes away; new names may come without."""


@dataclass(frozen=True, slots=True)
class PartTime:
    """One part of a step. seconds: median of the profiled samples; share: of the sum of all parts.

    traffic and bound are None for parts that only handle integers and text. bound_by: what the bound comes from.
    fraction: bound / seconds, so 1 is perfect; above 1 the part's data came from a cache and not from memory.
    """

    part: Part
    seconds: float
    share: float
    bytes: float | None
    flops: float | None
    bound_seconds: float | None
    bound_by: Literal["memory", "compute"] | None
    fraction: float | None


@dataclass(frozen=True, slots=True)
class Scenario:
    """One thing that was measured: a decode step of `batch` requests, or the prefill of one prompt.

    context: positions that a decoding row sees in the middle sample, or the prompt's tokens. context_range: in the
    first and last sample. cache: "random" if it was filled with random values, "computed" if by the model.
    seconds: median without profiling; profiled_seconds: with it, samples taken in turn with the others.
    bound_seconds: the sum of the parts' bounds; fraction: bound_seconds / seconds.
    """

    kind: Literal["decode", "prefill"]
    context: int
    context_range: tuple[int, int]
    batch: int
    cache: Literal["random", "computed"]
    tokens: int
    seconds: float
    tokens_per_second: float
    bound_seconds: float
    bound_tokens_per_second: float
    fraction: float
    profiled_seconds: float
    overhead_seconds: float
    parts: tuple[PartTime, ...]
    samples: tuple[float, ...]
    profiled_samples: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class BenchReport:
    """model: the checkpoint's name. isa: of the native kernels. threads: of the engine, and of the ceilings'
    measurement. formats: how matrices are held in memory; latent and index: how the caches are."""

    model: str
    dtype: str
    ops: str
    isa: str | None
    threads: int
    cpu: str
    formats: Mapping[Matrix, WeightFormat]
    ceilings: Ceilings
    scenarios: tuple[Scenario, ...]
    latent: LatentFormat
    index: IndexFormat

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"schema": SCHEMA, **asdict(self)}


def scenario(
    kind: Literal["decode", "prefill"],
    context_range: tuple[int, int],
    batch: int,
    context: int,
    traffic: Mapping[Part, Traffic],
    ceilings: Ceilings,
    samples: list[float],
    profiled: list[tuple[float, Mapping[Part, float]]],
) -> Scenario:
    """Medians and bounds from samples: seconds of plain steps, and of profiled ones with their parts."""
    seconds, tokens = median(samples), context if kind == "prefill" else batch
    spent = {part: median(parts[part] for _, parts in profiled) for part in PARTS}
    whole = sum(spent.values())
    bound = sum(bound_seconds(each, ceilings) for each in traffic.values())
    profiled_seconds = median(duration for duration, _ in profiled)
    return Scenario(
        kind=kind,
        context=context,
        context_range=context_range,
        batch=batch,
        cache="random" if kind == "decode" else "computed",
        tokens=tokens,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        bound_seconds=bound,
        bound_tokens_per_second=tokens / bound,
        fraction=bound / seconds,
        profiled_seconds=profiled_seconds,
        overhead_seconds=profiled_seconds - seconds,
        parts=tuple(_part(part, spent[part], spent[part] / whole, traffic.get(part), ceilings) for part in PARTS),
        samples=tuple(samples),
        profiled_samples=tuple(duration for duration, _ in profiled),
    )


def _part(part: Part, seconds: float, share: float, traffic: Traffic | None, ceilings: Ceilings) -> PartTime:
    if traffic is None or traffic == Traffic():
        return PartTime(part, seconds, share, None, None, None, None, None)
    bound = bound_seconds(traffic, ceilings)
    by_memory = bound == traffic.bytes / ceilings.bytes_per_second
    fraction = bound / seconds if seconds > 0 else None
    limit: Literal["memory", "compute"] = "memory" if by_memory else "compute"
    return PartTime(part, seconds, share, traffic.bytes, traffic.flops, bound, limit, fraction)
