"""Which rows of the ledger are asked for: one condition for every reader."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True, slots=True)
class Filter:
    """Rows for which all that is given holds. since, until: epoch seconds, until excluded."""

    since: float | None = None
    until: float | None = None
    request_id: str | None = None
    alias: str | None = None
    model_id: str | None = None
    upstream: str | None = None
    key_id: str | None = None
    team: str | None = None
    prompt_name: str | None = None
    prompt_version: str | None = None
    task: str | None = None
    experiment: str | None = None
    shadows: bool = True  # mirrored calls too

    def sql(self) -> tuple[str, tuple[Any, ...]]:
        """The condition, with $1, $2, ... in it, and their values. Column names are those of `calls`."""
        parts: list[str] = []
        values: list[Any] = []
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            if name == "shadows":
                if not value:
                    parts.append("shadow_of = ''")
                continue
            if value is None:
                continue
            values.append(value)
            column, relation = {"since": ("at", ">="), "until": ("at", "<")}.get(name, (name, "="))
            parts.append(f"calls.{column} {relation} ${len(values)}")
        return " AND ".join(parts) or "1 = 1", tuple(values)


NAMES = tuple(field.name for field in fields(Filter) if field.name not in ("since", "until", "shadows"))
"""What rows are chosen by, besides the time."""
