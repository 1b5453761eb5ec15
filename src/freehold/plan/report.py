"""A plan as text for the terminal. Torch-free."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from freehold.plan.answer import Plan
from freehold.plan.cost import Crossing
from freehold.plan.layouts import engines
from freehold.plan.search import Option
from freehold.plan.types import Figure, Percentiles
from freehold.plan.wording import BASIS_KEY, basis, count, dollars, gb, per_user, seconds, span

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_PARTS = {
    "routed_expert": "routed experts",
    "shared_expert": "shared experts",
    "attention": "attention",
    "indexer": "indexers",
    "dense_mlp": "dense MLPs",
    "router": "routers",
    "embed": "embedding",
    "head": "head",
    "norm": "norms",
    "mtp": "MTP layer",
}
_SHOWN = 6  # rows of a list before "and so many more"


def print_plan(plan: Plan, console: Console) -> None:
    """The whole report: recommendation, memory, speed, cost, crossover, alternatives, launch, notes."""
    for title, section in sections(plan):
        console.print()
        console.print(f"[bold]{title}[/bold]")
        for block in section:
            if isinstance(block, str):
                console.print(block, soft_wrap=True, markup=False)
            else:
                console.print(block)


def sections(plan: Plan) -> Iterator[tuple[str, list[str | Table]]]:
    """Titles with their blocks: paragraphs and tables."""
    yield _heading(plan), [*_recommended(plan)]
    yield "Memory of a GPU", [memory_table(plan), *_wrapped(memory_words(plan))]
    yield "Speed", [speed_table(plan), *_wrapped(speed_words(plan))]
    yield "Cost", [cost_table(plan), *_wrapped(cost_words(plan))]
    yield "Against APIs", [api_table(plan), *_wrapped(api_words(plan))]
    yield "The choice, and what no other option beats", [front_table(plan), *_wrapped(other_words(plan))]
    if plan.sensitivities:
        yield "What the answer depends on", [sensitivity_table(plan)]
    for started in plan.started:
        engine = engines()[started.option.candidate.engine]
        blocks: list[str | Table] = [started.launch.shell(rank) for rank in range(len(started.launch.commands))]
        yield f"Launch with {engine.name} {engine.version}", [*blocks, *_bulleted(started.launch.notes)]
    yield "Before you run it", _bulleted(maker_words(plan))
    yield "Figures", _wrapped([f"{BASIS_KEY}. Intervals in brackets. Planned in {plan.seconds:.2f} s.", *plan.notes])


def _heading(plan: Plan) -> str:
    question = plan.question
    return f"{question.model.name} on {question.cluster.gpus} x {question.cluster.gpu.name}"


def _recommended(plan: Plan) -> list[str]:
    workload = plan.question.workload
    lines = [f"Asked:       {workload}"]
    if plan.meets:
        lines.append(f"Recommended: {plan.chosen.candidate}")
    else:
        lines.append(f"Nothing here meets the SLOs; nearest: {plan.chosen.candidate}")
    slo = plan.question.slo
    promised = [f"{name} {seconds(value)}" for name, value in (("TTFT", slo.ttft), ("TPOT", slo.tpot)) if value]
    if promised:
        lines.append(f"SLOs:        {' and '.join(promised)} for {slo.percentile:g}% of requests")
    return [line for text in lines for line in textwrap.wrap(text, 100, subsequent_indent=" " * 13)]


# ── memory ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def memory_parts(option: Option, sequences_tokens: float) -> list[tuple[str, float]]:
    """Bytes of the fullest GPU of an option by part, in the order of a stack: weights, cache in use and free, rest."""
    room = option.candidate.footprint
    weights = sorted(
        ((_PARTS.get(part, part), float(size)) for part, size in room.weights.items()), key=lambda x: -x[1]
    )
    large = [entry for entry in weights if entry[1] >= 0.02 * room.weight_bytes]
    rest = room.weight_bytes - sum(size for _, size in large)
    held = min(sequences_tokens / room.layout.dp, room.cache_tokens) * room.cache_per_token
    free = room.cache_tokens * room.cache_per_token - held
    outside = option.candidate.gpu.memory - room.usable
    overhead = room.overhead.value
    slack = room.usable - room.weight_bytes - overhead - held - free
    parts = [*large, ("other weights", rest), ("cache in use", held), ("cache free", free)]
    return [*parts, ("engine overhead", overhead), ("kept free", outside + max(0.0, slack))]


def memory_table(plan: Plan) -> Table:
    table = table_of("", "bytes", "GB", "")
    memory = plan.chosen.candidate.gpu.memory
    for name, size in memory_parts(plan.chosen, plan.question.workload.tokens_in_flight(_in_flight(plan.chosen))):
        mark = "i" if name in ("engine overhead", "cache in use", "cache free", "kept free") else ""
        table.add_row(name, f"{size:,.0f}", f"{size / 1e9:,.2f}", f"{size / memory:.1%} {mark}")
    table.add_row("the GPU has", f"{memory:,}", f"{memory / 1e9:,.2f}", "")
    return table


def memory_words(plan: Plan) -> list[str]:
    room, model = plan.chosen.candidate.footprint, plan.question.model
    config = model.config
    per = f"{room.cache_per_token:,} B a token on each GPU ({room.cache.latent} latents"
    per += f", index keys {room.index_per_token:,} B" + (", on all layers)" if room.cache.all_layers else ")")
    mean = plan.question.workload.mean_tokens
    words = [
        (
            f"Weights {model.total_bytes:,} B in all ({model.dtype}). Cache: {per}; {room.cache_tokens:,} tokens a "
            f"group, {room.layout.dp} group{'s' if room.layout.dp > 1 else ''} a replica: "
            f"{room.max_sequences(max(1, round(mean)))} sequences of {mean:,.0f} tokens at once."
        ),
    ]
    limit = config.max_position_embeddings
    fits = "fits" if room.max_context >= limit else f"does not fit: at most {room.max_context:,} tokens"
    words.append(f"The model's whole context of {limit:,} tokens {fits}.")
    words.append(f"Overhead is an estimate ({span(room.overhead, gb)}): {room.overhead.source}.")
    return words


# ── speed ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def speed_table(plan: Plan) -> Table:
    table = table_of("one replica", "p50", "p90", "p99", "mean", "")
    speed = plan.chosen.speed

    def row(name: str, percentiles: Percentiles) -> None:
        figures = (percentiles.p50, percentiles.p90, percentiles.p99, percentiles.mean)
        table.add_row(name, *(seconds(figure.value) for figure in figures), basis(percentiles.p50))

    row("TTFT", speed.ttft)
    row("TPOT", speed.tpot)
    if speed.measured is not None:
        for name, figure in (("TTFT, measured run", speed.measured.ttft), ("TPOT, measured run", speed.measured.tpot)):
            if figure is not None:
                table.add_row(name, "", "", "", seconds(figure.value), basis(figure))
    return table


def speed_words(plan: Plan) -> list[str]:
    speed, gpus = plan.chosen.speed, plan.chosen.candidate.layout.gpus
    total = speed.input_rate.value + speed.output_rate.value

    def spread(figure: Figure) -> str:
        return span(figure, seconds)

    words = [
        f"Intervals: TTFT p50 {spread(speed.ttft.p50)}, TPOT p50 {spread(speed.tpot.p50)}.",
        (
            f"{speed.concurrency:,.1f} requests in flight, {speed.request_rate.value:.3f} finished a second; "
            f"{speed.output_rate.value:,.0f} output tokens a second ({per_user(speed):.1f} for each caller), "
            f"{total / gpus:,.0f} of all kinds a second and GPU."
        ),
        (
            f"Goodput: {speed.goodput.value:.3f} requests a second within the SLOs. "
            f"Requests waited for cache {speed.starved:.0%} of the time."
        ),
    ]
    words += measured_words([plan.chosen])
    known = [(context, with_, without) for context, with_, without in plan.flops]
    if known:
        context, with_, without = known[-1]
        words.append(
            f"IndexShare: {without / 1e9:,.1f} GFLOP a token at {context:,} tokens without it, {with_ / 1e9:,.1f} with "
            f"it: {without / with_:.2f} times fewer."
        )
    return words


def measured_words(options: Sequence[Option]) -> list[str]:
    """The measured runs of these options beside what is predicted of them, each run once."""
    words: dict[str, None] = {}
    for option in options:
        speed, run = option.speed, option.speed.measured
        if run is not None:
            said = [
                f"mean {name} {seconds(measured.value)}, predicted {span(percentiles.mean, seconds)}"
                for name, percentiles, measured in (("TTFT", speed.ttft, run.ttft), ("TPOT", speed.tpot, run.tpot))
                if measured is not None
            ]
            words[
                f"Measured: {'; '.join(said)}. {run.run}; a whole run, its first burst included "
                f"({run.source.where}, {run.source.date})."
            ] = None
    return list(words)


# ── cost ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def cost_table(plan: Plan) -> Table:
    table = table_of("", "US dollars", "from", "to", "")
    cost = plan.chosen.cost
    rows: list[tuple[str, Figure | None]] = [
        ("an hour, all machines and staff", cost.per_hour),
        ("a million input tokens", cost.per_mtok_input),
        ("a million cached input tokens", cost.per_mtok_cached),
        ("a million output tokens", cost.per_mtok_output),
        ("a million output tokens, with their prompts", cost.per_mtok_whole),
        ("a task", cost.per_task),
        ("a GPU-hour", plan.gpu_hour),
    ]
    for name, figure in rows:
        if figure is not None:
            table.add_row(name, dollars(figure.value), dollars(figure.low), dollars(figure.high), basis(figure))
    return table


def cost_words(plan: Plan) -> list[str]:
    money, chosen = plan.question.money, plan.chosen.candidate
    kind = "rented" if money.tenure == "rent" else "owned"
    spare = f" and {money.spare} spare" if money.spare else ", no spare"
    return [
        (
            f"{chosen.replicas} replica{'s' if chosen.replicas > 1 else ''}{spare}, {kind} "
            f"({plan.gpu_hour.source}); {dollars(money.staff)} of staff a month; mean load {money.utilisation:.0%} of "
            f"the planned one ({money.utilisation_source}). The bill is divided over tokens by the GPU time they take."
        ),
    ]


def api_table(plan: Plan) -> Table:
    table = table_of("API", "a request", "a task", "cheaper from", "for good from", "between")
    output = plan.economics.tokens.output
    for found in plan.crossovers:
        task = plan.api_task.get(found.api.key)
        table.add_row(
            f"{found.api.model}, {found.api.provider}" if found.api.provider else found.api.key,
            dollars(found.per_request),
            dollars(task) if task is not None else "",
            volume(found.expected.first, output),
            volume(found.expected.settled, output),
            _band(found.best, found.worst, output),
        )
    return table


def volume(requests: float | None, output: float) -> str:
    """A crossing as output tokens a month."""
    return "never" if requests is None else f"{count(requests * output)}"


def _band(best: Crossing, worst: Crossing, output: float) -> str:
    if best.first is None:
        return "never at best"
    return f"{volume(best.first, output)} to {volume(worst.first, output)}"


def api_words(plan: Plan) -> list[str]:
    tokens = plan.economics.tokens
    return [
        (
            f"Volumes are output tokens a month of requests like these ({tokens.uncached:,.0f} new and "
            f"{tokens.cached:,.0f} cached tokens in, {tokens.output:,.0f} out), with machines bought or rented whole, "
            "spares and staff included. "
            "'For good': from there another machine never makes it dearer again. 'Between': with every figure "
            "at its good and at its bad end."
        )
    ]


# ── alternatives ──────────────────────────────────────────────────────────────────────────────────────────────────────


def front_table(plan: Plan) -> Table:
    table = table_of("layout", "engine", "GPUs", "TTFT p90", "TPOT p90", "$/M out*", "SLOs")
    shown: set[tuple[object, ...]] = set()
    for option in (plan.chosen, *plan.found.front):
        candidate = option.candidate
        # The speed model cannot tell experts cut from experts dealt within one group: the first stands for both.
        same = (candidate.engine, candidate.mtp, candidate.replicas, *option.objectives)
        if same in shown or len(shown) == _SHOWN:
            continue
        shown.add(same)
        table.add_row(
            layout_name(option),
            engines()[candidate.engine].name + (" MTP" if candidate.mtp else ""),
            str(candidate.gpus),
            seconds(option.speed.ttft.p90.value),
            seconds(option.speed.tpot.p90.value),
            dollars(option.cost.per_mtok_whole.value),
            "met" if option.speed.meets_slo else "not met",
        )
    return table


def layout_name(option: Option) -> str:
    candidate = option.candidate
    return f"{candidate.replicas} x {candidate.layout}" if candidate.replicas > 1 else str(candidate.layout)


def other_words(plan: Plan) -> list[str]:
    found = plan.found
    words = [
        "* US dollars a million output tokens, with the prompts that go with them.",
        (
            f"{len(found.options)} options evaluated; {found.too_large} layouts do not fit memory. Of those that cost "
            "nearly the same, the one with the fewest stages, attention groups and machines is recommended."
        ),
    ]
    others = [option for option in found.options if option.speed.measured != plan.chosen.speed.measured]
    words += measured_words(others)
    by_reason: dict[str, list[str]] = {}
    for item in found.unknown:
        by_reason.setdefault(item.why, []).append(str(item.candidate.layout))
    for why, names in list(by_reason.items())[:_SHOWN]:
        listed = ", ".join(dict.fromkeys(names[:4])) + (" and more" if len(names) > 4 else "")
        words.append(f"Fits memory, no engine known: {listed}. {why}")
    return words


def sensitivity_table(plan: Plan) -> Table:
    table = table_of("assumption", "values", "$/M out, with prompts", "choice")
    for item in plan.sensitivities:
        costs = [
            "none" if point.option is None else dollars(point.option.cost.per_mtok_whole.value) for point in item.points
        ]
        changed = [f"{point.value:g}" for point in item.points if point.changed]
        table.add_row(
            item.name,
            " / ".join(f"{point.value:g}" for point in item.points),
            " / ".join(costs),
            f"another at {', '.join(changed)}" if changed else "the same",
        )
    return table


def maker_words(plan: Plan) -> list[str]:
    model, maker = plan.question.model, plan.maker
    licence = model.licence or maker.licence
    source = model.licence_source if model.licence else maker.licence_source
    return [f"Weights by {maker.name}, licence {licence} ({source}).", *maker.notes]


def compare_table(plans: Sequence[Plan]) -> Table:
    """Several hardware options side by side, each with its chosen option."""
    table = table_of("hardware", "layout", "engine", "TTFT p90", "TPOT p90", "tok/s/GPU", "$/h", "$/M out*", "SLOs")
    for plan in plans:
        option, candidate = plan.chosen, plan.chosen.candidate
        rate = (option.speed.input_rate.value + option.speed.output_rate.value) / candidate.layout.gpus
        table.add_row(
            f"{candidate.gpus} x {candidate.gpu.name}",
            layout_name(option),
            engines()[candidate.engine].name + (" MTP" if candidate.mtp else ""),
            seconds(option.speed.ttft.p90.value),
            seconds(option.speed.tpot.p90.value),
            f"{rate:,.0f}",
            dollars(option.cost.per_hour.value),
            dollars(option.cost.per_mtok_whole.value),
            "met" if option.speed.meets_slo else "not met",
        )
    return table


def refusal_lines(refusals: Mapping[str, str]) -> list[str]:
    """Why other hardware has no plan."""
    return [f"{name}: {why}" for name, why in refusals.items()]


def _in_flight(option: Option) -> float:
    return option.speed.concurrency


def table_of(*columns: str) -> Table:
    """An empty table; columns of numbers are set to the right."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for index, name in enumerate(columns):
        numeric = index > 0 and name not in ("layout", "engine", "values", "choice", "between", "SLOs", "")
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    return table


def _wrapped(texts: Sequence[str], width: int = 100) -> list[str | Table]:
    return ["\n".join(textwrap.wrap(text, width)) for text in texts]


def _bulleted(texts: Sequence[str], wrap: Callable[..., list[str]] = textwrap.wrap) -> list[str | Table]:
    return ["\n".join(wrap(f"- {text}", 100, subsequent_indent="  ")) for text in texts]
