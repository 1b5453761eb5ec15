"""`freehold bench`: where an engine's time goes, beside the roofline; what 8-bit caches do to a model's predictions."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from statistics import quantiles
from typing import TYPE_CHECKING, Annotated

import typer

from freehold.cli.cache_as import IndexCacheOption, LatentCacheOption, Stored
from freehold.cli.compared import print_comparison, read_text
from freehold.cli.quantize_as import QuantizeAs
from freehold.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console
    from rich.table import Table

    from freehold.engine.bench.report import BenchReport, Scenario
    from freehold.model.packing import Quantize
    from freehold.model.tokenizer import Tokenizer


_CONTEXT, _BATCH, _PREFILL, _SAMPLES = "128,4096", "1", "512", 30
_DEFAULTS = (_CONTEXT, _BATCH, _PREFILL, _SAMPLES, Stored.AUTO, Stored.AUTO)
_STEADY = 0.2  # of the median: a wider spread of the middle half of the samples is said


class Subject(StrEnum):
    ENGINE = "engine"
    CACHES = "caches"


_NAMES = {
    "indexer.project": "indexer: projections",
    "indexer.select": "indexer: scores, top k",
    "attention.project": "attention: projections",
    "attention.write": "attention: cache write",
    "attention.attend": "attention: attend",
    "router": "router",
    "experts": "routed experts",
    "mlp": "dense, shared MLP",
    "norms": "norms and residual",
    "head": "head",
    "sampling": "sampling",
    "scheduler": "scheduler, batch",
    "tokenizer": "tokenizer",
    "other": "other",
}


def bench(
    what: Annotated[Subject, typer.Argument(help="What to measure.", show_default=False)],
    directory: Annotated[Path, typer.Argument(help="A checkpoint directory.", show_default=False)],
    context: Annotated[str, typer.Option(help="Decode at these contexts; '' for none.")] = _CONTEXT,
    batch: Annotated[str, typer.Option(help="Decode with so many requests at a time.")] = _BATCH,
    prefill: Annotated[str, typer.Option(help="Compute prompts of these lengths; '' for none.")] = _PREFILL,
    samples: Annotated[int, typer.Option(help="Steps measured for each figure.", min=3, max=10_000)] = _SAMPLES,
    quantize: QuantizeAs = None,
    index_cache: IndexCacheOption = Stored.AUTO,
    latent_cache: LatentCacheOption = Stored.AUTO,
    text: Annotated[
        Path | None, typer.Option(help="caches: compare predictions on this text file.", show_default=False)
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Compute threads.", min=1, show_default="one a core")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure where time goes, or what 8-bit caches cost in quality."""
    from rich.console import Console

    scheme: Quantize | None = None if quantize is None else quantize.value
    if what is Subject.CACHES:
        if (context, batch, prefill, samples, index_cache, latent_cache) != _DEFAULTS:
            raise InvalidRequest(
                "bench caches runs a text with every format of the caches: of the options it takes --text, "
                "--quantize, --threads and --json"
            )
        return _caches(directory, text, scheme, threads, as_json)
    if text is not None:
        raise InvalidRequest("--text is for bench caches", param="text")

    from freehold.cli.progress import byte_progress
    from freehold.engine.bench.run import BenchOptions, bench_engine

    options = BenchOptions(
        contexts=parse_sizes("context", context),
        batches=parse_sizes("batch", batch),
        prefills=parse_sizes("prefill", prefill),
        samples=samples,
        threads=threads,
        quantize=scheme,
        index_cache=index_cache.value,
        latent_cache=latent_cache.value,
    )
    say = _say if sys.stderr.isatty() else lambda text: None
    with byte_progress(f"loading {directory.name}") as progress:
        report = bench_engine(directory, options, _detokenizer, progress=progress, say=say)
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=2))
    else:
        _print(report, Console(highlight=False))


def _caches(directory: Path, file: Path | None, scheme: Quantize | None, threads: int | None, as_json: bool) -> None:
    """Compare the predictions with each way of storing the caches."""
    from rich.console import Console

    from freehold.cli.progress import count_progress
    from freehold.engine.compare import compare_caches
    from freehold.engine.loading import EngineOptions

    if file is None:
        raise InvalidRequest("bench caches needs a text to run: give --text FILE", param="text")
    text, console = read_text(file, "text"), Console(highlight=False)
    with count_progress("comparing", "tokens") as progress:
        compared = compare_caches(directory, text, EngineOptions(quantize=scheme, threads=threads), progress=progress)
    if as_json:
        typer.echo(json.dumps({"caches": [each.as_dict() for each in compared]}, indent=2))
        return
    for each in compared:
        print_comparison(each.comparison, console)
        share = each.bytes_per_token / each.bytes_as_computed
        console.print(f"{each.bytes_per_token:,} bytes a token, {share:.1%} of {each.bytes_as_computed:,}.\n")


def parse_sizes(name: str, text: str) -> tuple[int, ...]:
    """`128,4096` as numbers; () for an empty text. Raises InvalidRequest."""
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise InvalidRequest(f"--{name} {text!r}: give positive whole numbers with commas between, such as 128,4096")
    return tuple(dict.fromkeys(map(int, parts)))


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _detokenizer(tokenizer: Tokenizer) -> Callable[[int], object]:
    from freehold.serve.detokenize import Detokenizer

    return Detokenizer(tokenizer).feed


def _print(report: BenchReport, console: Console) -> None:
    from rich.markup import escape

    ceilings = report.ceilings
    kernels = f"{report.ops} ({report.isa})" if report.isa else report.ops
    formats = sorted(set(report.formats.values()))
    console.print(
        f"[bold]{escape(report.model)}[/bold]: {report.dtype}, weights in {', '.join(formats)}, latents in "
        f"{report.latent}, index keys in {report.index}, {kernels} operations, {report.threads} threads"
    )
    console.print(
        f"{escape(report.cpu)}: reads {ceilings.bytes_per_second / 1e9:.1f} GB/s from memory, multiplies matrices at "
        f"{ceilings.flops_per_second / 1e9:,.0f} GFLOP/s (measured now, with as many threads)"
    )
    for scenario in report.scenarios:
        console.print()
        console.print(_table(scenario))
        extra = scenario.overhead_seconds / scenario.seconds
        low, _, high = quantiles(scenario.samples, n=4)
        if high - low > _STEADY * scenario.seconds:
            console.print(f"[yellow]The machine was busy:[/yellow] half the steps took {_ms(low)} to {_ms(high)} ms.")
        console.print(
            f"{scenario.tokens_per_second:,.1f} tokens/s of {scenario.bound_tokens_per_second:,.1f} that the roofline "
            f"allows. Profiling took {_ms(scenario.overhead_seconds)} ms ({extra:+.1%}) more."
        )
    if any(scenario.cache == "random" for scenario in report.scenarios):
        console.print()
        console.print("Decodes started from a cache filled with random values and were fed random tokens; greedy.")


def _table(scenario: Scenario) -> Table:
    from rich.table import Table

    first, last = scenario.context_range
    if scenario.kind == "decode":
        many = f"{scenario.batch} requests" if scenario.batch > 1 else "1 request"
        title = f"decode step, {many} at {scenario.context:,} (positions {first:,} to {last:,})"
    else:
        title = f"prefill of {scenario.context:,} tokens, to the first token"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1))
    table.add_column("part")
    for heading in ("ms", "share", "roofline ms", "bound by", "reached"):
        table.add_column(heading, justify="right", no_wrap=True)
    for part in scenario.parts:
        table.add_row(
            _NAMES[part.part],
            _ms(part.seconds),
            f"{part.share:.1%}",
            "" if part.bound_seconds is None else _ms(part.bound_seconds),
            part.bound_by or "",
            "" if part.fraction is None else f"{part.fraction:.0%}",
        )
    parts = sum(part.seconds for part in scenario.parts)
    table.add_row("[bold]sum of the parts[/bold]", _ms(parts), "100.0%")
    table.add_row("step, profiled", _ms(scenario.profiled_seconds))
    bound = _ms(scenario.bound_seconds)
    table.add_row("[bold]step, not profiled[/bold]", _ms(scenario.seconds), "", bound, "", f"{scenario.fraction:.0%}")
    return table


def _ms(seconds: float) -> str:
    """Milliseconds with three digits that say something."""
    ms = seconds * 1e3
    return f"{ms:,.0f}" if abs(ms) >= 1000 else f"{ms:.1f}" if abs(ms) >= 100 else f"{ms:.3f}"
