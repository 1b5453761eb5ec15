"""Efficiencies: those that Freehold comes with, and one's own, which `freehold plan calibrate` writes. Torch-free."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from freehold.errors import ConfigError, InvalidRequest
from freehold.model.cache_layout import LATENT_FORMATS
from freehold.plan.lengths import Lengths
from freehold.plan.measured import table
from freehold.plan.precedents import Row
from freehold.plan.roofline import Efficiencies
from freehold.plan.types import ENGINES, Layout, Source


def bundled() -> Efficiencies:
    """The efficiencies that Freehold comes with."""
    return Efficiencies(**table()["efficiencies"])


def efficiencies_toml(efficiencies: Efficiencies, runs: Sequence[Row]) -> str:
    """A file for `read_kept`. runs: what they were fitted to, which then stand beside predictions of the same setup."""
    values = "".join(f"{name} = {value:.6g}\n" for name, value in efficiencies.as_dict().items())
    text = f"# Efficiencies of the planner's step-time model, and the runs they are fitted to\n[efficiencies]\n{values}"
    for run in runs:
        entries = "".join(f"{name} = {json.dumps(value)}\n" for name, value in _entry(run).items() if value is not None)
        text += f"\n[[runs]]\n{entries}"
    return text


def _entry(run: Row) -> dict[str, Any]:
    entry = {item.name: getattr(run, item.name) for item in fields(Row)}
    layout: Layout = entry.pop("layout")
    source: Source = entry.pop("source")
    entry |= {"tp": layout.tp, "dp": layout.dp, "ep": layout.ep, "source": source.where, "date": source.date}
    return entry | {name: [entry[name].low, entry[name].high] for name in ("prompt", "output")}


def read_kept(path: str | Path) -> tuple[Efficiencies, tuple[Row, ...]]:
    """What `efficiencies_toml` wrote. Raises ConfigError that names what is missing, unknown or impossible."""
    path = Path(path)
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: not readable as TOML: {error}") from None
    values = raw.get("efficiencies")
    names = [item.name for item in fields(Efficiencies)]
    if set(raw) - {"runs"} != {"efficiencies"} or not isinstance(values, dict) or set(values) != set(names):
        raise ConfigError(f"{path}: expected one table [efficiencies] with {', '.join(names)}")
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values.values()):
        raise ConfigError(f"{path}: efficiencies are numbers")
    try:
        kept = Efficiencies(**{name: float(value) for name, value in values.items()})
        return kept, tuple(_row(entry) for entry in raw.get("runs", ()))
    except (ValueError, TypeError, KeyError, InvalidRequest) as error:
        raise ConfigError(f"{path}: {error!s}") from None


def _row(entry: Mapping[str, Any]) -> Row:
    """Raises KeyError, TypeError, ValueError and InvalidRequest for what is no run."""
    known = {item.name for item in fields(Row)} - {"layout"} | {"tp", "dp", "ep", "date"}
    if unknown := sorted(set(entry) - known):
        raise ValueError(f"a run has no {unknown[0]!r}")
    if missing := sorted(known - {"ttft", "tpot"} - set(entry)):
        raise ValueError(f"a run lacks {missing[0]!r}")
    times = [None if name not in entry else float(entry[name]) for name in ("ttft", "tpot")]
    if any(time is not None and not 0 < time < math.inf for time in times):
        raise ValueError(f"times of a run are above 0, not {times}")
    (engine,) = (engine for engine in ENGINES if engine == entry["engine"])
    (cache,) = (cache for cache in LATENT_FORMATS if cache == entry["cache"])
    return Row(
        str(entry["model"]),
        str(entry["gpu"]),
        engine,
        Layout(tp=int(entry["tp"]), dp=int(entry["dp"]), ep=int(entry["ep"])),
        cache,
        Lengths(*(int(end) for end in entry["prompt"])),
        Lengths(*(int(end) for end in entry["output"])),
        int(entry["concurrency"]),
        int(entry["drafts"]),
        float(entry["acceptance"]),
        times[0],
        times[1],
        Source(str(entry["source"]), str(entry["date"])),
    )
