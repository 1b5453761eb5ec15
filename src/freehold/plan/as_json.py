"""A plan as JSON-ready data: every predicted number with its interval, basis and source. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from freehold.plan.answer import Plan, Started
from freehold.plan.cost import Crossing, Crossover
from freehold.plan.search import Option, Sensitivity
from freehold.plan.types import Speed


def plan_as_dict(plan: Plan) -> dict[str, Any]:
    """The whole plan. Units are bytes, seconds, tokens and US dollars; `crossovers` are in output tokens a month."""
    question, money = plan.question, plan.question.money
    output = plan.economics.tokens.output
    return {
        "model": {
            "name": question.model.name,
            "repo": question.model.repo,
            "dtype": question.model.dtype,
            "bytes": question.model.total_bytes,
            "parameters": question.model.parameters,
            "source": asdict(question.model.source),
        },
        "hardware": {
            "gpu": question.cluster.gpu.key,
            "name": question.cluster.gpu.name,
            "gpus": question.cluster.gpus,
            "memory": question.cluster.gpu.memory,
            "sources": {name: asdict(source) for name, source in question.cluster.gpu.sources.items()},
        },
        "workload": {"text": str(question.workload)} | question.workload.as_dict(),
        "slo": asdict(question.slo),
        "money": {
            "tenure": money.tenure,
            "gpu_hour": asdict(plan.gpu_hour),
            "spare": money.spare,
            "utilisation": money.utilisation,
            "utilisation_source": money.utilisation_source,
            "staff_a_month": money.staff,
            "task_tokens": money.task_tokens,
            "owning": asdict(money.owning) if money.tenure == "own" else None,
        },
        "meets_slo": plan.meets,
        "chosen": _option(plan.chosen),
        "front": [_option(option) for option in plan.found.front],
        "options": [_option(option) for option in plan.found.options],
        "fits_memory_no_engine_known": [
            {"candidate": str(item.candidate), "why": item.why} for item in plan.found.unknown
        ],
        "too_large": plan.found.too_large,
        "sweep": [{"concurrency": load.concurrency} | _speed(load.speed) for load in plan.sweep],
        "capacity": asdict(plan.economics.capacity),
        "crossovers": [_crossover(found, output, plan.api_task) for found in plan.crossovers],
        "curve": [
            {
                "output_tokens_a_month": point.requests * output,
                "replicas": point.replicas,
                "per_mtok_whole": {"value": point.ours, "low": point.low, "high": point.high},
                "api": point.api,
            }
            for point in plan.curve
        ],
        "sensitivities": [_sensitivity(item) for item in plan.sensitivities],
        "flops": [
            {"context": context, "flops": shared, "flops_without_index_share": full}
            for context, shared, full in plan.flops
        ],
        "launches": [_started(started) for started in plan.started],
        "weights": {
            "maker": plan.maker.name,
            "licence": question.model.licence or plan.maker.licence,
            "notes": list(plan.maker.notes),
        },
        "notes": list(plan.notes),
        "seconds": plan.seconds,
    }


def _sensitivity(item: Sensitivity) -> dict[str, Any]:
    points = [
        {
            "value": point.value,
            "option": None if point.option is None else str(point.option.candidate),
            "per_mtok_whole": None if point.option is None else asdict(point.option.cost.per_mtok_whole),
            "changed": point.changed,
        }
        for point in item.points
    ]
    return {"assumption": item.name, "points": points}


def _option(option: Option) -> dict[str, Any]:
    candidate, room = option.candidate, option.candidate.footprint
    return {
        "text": str(candidate),
        "engine": candidate.engine,
        "layout": asdict(candidate.layout),
        "replicas": candidate.replicas,
        "gpus": candidate.gpus,
        "mtp": candidate.mtp,
        "memory": {
            "weights": dict(room.weights),
            "weight_bytes": room.weight_bytes,
            "cache_format": asdict(room.cache),
            "cache_per_token": room.cache_per_token,
            "cache_tokens": room.cache_tokens,
            "max_context": room.max_context,
            "overhead": asdict(room.overhead),
            "usable": room.usable,
        },
        "speed": _speed(option.speed),
        "cost": asdict(option.cost),
        "meets_slo": option.speed.meets_slo,
    }


def _speed(speed: Speed) -> dict[str, Any]:
    return asdict(speed)


def _crossover(found: Crossover, output: float, tasks: Mapping[str, float | None]) -> dict[str, Any]:
    def crossing(item: Crossing) -> dict[str, float | None]:
        return {
            name: None if value is None else value * output
            for name, value in (("first", item.first), ("settled", item.settled))
        }

    return {
        "api": asdict(found.api),
        "per_request": found.per_request,
        "per_task": tasks.get(found.api.key),
        "expected": crossing(found.expected),
        "best": crossing(found.best),
        "worst": crossing(found.worst),
    }


def _started(started: Started) -> dict[str, Any]:
    return {
        "engine": started.launch.engine,
        "version": started.launch.version,
        "option": str(started.option.candidate),
        "environment": dict(started.launch.environment),
        "commands": [list(command) for command in started.launch.commands],
        "max_context": started.deployment.max_context,
        "max_sequences": started.deployment.max_sequences,
        "notes": list(started.launch.notes),
        "manifest": started.manifest,
    }
