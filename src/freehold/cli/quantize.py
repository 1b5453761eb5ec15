"""`freehold quantize`: write an int8, int4 or FP8 copy of a checkpoint, and say what that costs in quality."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from freehold.cli.compared import print_comparison, read_text

if TYPE_CHECKING:
    from rich.console import Console

    from freehold.engine.compare import Comparison
    from freehold.model.quantize_report import QuantizationReport

_WORST = 5  # tensors shown; the report file has them all


def quantize(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="The checkpoint: BF16, FP16, FP32 or FP8.")],
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="Where to write the copy; never overwritten. With --compare alone: read."),
    ],
    scheme: Annotated[
        Literal["int8", "int4", "fp8"] | None,
        typer.Option(help="int8; int4 (head, indexer and MTP int8); fp8 (as the published builds). Makes OUT."),
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(metavar="TEXT", help="Run DIR and OUT on this text file and compare their predictions."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write an int8, int4 or FP8 copy of a checkpoint, and measure it."""
    from rich.console import Console

    from freehold.errors import InvalidRequest

    if scheme is None and compare is None:
        raise InvalidRequest("give --scheme int8, int4 or fp8 to write OUT, --compare TEXT to compare it, or both")
    text = None if compare is None else read_text(compare, "compare")
    console = Console(highlight=False)
    result: dict[str, Any] = {}
    if scheme is not None:
        report = _write(source, out, scheme)
        result["quantized"] = report.as_dict()
        if not as_json:
            _print_report(report, out, console)
    if text is not None:
        comparison = _compare(source, out, text)
        result["compared"] = comparison.as_dict()
        if not as_json:
            print_comparison(comparison, console)
    if as_json:
        typer.echo(json.dumps(result, indent=2))


def _write(source: Path, out: Path, scheme: Literal["int8", "int4", "fp8"]) -> QuantizationReport:
    from freehold.cli.progress import byte_progress
    from freehold.model.quantize import quantize_checkpoint

    with byte_progress(f"writing {scheme}") as progress:
        return quantize_checkpoint(source, out, scheme, progress=progress)


def _compare(source: Path, out: Path, text: str) -> Comparison:
    from freehold.cli.progress import count_progress
    from freehold.engine.compare import compare_checkpoints

    with count_progress("comparing", "tokens") as progress:
        return compare_checkpoints(source, out, text, progress=progress)


def _print_report(report: QuantizationReport, out: Path, console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    from freehold.model.quantize_report import REPORT_NAME, by_kind

    kept = f", {report.kept_shards} of them from an interrupted run" if report.kept_shards else ""
    console.print(
        f"[bold]{escape(str(out))}[/bold]: {report.total_bytes:,} bytes, {report.bits_per_weight:.2f} bits a weight "
        f"(was {report.source_bytes:,} bytes); {report.shards} shard{'s' if report.shards > 1 else ''}{kept}",
        soft_wrap=True,
    )
    table = Table(title="Error of the weights (RMS, relative)", title_justify="left", box=None, padding=(0, 1, 0, 0))
    for heading in ("part", "stored as", "matrices", "weights", "error", "worst", "SNR dB"):
        table.add_column(heading, justify="left" if heading in ("part", "stored as") else "right", no_wrap=True)
    for kind in by_kind(report.errors):
        table.add_row(
            kind.part,
            kind.stored,
            f"{kind.tensors:,}",
            f"{kind.weights:,}",
            f"{kind.relative_rms:.3%}",
            f"{kind.worst:.3%}",
            f"{kind.snr_db:.1f}",
        )
    console.print(table)
    console.print("Worst matrices:")
    for error in report.worst_first[:_WORST]:
        figures = f"{error.relative_rms:.3%}, largest {error.max_abs:.2e}, cosine {error.cosine:.6f}"
        console.print(f"  {escape(error.name)}  {figures}", soft_wrap=True)
    console.print(f"All of them: {escape(str(out / REPORT_NAME))}", soft_wrap=True)
