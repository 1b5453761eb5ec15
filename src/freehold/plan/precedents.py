"""Runs that somebody measured, as rows to hold beside predictions of the same setup. Torch-free.

A row is of the same setup as a prediction if model, GPU, engine, layout, cache format, drafts (and what they gave) and
the requests in flight are the same, and so are the nominal lengths: benchmarks name a load by them and draw from 75 to
100 percent, or as many tokens on average. Then its means are shown beside the predicted ones, as measured.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from freehold.model.cache_layout import LatentFormat
from freehold.plan.lengths import Lengths
from freehold.plan.measured import Measured, checks, runs
from freehold.plan.search import Candidate
from freehold.plan.types import Engine, Layout, Source
from freehold.plan.workload import Workload

_SPREAD = 0.75  # lowest length over the nominal one, of loads that go by that name
_ALIKE = 0.02  # means, and acceptance lengths, that count as the same


@dataclass(frozen=True)
class Row:
    """Means of one run, in seconds; None where they were not measured. model, gpu: by key."""

    model: str
    gpu: str
    engine: Engine
    layout: Layout
    cache: LatentFormat
    prompt: Lengths
    output: Lengths
    concurrency: int
    drafts: int
    acceptance: float
    ttft: float | None
    tpot: float | None
    source: Source

    def __str__(self) -> str:
        drafts = f", {self.drafts} drafts giving {self.acceptance:g}" if self.drafts else ""
        return (
            f"{self.model}, {self.layout} on {self.gpu}, {self.engine}, {self.cache} cache, "
            f"{self.prompt} tokens in and {self.output} out, {self.concurrency} at a time{drafts}"
        )


def row_of(run: Measured) -> Row:
    setup, load = run.setup, run.workload
    assert load.concurrency is not None
    return Row(
        setup.model.name,
        setup.gpu.key,
        setup.engine,
        _plain(setup.layout),
        setup.cache.latent,
        load.prompt_lengths,
        load.output_lengths,
        load.concurrency,
        load.drafts,
        load.acceptance,
        run.ttft,
        run.tpot,
        run.source,
    )


def published() -> tuple[Row, ...]:
    """Of the runs that come with Freehold, those that it is calibrated with and the others."""
    return tuple(row_of(run) for run in (*runs(), *checks()))


def precedent(rows: Iterable[Row], candidate: Candidate, load: Workload) -> Row | None:
    """The first row of the same setup: one replica of `candidate` under `load`."""
    if load.concurrency is None or load.hits > 0 or load.calls or load.effort != "max":
        return None
    drafts = load.drafts if candidate.mtp else 0
    setup = (candidate.model.name, candidate.gpu.key, candidate.engine, _plain(candidate.layout))
    for row in rows:
        if (row.model, row.gpu, row.engine, row.layout) != setup or row.cache != candidate.footprint.cache.latent:
            continue
        if (row.concurrency, row.drafts) != (load.concurrency, drafts):
            continue
        if drafts and abs(row.acceptance / load.acceptance - 1) > _ALIKE:
            continue
        if _same(row.prompt, load.prompt_lengths) and _same(row.output, load.output_lengths):
            return row
    return None


def _plain(layout: Layout) -> Layout:
    """Without what changes no time: where stages begin, and in one attention group how experts are spread over it."""
    return replace(layout, ep=1, pp=1, cuts=(0,)) if (layout.dp, layout.pp) == (1, 1) else layout


def _same(mine: Lengths, other: Lengths) -> bool:
    if abs(mine.mean / other.mean - 1) <= _ALIKE:
        return True
    return mine.high == other.high and min(mine.low, other.low) >= int(_SPREAD * mine.high)
