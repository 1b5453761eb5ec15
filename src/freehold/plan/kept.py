"""Efficiencies: those that Freehold comes with, and one's own, which `freehold plan calibrate` writes. Torch-free."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from freehold.errors import ConfigError
from freehold.plan.measured import table
from freehold.plan.roofline import Efficiencies


def bundled() -> Efficiencies:
    """The efficiencies that Freehold comes with."""
    return Efficiencies(**table()["efficiencies"])


def efficiencies_toml(efficiencies: Efficiencies, sources: Sequence[str]) -> str:
    """A file for `read_efficiencies`. sources: the runs that they were fitted to, noted in comments."""
    runs = "".join(f"# {source}\n" for source in sources)
    values = "".join(f"{name} = {value:.6g}\n" for name, value in efficiencies.as_dict().items())
    return f"# Efficiencies of the planner's step-time model, fitted to\n{runs}\n[efficiencies]\n{values}"


def read_efficiencies(path: str | Path) -> Efficiencies:
    """Raises ConfigError that names what is missing, unknown or impossible."""
    path = Path(path)
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: not readable as TOML: {error}") from None
    values = raw.get("efficiencies")
    names = [item.name for item in fields(Efficiencies)]
    if set(raw) != {"efficiencies"} or not isinstance(values, dict) or set(values) != set(names):
        raise ConfigError(f"{path}: expected one table [efficiencies] with {', '.join(names)}")
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values.values()):
        raise ConfigError(f"{path}: efficiencies are numbers")
    try:
        return Efficiencies(**{name: float(value) for name, value in values.items()})
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
