"""From a question to an answer: search, cost, crossover, sensitivity, launch. Torch-free.

    plan(question)                          # everything
    compare([question, question])           # several hardware options, those that fit nothing with the reason

The parts know nothing of one another; they meet here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol, Self

from freehold.errors import FreeholdError, InvalidRequest
from freehold.plan.answer import Load, Plan, Question, Started
from freehold.plan.cost import Crossover, Economics, Point, Weights, cost_of_fleet, crossover, curve, gpu_hour
from freehold.plan.emit import Deployment, launch
from freehold.plan.flags import VERSIONS, ServingEngine
from freehold.plan.flops import flops_per_token
from freehold.plan.layouts import pp_note, support
from freehold.plan.manifest import manifest_yaml
from freehold.plan.precedents import precedent, published
from freehold.plan.prices import HOURS_A_MONTH, maker
from freehold.plan.search import Candidate, Found, Option, Sensitivity, candidates, search, sensitivity
from freehold.plan.speeds import Speeds
from freehold.plan.types import Cost, Figure, Slo, Speed
from freehold.plan.workload import Workload

_SCREENED = 4  # options of an engine, with and without drafts, that are simulated: the best by a quick bound
_SWEEP = (1, 4, 16, 64)
_NEARLY = 0.05  # a difference in cost that predictions cannot tell
_CURVE_POINTS = 61
_CURVE_DECADES = (-1.5, 2.0)  # of the volume that fills one replica
_FLOPS_AT = (8_192, 32_768, 131_072, 262_144, 524_288, 1_048_576)


class SpeedModel(Protocol):
    """What a plan asks about speed, for one workload and its SLOs: `speeds.Speeds`, or a scripted one in tests."""

    @property
    def workload(self) -> Workload: ...

    @property
    def slo(self) -> Slo: ...

    def changed(self, workload: Workload) -> Self:
        """The same model for another workload."""

    def of(self, candidate: Candidate) -> Speed:
        """One replica under its share of the load."""

    def closed(self, candidate: Candidate, concurrency: int) -> Speed:
        """One replica with so many requests in flight."""

    def bound(self, candidate: Candidate) -> float:
        """What ranks candidates before any is simulated; small is good."""

    def weights(self, candidate: Candidate) -> Weights:
        """GPU time of tokens by kind."""


def plan(question: Question, speeds: SpeedModel | None = None) -> Plan:
    """The whole answer. Raises InsufficientMemory where nothing fits, InvalidRequest where nothing is known to run."""
    began = time.perf_counter()
    speeds = speeds or Speeds(question.workload, question.slo, question.efficiencies, question.runs)
    _refuse_what_cannot_run(question)  # before a price is asked for
    hour = gpu_hour(question.cluster.gpu, question.money.tenure, question.money.owning, price=question.money.price)
    found = _search(question, speeds, hour)
    chosen = _choose(found.options)
    sweep = _sweep(chosen, speeds)
    economics = _economics(question, chosen, hour, _capacity(chosen, sweep, question))
    crossovers = tuple(crossover(economics, api, token_ratio=ratio) for api, ratio in question.money.apis)
    return Plan(
        question=question,
        found=found,
        chosen=chosen,
        meets=found.best is not None,
        sweep=sweep,
        economics=economics,
        crossovers=crossovers,
        curve=_curve(economics, crossovers),
        api_task=_api_tasks(question, crossovers),
        sensitivities=tuple(_sensitivities(question, speeds, found, chosen)),
        started=tuple(_started(question, found, chosen)),
        flops=_flops(question),
        gpu_hour=hour,
        maker=maker(question.model.name),
        notes=tuple(_notes(question, chosen)),
        seconds=time.perf_counter() - began,
    )


def compare(questions: Sequence[Question]) -> tuple[list[Plan], dict[str, str]]:
    """A plan for each hardware option that has one, and why the others have none."""
    plans: list[Plan] = []
    refusals: dict[str, str] = {}
    for question in questions:
        try:
            plans.append(plan(question))
        except FreeholdError as error:
            if error.exit_code not in (2, 5):
                raise
            refusals[f"{question.cluster.gpus} x {question.cluster.gpu.name}"] = error.message
    return plans, refusals


def _search(question: Question, speeds: SpeedModel, hour: Figure) -> Found:
    def speed_of(candidate: Candidate) -> Speed:
        return speeds.of(candidate)

    def cost_of(candidate: Candidate, speed: Speed) -> Cost:
        return _cost(question, candidate, speed, hour, speeds)

    def measured(candidate: Candidate) -> bool:
        load = question.workload.shared_by(candidate.replicas)
        return precedent((*question.runs, *published()), candidate, load) is not None

    return search(
        question.model,
        question.cluster,
        question.engines,
        speed_of,
        cost_of,
        drafts=_drafts(question),
        cache=question.cache,
        context=question.context,
        fewer=question.workload.open_loop,
        screen=speeds.bound,
        limit=_SCREENED,
        keep=measured,
    )


def _drafts(question: Question) -> tuple[bool, ...]:
    return (False, True) if question.workload.drafts else (False,)


def _choose(options: Sequence[Option]) -> Option:
    """The simplest of the options that cost nearly as little as the cheapest that meets the SLOs, if any does.

    options: the cheapest first, those that meet the SLOs before those that do not.
    """
    alike = [option for option in options if option.speed.meets_slo == options[0].speed.meets_slo]
    most = alike[0].cost.per_mtok_whole.value * (1 + _NEARLY)

    def complexity(option: Option) -> tuple[int, int, int]:
        layout = option.candidate.layout
        return layout.pp, layout.dp, -(-layout.gpus // option.candidate.gpu.node)

    return min((option for option in alike if option.cost.per_mtok_whole.value <= most), key=complexity)


def _refuse_what_cannot_run(question: Question) -> None:
    """Raises InsufficientMemory where nothing fits, InvalidRequest where nothing is known to run."""
    run, fit, _ = candidates(
        question.model,
        question.cluster,
        question.engines,
        drafts=_drafts(question),
        cache=question.cache,
        context=question.context,
    )
    if run:
        return
    whys = "; ".join(dict.fromkeys(item.why for item in fit))
    embedded = "freehold" not in question.engines and support("freehold", question.cluster.gpu, question.model).runs
    if embedded and fit[0].candidate.layout.gpus == 1:
        whys += ". Freehold's own engine runs it there, for few callers: add --engine freehold"
    model, gpu = question.model.name, question.cluster.gpu.name
    raise InvalidRequest(f"{model} fits memory on {gpu}, but no engine is known to run it there: {whys}", param="on")


def _cost(question: Question, candidate: Candidate, speed: Speed, hour: Figure, speeds: SpeedModel) -> Cost:
    economics = _economics_of(question, candidate, hour, speed.request_rate)
    return cost_of_fleet(economics, speeds.weights(candidate), candidate.replicas, question.money.task_tokens)


def _economics_of(question: Question, candidate: Candidate, hour: Figure, capacity: Figure) -> Economics:
    money = question.money
    return Economics(
        hour=hour.scaled(candidate.layout.gpus),
        capacity=capacity,
        utilisation=money.utilisation,
        spare=money.spare,
        staff=money.staff,
        tokens=question.workload.tokens,
        gpus=candidate.layout.gpus,
    )


def _economics(question: Question, chosen: Option, hour: Figure, capacity: Figure) -> Economics:
    return _economics_of(question, chosen.candidate, hour, capacity)


def _sweep(chosen: Option, speeds: SpeedModel) -> tuple[Load, ...]:
    """More and more requests in flight, until throughput no longer grows or the caches are full."""
    loads: list[Load] = []
    asked = max(1, round(chosen.speed.concurrency))
    held = max(asked, chosen.candidate.footprint.max_sequences(max(1, round(speeds.workload.mean_tokens))))
    promised = speeds.slo.ttft is not None or speeds.slo.tpot is not None
    for concurrency in sorted({*_SWEEP, asked, min(2 * asked, held) if promised else asked}):
        if loads and concurrency > held:
            break
        speed = speeds.closed(chosen.candidate, concurrency)
        loads.append(Load(concurrency, speed))
        if len(loads) > 2 and speed.output_rate.value < 1.02 * loads[-2].speed.output_rate.value:
            break
    return tuple(loads)


def _capacity(chosen: Option, sweep: Sequence[Load], question: Question) -> Figure:
    """Requests a second that one replica can serve: the most that the sweep shows within the SLOs.

    A closed loop without SLOs means that load and no other; it is then what was asked.
    """
    promised = question.slo.ttft is not None or question.slo.tpot is not None
    rates = [load.speed.request_rate for load in sweep if promised and load.speed.meets_slo]
    if question.workload.open_loop and not promised:
        rates = [load.speed.request_rate for load in sweep]
    return max([chosen.speed.request_rate, *rates], key=lambda rate: rate.value)


def _curve(economics: Economics, crossovers: Sequence[Crossover]) -> tuple[Point, ...]:
    full = economics.capacity.value * economics.utilisation * HOURS_A_MONTH * 3600
    low, high = (full * 10**decade for decade in _CURVE_DECADES)
    crossings = [found.expected.first for found in crossovers if found.expected.first is not None]
    low, high = min([low, *(x / 3 for x in crossings)]), max([high, *(x * 3 for x in crossings)])
    step = math.log(high / low) / (_CURVE_POINTS - 1)
    volumes = [low * math.exp(step * index) for index in range(_CURVE_POINTS)]
    return tuple(curve(economics, crossovers[0].per_request if crossovers else 0.0, volumes))


def _api_tasks(question: Question, crossovers: Sequence[Crossover]) -> Mapping[str, float | None]:
    """US dollars a task at each API: the prompt of the mix in proportion to our output tokens."""
    task = question.money.task_tokens
    return {
        found.api.key: None if task is None else found.per_request * task / found.tokens.output for found in crossovers
    }


def _sensitivities(question: Question, speeds: SpeedModel, found: Found, chosen: Option) -> list[Sensitivity]:
    """What is best with one assumption changed: all that may run is ranked again, and the first simulated again."""
    workload, money = question.workload, question.money
    hour = gpu_hour(question.cluster.gpu, money.tenure, money.owning, price=money.price)
    contenders = list(dict.fromkeys(option.candidate for option in found.options))

    def changed(other: Workload) -> SpeedModel:
        return (
            speeds
            if other.tokens == workload.tokens and other.acceptance == workload.acceptance
            else (speeds.changed(other))
        )

    def solve(name: str, value: float) -> Option | None:
        asked, changed_hour, changed_speeds = question, hour, speeds
        if name == "utilisation":
            asked = replace(question, money=replace(money, utilisation=value))
        elif name == "price of a GPU-hour":
            changed_hour = Figure.exact(value, "sensitivity")
        elif name == "acceptance length":
            changed_speeds = changed(workload.with_acceptance(value))
        else:
            changed_speeds = changed(workload.with_hit_rate(value))
            asked = replace(question, workload=changed_speeds.workload)
        # A price that changes for all leaves the choice as it is.
        first = chosen.candidate if changed_speeds is speeds else min(contenders, key=changed_speeds.bound)
        speed = changed_speeds.of(first)
        return Option(first, speed, _cost(asked, first, speed, changed_hour, changed_speeds))

    knobs: dict[str, Sequence[float]] = {
        "utilisation": sorted({0.2, 0.5, 0.8, money.utilisation}),
        "price of a GPU-hour": sorted({hour.low, hour.value, hour.high}),
        "prefix-cache hit rate": sorted({0.0, 0.5, 0.9, round(workload.hits, 4)}),
    }
    if chosen.candidate.mtp:
        knobs["acceptance length"] = sorted({1.5, 2.5, workload.acceptance})
    return sensitivity(knobs, chosen, solve)


def _started(question: Question, found: Found, chosen: Option) -> list[Started]:
    """Launches of the chosen option and of the best one of each other engine that has flags of its own."""
    best: dict[str, Option] = {chosen.candidate.engine: chosen}
    for option in found.options:
        mine = [other for other in found.options if other.candidate.engine == option.candidate.engine]
        best.setdefault(option.candidate.engine, _choose(mine))
    made = []
    for option in best.values():
        candidate = option.candidate
        engine = next((known for known in VERSIONS if known == candidate.engine), None)
        if engine is None:
            continue
        deployment = deployment_of(question, candidate, engine)
        image = candidate.gpu.kind in ("cuda", "rocm")
        made.append(Started(option, deployment, launch(deployment), manifest_yaml(deployment) if image else None))
    return made


def deployment_of(question: Question, candidate: Candidate, engine: ServingEngine) -> Deployment:
    """What to launch for a candidate: as much context as fits, as many sequences as the load and the caches want."""
    room, workload = candidate.footprint, question.workload
    context = room.max_context
    held = room.max_sequences(max(1, math.ceil(workload.mean_tokens)))
    # A little above what is expected at once: the caches, not the limit, should decide.
    wanted = max(workload.peak_concurrency / candidate.replicas, 1)
    sequences = max(room.layout.dp, min(held, 2 ** math.ceil(math.log2(2 * wanted))))
    sequences = -(-sequences // room.layout.dp) * room.layout.dp
    drafts = workload.drafts if candidate.mtp else 0
    return Deployment(
        candidate.model,
        candidate.gpu,
        engine,
        room,
        context,
        sequences,
        drafts,
        candidate.replicas + question.money.spare,
    )


def _flops(question: Question) -> tuple[tuple[int, float, float], ...]:
    config = question.model.config
    contexts = [context for context in _FLOPS_AT if context <= config.max_position_embeddings]
    contexts = contexts or [config.max_position_embeddings]
    return tuple(
        (context, flops_per_token(config, context), flops_per_token(config, context, shared=False))
        for context in contexts
    )


def _notes(question: Question, chosen: Option) -> list[str]:
    notes = list(question.model.notes) + list(question.cluster.gpu.notes)
    if chosen.candidate.layout.pp > 1:
        notes.append(pp_note(question.model, chosen.candidate.layout.pp))
    return notes
