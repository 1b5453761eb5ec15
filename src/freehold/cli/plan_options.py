"""The options that `freehold plan` and `freehold plan compare` share, and the question they make."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from freehold.errors import InvalidRequest

if TYPE_CHECKING:
    from freehold.plan.answer import Money, Question
    from freehold.plan.measured import Setup
    from freehold.plan.prices import Api
    from freehold.plan.types import CacheFormat, ModelSpec, Slo
    from freehold.plan.workload import Workload


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What was given on the command line. Each field is an option; `with_options` makes them so."""

    model: Annotated[
        str,
        typer.Option(metavar="DIR|NAME", help="A checkpoint directory, a config.json, or a published model."),
    ] = "glm-5.2-fp8"
    input: Annotated[
        str | None, typer.Option(help="Prompt tokens of a request: 8192, or 1000-9000.", show_default="8192")
    ] = None
    output: Annotated[
        str | None, typer.Option(help="Output tokens of a request, thinking included.", show_default="1024")
    ] = None
    calls: Annotated[
        Path | None,
        typer.Option(help="Take the requests from own calls, a JSONL file.", show_default=False),
    ] = None
    concurrency: Annotated[
        int | None, typer.Option(help="Requests in flight.", min=1, show_default="32, without --rate")
    ] = None
    rate: Annotated[float | None, typer.Option(help="Requests that arrive a second.", show_default=False)] = None
    hit_rate: Annotated[
        float | None, typer.Option(help="Share of prompt tokens that the prefix cache has.", show_default="0")
    ] = None
    effort: Annotated[str, typer.Option(help="Thinking: max, or off, which leaves its tokens away.")] = "max"
    drafts: Annotated[int, typer.Option(help="Tokens that MTP drafts a step; 0 for none.", min=0, max=7)] = 3
    acceptance: Annotated[
        float | None, typer.Option(help="Tokens a step, with these drafts.", show_default="published, for coding")
    ] = None
    ttft: Annotated[float | None, typer.Option(help="Promise: seconds to the first token.", show_default=False)] = None
    tpot: Annotated[float | None, typer.Option(help="Promise: seconds a token after it.", show_default=False)] = None
    percentile: Annotated[float, typer.Option(help="Percent of requests that promises hold for.")] = 90.0
    context: Annotated[
        int | None,
        typer.Option(help="Tokens that one sequence must fit.", min=1, show_default="the longest request"),
    ] = None
    engine: Annotated[
        list[str], typer.Option(help="vllm, sglang or freehold; may be repeated.", show_default="vllm, sglang")
    ] = field(default_factory=list)
    cache: Annotated[
        str | None,
        typer.Option(help="Latent cache: bf16, fp8_ds_mla, fp8, nvfp4_ds_mla.", show_default="the engine's"),
    ] = None
    own: Annotated[bool, typer.Option("--own/--rent", help="Buy the machines, or rent them.")] = False
    gpu_price: Annotated[
        float | None,
        typer.Option(help="US dollars: rent of a GPU-hour; with --own, to buy one.", show_default="market"),
    ] = None
    kwh: Annotated[float | None, typer.Option(help="US dollars a kWh, with --own.", show_default="0.10")] = None
    pue: Annotated[
        float | None, typer.Option(help="Power of the site over its machines', with --own.", show_default="1.3")
    ] = None
    years: Annotated[float | None, typer.Option(help="Depreciation, with --own.", show_default="4")] = None
    staff: Annotated[
        float | None, typer.Option(help="US dollars of staff a month.", show_default="half an engineer")
    ] = None
    spare: Annotated[int, typer.Option(help="Replicas beyond those needed; 1 is N+1.", min=0)] = 0
    profile: Annotated[str, typer.Option(help="Load through the week: flat, office or global.")] = "global"
    utilisation: Annotated[
        float | None, typer.Option(help="Mean load over the planned one.", show_default="the profile's")
    ] = None
    task_tokens: Annotated[float | None, typer.Option(help="Output tokens of a task.", show_default=False)] = None
    api: Annotated[
        list[str],
        typer.Option(
            metavar="NAME|IN/CACHED/OUT[@RATIO]",
            help="Compare with an API, whose model needs RATIO of our output tokens; may be repeated.",
            show_default="Z.ai, the cheapest host, Claude Opus 5.5",
        ),
    ] = field(default_factory=list)
    efficiencies: Annotated[
        Path | None,
        typer.Option(help="Efficiencies that `freehold plan calibrate` wrote.", show_default="bundled"),
    ] = None


_OWNING = ("kwh", "pue", "years")
_ENGINES = ("vllm", "sglang")
_APIS = ("z.ai glm-5.2", "openrouter glm-5.2", "claude-opus-5.5")
_INPUT, _OUTPUT, _CONCURRENCY = "8192", "1024", 32


def with_options(function: Callable[..., None]) -> Callable[..., None]:
    """A command whose first parameter is an `Asked`, with an option for each of its fields instead."""

    @functools.wraps(function)
    def command(**given: Any) -> None:
        asked = Asked(**{item.name: given.pop(item.name) for item in fields(Asked)})
        function(asked, **given)

    own = inspect.signature(function, eval_str=True)
    shared_hints = get_type_hints(Asked, include_extras=True)
    shared = [
        inspect.Parameter(
            item.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=item.default if item.default is not MISSING else [],
            annotation=shared_hints[item.name],
        )
        for item in fields(Asked)
    ]
    mine = [item.replace(kind=inspect.Parameter.KEYWORD_ONLY) for item in list(own.parameters.values())[1:]]
    command.__signature__ = inspect.Signature([*mine, *shared])  # type: ignore[attr-defined]
    command.__annotations__ = {item.name: item.annotation for item in [*mine, *shared]}
    return command


def question_of(asked: Asked, on: str) -> Question:
    """The question about one hardware option. Raises InvalidRequest and ConfigError for what makes no sense."""
    from freehold.plan.answer import Question
    from freehold.plan.hardware import cluster
    from freehold.plan.kept import read_kept
    from freehold.plan.models import load
    from freehold.plan.search import check_engines

    model = load(asked.model)
    workload = workload_of(asked, model)
    limit = model.config.max_position_embeddings
    context = asked.context or workload.longest
    if context > limit:
        raise InvalidRequest(f"{context:,} tokens are more than {model.name}'s context of {limit:,}", param="context")
    kept, runs = (None, ()) if asked.efficiencies is None else read_kept(asked.efficiencies)
    return Question(
        model=model,
        cluster=cluster(on),
        workload=workload,
        slo=_slo(asked),
        engines=check_engines(asked.engine or _ENGINES),
        money=money_of(asked),
        context=context,
        cache=_cache(asked.cache),
        efficiencies=kept,
        runs=runs,
    )


def workload_of(asked: Asked, model: ModelSpec) -> Workload:
    """What is asked for, request by request."""
    from freehold.plan.lengths import lengths, read_calls
    from freehold.plan.workload import EFFORTS, Workload, from_calls

    if asked.rate is not None and asked.concurrency is not None:
        raise InvalidRequest("--rate and --concurrency contradict each other; give one", param="rate")
    effort = next((known for known in EFFORTS if known == asked.effort), None)
    if effort is None:
        raise InvalidRequest(f"--effort {asked.effort!r} is none of {', '.join(EFFORTS)}", param="effort")
    drafts = asked.drafts if model.config.has_mtp else 0
    if asked.acceptance is not None and not drafts:
        raise InvalidRequest("--acceptance is for drafts, and there are none", param="acceptance")
    if asked.calls is not None:
        if (asked.input, asked.output, asked.hit_rate) != (None, None, None):
            raise InvalidRequest("--calls has lengths and hits; leave out --input, --output and --hit-rate")
        calls = tuple(read_calls(asked.calls))
        return from_calls(
            calls,
            concurrency=asked.concurrency,
            rate=asked.rate,
            drafts=drafts,
            acceptance_length=asked.acceptance,
            effort=effort,
        )
    return Workload(
        lengths(asked.input or _INPUT),
        lengths(asked.output or _OUTPUT),
        concurrency=None if asked.rate is not None else asked.concurrency or _CONCURRENCY,
        rate=asked.rate,
        hit_rate=asked.hit_rate or 0.0,
        drafts=drafts,
        acceptance_length=asked.acceptance,
        effort=effort,
    )


def setup_of(model: str, on: str, engine: str, tp: int | None, cache: str | None) -> Setup:
    """What runs of one's own were measured on, from the words of the command line. Raises InvalidRequest."""
    from freehold.plan.hardware import cluster
    from freehold.plan.layouts import refusal, support
    from freehold.plan.measured import Setup
    from freehold.plan.models import load
    from freehold.plan.search import check_engines
    from freehold.plan.speeds import prompt_chunk
    from freehold.plan.types import Layout

    spec, machine, (known,) = load(model), cluster(on), check_engines([engine])
    width = tp or machine.gpus
    if machine.gpus % width:
        raise InvalidRequest(f"--tp {width} does not divide {machine.gpus} GPUs", param="tp")
    groups = machine.gpus // width
    layout = Layout(tp=width, dp=groups, ep=machine.gpus if groups > 1 else 1)
    why = refusal(spec, machine.gpu, layout, known)
    if why is not None:
        raise InvalidRequest(f"{layout} of {spec.name} on {machine.gpu.name}: {why}", param="tp")
    runs = support(known, machine.gpu, spec)
    chunk = prompt_chunk(known, machine.gpu, layout)
    return Setup("", spec, machine.gpu, known, layout, _cache(cache) or runs.cache, runs.fraction, chunk)


def money_of(asked: Asked) -> Money:
    """How machines are paid for, and what is compared. Raises InvalidRequest for what makes no sense."""
    from freehold.plan.answer import Money
    from freehold.plan.prices import owning_with, profile, staff_a_month

    if not asked.own and (given := [name for name in _OWNING if getattr(asked, name) is not None]):
        raise InvalidRequest(f"--{given[0]} is for machines that are owned; add --own", param=given[0])
    staff = staff_a_month() if asked.staff is None else asked.staff
    _at_least(staff, 0, "staff")
    load = profile(asked.profile)
    where = load.source if asked.utilisation is None else "as given"
    return Money(
        tenure="own" if asked.own else "rent",
        owning=owning_with(kwh=asked.kwh, pue=asked.pue, years=asked.years),
        price=asked.gpu_price,
        spare=asked.spare,
        utilisation=load.mean if asked.utilisation is None else asked.utilisation,
        utilisation_source=where,
        staff=staff,
        task_tokens=asked.task_tokens,
        apis=tuple(_api(text) for text in asked.api or _APIS),
    )


def _api(text: str) -> tuple[Api, float]:
    from freehold.plan.prices import api

    name, at, ratio = text.rpartition("@")
    if not at:
        return api(text), 1.0
    try:
        return api(name), float(ratio)
    except ValueError:
        raise InvalidRequest(f"--api {text!r}: what follows @ is a number of tokens for one of ours") from None


def _slo(asked: Asked) -> Slo:
    from freehold.plan.types import Slo

    for name in ("ttft", "tpot"):
        value = getattr(asked, name)
        if value is not None and not 0 < value < math.inf:
            raise InvalidRequest(f"--{name} {value}: a promise is a time above 0 and not endless", param=name)
    if not 0 < asked.percentile < 100:
        raise InvalidRequest(f"--percentile {asked.percentile}: it lies between 0 and 100", param="percentile")
    return Slo(asked.ttft, asked.tpot, asked.percentile)


def _cache(name: str | None) -> CacheFormat | None:
    from freehold.model.cache_layout import LATENT_FORMATS
    from freehold.plan.types import CacheFormat

    if name is None:
        return None
    for known in LATENT_FORMATS:
        if known == name:
            return CacheFormat(known)
    raise InvalidRequest(f"--cache {name!r} is none of {', '.join(LATENT_FORMATS)}", param="cache")


def _at_least(value: float, least: float, name: str) -> None:
    if not (math.isfinite(value) and value >= least):
        raise InvalidRequest(f"--{name} {value}: it must be a number, at least {least:g}", param=name)
