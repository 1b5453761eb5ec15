"""`freehold inspect`: show what a checkpoint holds, from its headers only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console, JustifyMethod
    from rich.table import Table

    from freehold.model.inspect import Inspection


def inspect(
    source: Annotated[
        str,
        typer.Argument(
            metavar="DIR|NAME",
            help="A checkpoint directory, a config.json, or glm-5, glm-5.1, glm-5.2, glm-5.2-fp8, glm-5.3.",
            show_default=False,
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Also check SHA256SUMS; reads every byte.")] = False,
) -> None:
    """Show what a checkpoint holds, from its headers only."""
    from rich.console import Console

    from freehold.cli.progress import byte_progress
    from freehold.errors import CheckpointError
    from freehold.model.inspect import inspect as look

    with byte_progress("verifying") as progress:
        report = look(source, verify=verify, progress=progress)
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=2))
    else:
        _print(report, Console(highlight=False))
    if report.problems:
        raise typer.Exit(CheckpointError.exit_code)


def _print(report: Inspection, console: Console) -> None:
    from rich.markup import escape

    where = {
        "checkpoint": f"{report.shards} shards" if report.shards != 1 else "1 shard",
        "config": "config only: sizes are what it calls for",
        "published": "bundled config: sizes are what it calls for",
    }[report.kind]
    console.print(f"[bold]{escape(report.source)}[/bold] ({where})")
    console.print(_facts(report))
    console.print(_bytes_table(report))
    console.print(_cache_table(report))
    for problem in report.problems:
        console.print(f"[red]problem:[/red] {escape(problem)}", soft_wrap=True)
    for note in report.notes:
        console.print(f"note: {escape(note)}", soft_wrap=True)
    if report.kind == "checkpoint" and not report.problems:
        console.print("Every tensor the config calls for is there, with its shape and dtype, and no other.")
    if report.verified_files is not None:
        console.print(f"SHA256SUMS: all {report.verified_files} files listed are unchanged.")


def _facts(report: Inspection) -> Table:
    from rich.table import Table

    config, layers, parameters = report.config, report.layers, report.parameters
    table = Table.grid(padding=(0, 2))
    eos = ", ".join(map(str, config.eos_token_ids))
    rows = {
        "layers": f"{layers.decoder}: {layers.full_indexer} with an indexer, {layers.shared_indexer} sharing one; "
        f"{layers.dense_mlp} dense, {layers.sparse_mlp} sparse; {layers.mtp} MTP layer",
        "experts": f"{config.n_routed_experts} routed, {config.num_experts_per_tok} of them a token; "
        f"{config.n_shared_experts} shared",
        "weights": f"{parameters.total:,} (of them {parameters.mtp:,} in the MTP layer), "
        f"and {parameters.correction_bias:,} fp32 correction biases",
        "active": f"{parameters.active:,} a token (matrices and head; without embedding lookup, norms and MTP)",
        "tensors": f"{report.tensors:,}",
        "context": f"{config.max_position_embeddings:,} tokens, {config.index_topk:,} attended",
        "quantisation": report.quantization,
        "template": report.template,
        "end tokens": eos,
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _bytes_table(report: Inspection) -> Table:
    from rich.table import Table

    title = f"Weights: {_human(report.total_bytes)}, {report.bits_per_weight:.2f} bits a weight"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2))
    table.add_column("by part")
    table.add_column("bytes", justify="right")
    table.add_column("share", justify="right")

    def add(groups: Mapping[str, int]) -> None:
        for name, nbytes in groups.items():
            table.add_row(name, f"{nbytes:,}", f"{nbytes / max(report.total_bytes, 1):.1%}")

    add(report.bytes_by_part)
    table.add_row("[bold]by dtype[/bold]")
    add(report.bytes_by_dtype)
    table.add_row("[bold]total[/bold]", f"{report.total_bytes:,}", "")
    return table


def _cache_table(report: Inspection) -> Table:
    from rich.table import Table

    length = report.config.max_position_embeddings
    table = Table(
        title=f"Cache: bytes a layer, a token, and for {length:,} tokens",
        title_justify="left",
        box=None,
        padding=(0, 1),
    )
    # Narrow enough for 80 columns: a cell that wraps would tear a number in two.
    for heading in ("latent", "layer", "index", "layer", "token", "+MTP", "all tokens"):
        justify: JustifyMethod = "left" if heading in ("latent", "index") else "right"
        table.add_column(heading, justify=justify, no_wrap=True)
    for row in report.caches:
        table.add_row(
            row.latent,
            f"{report.latent_bytes[row.latent]:,}",
            row.index,
            f"{report.index_key_bytes[row.index]:,}",
            f"{row.per_token:,}",
            f"{row.per_token_mtp:,}",
            _human(row.max_context),
        )
    return table


def _human(nbytes: int) -> str:
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if nbytes >= size:
            return f"{nbytes / size:,.2f} {unit}"
    return f"{nbytes:,} B"
