"""The table of a comparison of predictions, and reading the text that they are compared on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from freehold.engine.compare import Comparison


def read_text(file: Path, param: str) -> str:
    """The text of a UTF-8 file. Raises InvalidRequest, which names `param`."""
    from freehold.errors import InvalidRequest

    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InvalidRequest(f"{file}: cannot be read: {reason}", param=param) from None


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Positions by how sparse their attention is, one row each, and all of them."""
    from rich.markup import escape
    from rich.table import Table

    title = (
        f"{escape(comparison.other)} against {escape(comparison.original)}: {comparison.tokens:,} tokens, "
        f"{comparison.windows} window{'s' if comparison.windows > 1 else ''}"
    )
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    for heading in ("positions", "count", "KL mean", "median", "p99", "same top 1", "perplexity", "change"):
        table.add_column(heading, justify="left" if heading == "positions" else "right", no_wrap=True)
    for bucket in (*comparison.buckets, comparison.total):
        name = "all"
        if bucket is not comparison.total:
            name = f"{bucket.start:,} and on" if bucket.stop is None else f"{bucket.start:,} to {bucket.stop - 1:,}"
        table.add_row(
            name,
            f"{bucket.positions:,}",
            f"{bucket.kl_mean:.2e}",
            f"{bucket.kl_median:.2e}",
            f"{bucket.kl_p99:.2e}",
            f"{bucket.top1:.2%}",
            f"{bucket.perplexity:.4g}",
            f"{bucket.perplexity_change:+.2%}",
        )
    console.print(table)
    console.print(f"KL in nats. From position {comparison.index_topk:,} on, attention is sparse.")
