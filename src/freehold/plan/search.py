"""Which layouts to choose: candidates by memory and support, their speed and cost, and what no other beats. Torch-free.

    found = search(model, cluster, ("vllm", "sglang"), slo, speed_of, cost_of)
    found.best, found.front, found.unknown

The speed model and the cost model are functions that are passed in, so each can be replaced in a test:

    speed_of(candidate)         one replica under its share of the load (`candidate.replicas` says how many share it)
    cost_of(candidate, speed)   the whole deployment

An engine that is not known to run the model on this hardware is never recommended: what merely fits is in `unknown`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from freehold.errors import InvalidRequest
from freehold.plan.footprint import footprint, refuse
from freehold.plan.layouts import Support, engines, layouts, support
from freehold.plan.types import CacheFormat, Cluster, Cost, Engine, Footprint, Gpu, Layout, ModelSpec, Speed

SpeedOf = Callable[["Candidate"], Speed]
CostOf = Callable[["Candidate", Speed], Cost]


@dataclass(frozen=True, slots=True)
class Candidate:
    """`replicas` copies of one layout, all of one engine. mtp: whether drafts are used."""

    model: ModelSpec
    gpu: Gpu
    engine: Engine
    layout: Layout
    footprint: Footprint
    support: Support
    replicas: int
    mtp: bool

    @property
    def gpus(self) -> int:
        return self.layout.gpus * self.replicas

    def __str__(self) -> str:
        drafts = " with MTP" if self.mtp else ""
        copies = f"{self.replicas} x " if self.replicas > 1 else ""
        return f"{copies}{self.layout} on {self.gpus} {self.gpu.name}, {engines()[self.engine].name}{drafts}"


@dataclass(frozen=True, slots=True)
class Option:
    """A candidate with what it does and costs."""

    candidate: Candidate
    speed: Speed
    cost: Cost

    @property
    def objectives(self) -> tuple[float, float, float]:
        """What is to be small: dollars a million output tokens and their prompts, seconds a token, to the first one.

        To nine digits: options that differ in the order of some sums must count as equal.
        """
        figures = (self.cost.per_mtok_whole, self.speed.tpot.p90, self.speed.ttft.p90)
        cost, tpot, ttft = (float(f"{figure.value:.9g}") for figure in figures)
        return cost, tpot, ttft


@dataclass(frozen=True, slots=True)
class Unknown:
    """A candidate that fits memory and that no engine is known to run. why: in a few words, with the source."""

    candidate: Candidate
    why: str


@dataclass(frozen=True, slots=True)
class Found:
    """What a search found.

    options: everything that was evaluated, the cheapest first; those that meet the SLOs before those that do not.
    front: options of which no other is at least as good in all objectives, among those that meet the SLOs if any do.
    best: the cheapest option that meets the SLOs, None if none does.
    too_large: layouts that do not fit memory.
    """

    options: tuple[Option, ...]
    front: tuple[Option, ...]
    best: Option | None
    unknown: tuple[Unknown, ...]
    too_large: int


def candidates(
    model: ModelSpec,
    cluster: Cluster,
    wanted: Sequence[Engine],
    *,
    drafts: Sequence[bool] = (False, True),
    cache: CacheFormat | None = None,
    context: int = 1,
) -> tuple[list[Candidate], list[Unknown], int]:
    """What may run, what merely fits, and how many layouts are too large.

    drafts: with and without MTP to try. cache: instead of each engine's own. context: tokens that one sequence must
    have room for. Every candidate fills the cluster with replicas. Raises InsufficientMemory if nothing fits at all,
    with what would.
    """
    weights = model.total_bytes
    run: list[Candidate] = []
    fit: list[Unknown] = []
    too_large = 0
    for engine in wanted:
        known = support(engine, cluster.gpu, model)
        for mtp in drafts:
            if mtp and not known.mtp:
                continue
            for layout in layouts(model, cluster, engine):
                if weights > layout.gpus * cluster.gpu.memory:
                    too_large += 1
                    continue
                memory = footprint(model, cluster.gpu, layout, engine, cache=cache, mtp=mtp)
                if memory.cache_tokens < context:
                    too_large += 1
                    continue
                copies = cluster.gpus // layout.gpus
                made = Candidate(model, cluster.gpu, engine, layout, memory, known, copies, mtp)
                why = _why_not(known, layout, cache, mtp=mtp)
                if why is None:
                    run.append(made)
                else:
                    fit.append(Unknown(made, why))
    if not run and not fit:
        raise refuse(model, cluster, wanted[0], context=context)
    return run, fit, too_large


def search(
    model: ModelSpec,
    cluster: Cluster,
    wanted: Sequence[Engine],
    speed_of: SpeedOf,
    cost_of: CostOf,
    *,
    drafts: Sequence[bool] = (False, True),
    cache: CacheFormat | None = None,
    context: int = 1,
    fewer: bool = True,
    screen: Callable[[Candidate], float] | None = None,
    limit: int = 24,
    keep: Callable[[Candidate], bool] = lambda _: False,
) -> Found:
    """Evaluate every candidate; where an engine has more than `limit` with or without drafts, the best by `screen`.

    screen: a quick estimate, small is good. keep: whether a candidate is evaluated however it is screened.
    fewer: use only as many replicas as the SLOs need at this load; otherwise always all GPUs.
    """
    run, fit, too_large = candidates(model, cluster, wanted, drafts=drafts, cache=cache, context=context)
    if screen is not None:
        groups: dict[tuple[Engine, bool], list[Candidate]] = {}
        for made in run:
            groups.setdefault((made.engine, made.mtp), []).append(made)
        ranked = [sorted(group, key=screen) for group in groups.values()]
        run = [made for group in ranked for at, made in enumerate(group) if at < limit or keep(made)]
    options = [_evaluate(made, speed_of, cost_of, fewer) for made in run]
    options.sort(key=lambda option: (not option.speed.meets_slo, option.objectives))
    meeting = [option for option in options if option.speed.meets_slo]
    front = pareto(meeting or options)
    return Found(tuple(options), tuple(front), meeting[0] if meeting else None, tuple(fit), too_large)


def pareto(options: Iterable[Option]) -> list[Option]:
    """Those of which no other is at least as small in all objectives and smaller in one; the cheapest first."""
    left = sorted(options, key=lambda option: option.objectives)
    front: list[Option] = []
    for option in left:
        mine = option.objectives
        if not any(
            all(a <= b for a, b in zip(other.objectives, mine, strict=True)) and other.objectives != mine
            for other in left
        ):
            front.append(option)
    return front


@dataclass(frozen=True, slots=True)
class Point:
    """The best option with one assumption changed to `value`. changed: it is another than without the change."""

    value: float
    option: Option | None
    changed: bool


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """How the answer depends on one assumption: its points in order of the value."""

    name: str
    points: tuple[Point, ...]

    @property
    def spread(self) -> float:
        """Highest over lowest cost a million output tokens; 1 where there are fewer than two answers."""
        costs = [point.option.cost.per_mtok_whole.value for point in self.points if point.option is not None]
        return max(costs) / min(costs) if len(costs) > 1 and min(costs) > 0 else 1.0


def sensitivity(
    knobs: Mapping[str, Sequence[float]], base: Option, solve: Callable[[str, float], Option | None]
) -> list[Sensitivity]:
    """Solve again for every value of every assumption; what the answer depends on most comes first.

    solve(name, value): the best option with that assumption changed, None if there is none.
    """
    chosen = (base.candidate.engine, base.candidate.layout, base.candidate.replicas, base.candidate.mtp)
    found = []
    for name, values in knobs.items():
        points = []
        for value in sorted(values):
            option = solve(name, value)
            made = None if option is None else option.candidate
            same = made is not None and (made.engine, made.layout, made.replicas, made.mtp) == chosen
            points.append(Point(value, option, not same))
        found.append(Sensitivity(name, tuple(points)))
    return sorted(found, key=lambda one: -one.spread)


def _why_not(known: Support, layout: Layout, cache: CacheFormat | None, *, mtp: bool) -> str | None:
    name = engines()[known.engine].name
    source = "" if known.source is None else f" ({known.source.where}, {known.source.date})"
    if known.status == "patched":
        return f"{name} runs it only with patches: {known.note}{source}"
    if not known.runs:
        return f"{name} is not known to run it: {known.note}{source}"
    if layout.dp > 1 and not known.dp:
        return f"{name} is not known to run it with attention in data-parallel groups on this hardware{source}"
    if mtp and layout.pp > 1 and known.engine == "vllm":
        return f"{name} is not known to run drafts with pipeline stages"
    if mtp and layout.pp > 1 and layout.dp > 1:
        return f"{name} refuses drafts with pipeline stages and attention in data-parallel groups"
    if cache is not None and cache.latent not in known.caches:
        return f"{name} has no {cache.latent} cache for sparse attention on this hardware{source}"
    return None


def _evaluate(candidate: Candidate, speed_of: SpeedOf, cost_of: CostOf, fewer: bool) -> Option:
    """At full size; then, if that meets the SLOs, with the fewest replicas that still do (more never slow one down)."""
    speed = speed_of(candidate)
    if fewer and speed.meets_slo and candidate.replicas > 1:
        low, high = 1, candidate.replicas  # high meets them
        while low < high:
            middle = (low + high) // 2
            tried = speed_of(replace(candidate, replicas=middle))
            if tried.meets_slo:
                high, speed = middle, tried
            else:
                low = middle + 1
        candidate = replace(candidate, replicas=high)
    return Option(candidate, speed, cost_of(candidate, speed))


def check_engines(names: Sequence[str]) -> tuple[Engine, ...]:
    """Engine names as given by people. Raises InvalidRequest for one that is not known."""
    known = engines()
    for name in names:
        if name not in known:
            raise InvalidRequest(f"engine {name!r} is not known; there are {', '.join(known)}", param="engine")
    return tuple(dict.fromkeys(engine for engine in known if engine in names))
