"""A whole answer: what was asked, what was found, what it costs, and how to launch it. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from freehold.plan.cost import Crossover, Economics, Point, Tenure
from freehold.plan.emit import Deployment, Launch
from freehold.plan.precedents import Row
from freehold.plan.prices import Api, Maker, Owning
from freehold.plan.roofline import Efficiencies
from freehold.plan.search import Found, Option, Sensitivity
from freehold.plan.types import CacheFormat, Cluster, Engine, Figure, ModelSpec, Slo, Speed
from freehold.plan.workload import Workload


@dataclass(frozen=True)
class Money:
    """How machines are paid for, and what is compared.

    price: US dollars, rent a GPU-hour or price to buy one GPU, instead of the table's. spare: replicas beyond those
    that the peak needs. utilisation: mean load over the planned one, and where that is from. staff: US dollars a month.
    task_tokens: output tokens of a task. apis: with the output tokens that each needs for one of ours.
    """

    tenure: Tenure
    owning: Owning
    price: float | None
    spare: int
    utilisation: float
    utilisation_source: str
    staff: float
    task_tokens: float | None
    apis: tuple[tuple[Api, float], ...]


@dataclass(frozen=True)
class Question:
    """What is asked. context: tokens that one sequence must have room for, at least the workload's longest.
    cache: instead of each engine's own format. efficiencies: of one's own, instead of those that come with Freehold.
    runs: measured by oneself, to be shown beside predictions of the same setup.
    """

    model: ModelSpec
    cluster: Cluster
    workload: Workload
    slo: Slo
    engines: tuple[Engine, ...]
    money: Money
    context: int
    cache: CacheFormat | None = None
    efficiencies: Efficiencies | None = None
    runs: tuple[Row, ...] = ()


@dataclass(frozen=True)
class Load:
    """One replica with `concurrency` requests in flight."""

    concurrency: int
    speed: Speed


@dataclass(frozen=True)
class Started:
    """How to start one option: the deployment, its commands, and the manifest (None where no image is known)."""

    option: Option
    deployment: Deployment
    launch: Launch
    manifest: str | None


@dataclass(frozen=True)
class Plan:
    """The answer.

    chosen: the cheapest option that meets the SLOs; if none does, the one that comes nearest, and `meets` is False.
    sweep: the chosen layout under more and more load. economics: of its replica at the load that is planned for.
    curve: cost by volume against the first API. flops: FLOP for one more token by context, as shipped and with an
    indexer on every layer. started: the chosen option, then the best of each other engine.
    """

    question: Question
    found: Found
    chosen: Option
    meets: bool
    sweep: tuple[Load, ...]
    economics: Economics
    crossovers: tuple[Crossover, ...]
    curve: tuple[Point, ...]
    api_task: Mapping[str, float | None] = field(hash=False)
    sensitivities: tuple[Sensitivity, ...]
    started: tuple[Started, ...]
    flops: tuple[tuple[int, float, float], ...]
    gpu_hour: Figure
    maker: Maker
    notes: tuple[str, ...]
    seconds: float
