"""Prices and cost assumptions: the table `prices.toml`. Torch-free."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Any

from freehold.errors import InvalidRequest
from freehold.plan.types import Source

HOURS_A_MONTH = 365.25 * 24 / 12
_WEEKDAYS, _DAYS = 5, 7


@dataclass(frozen=True)
class Tokens:
    """Tokens of one request or task. cached: those of the prompt that a prefix cache answers, part of `prompt`."""

    prompt: float
    cached: float
    output: float

    def __post_init__(self) -> None:
        numbers = (self.prompt, self.cached, self.output)
        if not all(math.isfinite(number) and number >= 0 for number in numbers) or self.cached > self.prompt:
            raise InvalidRequest(f"{self} is no mix of tokens: none may be negative, and cached ones are of the prompt")
        if self.output <= 0:
            raise InvalidRequest("a request needs output tokens to have a price")

    @property
    def uncached(self) -> float:
        return self.prompt - self.cached

    def scaled(self, factor: float) -> Tokens:
        return Tokens(self.prompt * factor, self.cached * factor, self.output * factor)


@dataclass(frozen=True)
class Api:
    """What an API charges for a million tokens. cached: None if it charges them as any input."""

    key: str
    model: str
    provider: str
    region: str
    input: float
    output: float
    cached: float | None
    source: Source

    def __post_init__(self) -> None:
        for price in (self.input, self.output, self.cached or 0.0):
            if not (math.isfinite(price) and price >= 0):
                raise InvalidRequest(f"a price of {price} for {self.key}: it must be a number, and not negative")

    def of(self, tokens: Tokens) -> float:
        """US dollars for these tokens."""
        cached = self.input if self.cached is None else self.cached
        return (tokens.uncached * self.input + tokens.cached * cached + tokens.output * self.output) / 1e6


@dataclass(frozen=True)
class Owning:
    """What owning machines costs besides their price. Shares are of the price unless a name says otherwise.

    years: of straight-line depreciation. capital: yearly, on half of the price. upkeep: yearly. chassis: server and
    switches, where a GPU's price is of the GPU alone. spread: how far prices are known. server: greatest power of a
    server over its GPUs'. busy, idle: mean power over the greatest. kwh: US dollars. rack: US dollars a kW and month.
    """

    years: float
    capital: float
    upkeep: float
    chassis: float
    spread: float
    server: float
    busy: float
    idle: float
    pue: float
    kwh: float
    rack: float

    def __post_init__(self) -> None:
        for name in (item.name for item in fields(self)):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InvalidRequest(f"{name} is {value}: it must be a number, and not negative", param=name)
        if self.years <= 0:
            raise InvalidRequest("years is 0: a machine is depreciated over some time", param="years")
        if self.pue < 1:
            raise InvalidRequest(f"pue is {self.pue}: a site uses at least what its machines do", param="pue")
        if self.spread >= 1 or self.idle > self.busy or self.busy > 1:
            raise InvalidRequest("spread must be below 1, and idle <= busy <= 1")


@dataclass(frozen=True)
class Profile:
    """How load goes through the week. mean: over the peak hour. source: where it is from."""

    name: str
    mean: float
    hours: tuple[float, ...]
    weekend: float
    source: str


@dataclass(frozen=True)
class Maker:
    """Who made the weights, under which licence they were published, and what to know before running them."""

    name: str
    licence: str
    licence_source: str
    notes: tuple[str, ...]


@cache
def _table() -> Mapping[str, Any]:
    return tomllib.loads(resources.files("freehold.plan").joinpath("prices.toml").read_text(encoding="utf-8"))


@cache
def apis() -> Mapping[str, Api]:
    """Every API price of the table, by key."""
    found = {
        key: Api(
            key,
            entry["model"],
            entry["provider"],
            entry["region"],
            float(entry["input"]),
            float(entry["output"]),
            float(entry["cached"]) if "cached" in entry else None,
            Source(entry["source"], entry["date"]),
        )
        for key, entry in _table()["api"].items()
    }
    return MappingProxyType(found)


def api(text: str) -> Api:
    """An API by its key, by a part that only one key has, or as prices: "1.4/0.26/4.4" (input/cached/output) or
    "1.4/4.4". Raises InvalidRequest.
    """
    wanted = " ".join(text.lower().split())
    if "/" in wanted:
        return _given(text)
    known = apis()
    if wanted in known:
        return known[wanted]
    holding = [key for key in known if wanted in key]
    if len(holding) == 1:
        return known[holding[0]]
    if holding:
        raise InvalidRequest(f"--api {text!r} could be {', '.join(holding)}", param="api")
    near = get_close_matches(wanted, known, 1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise InvalidRequest(
        f"no price is known for {text!r}{hint}; there are {', '.join(known)}, or INPUT/CACHED/OUTPUT a million tokens",
        param="api",
    )


def _given(text: str) -> Api:
    parts = text.split("/")
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        numbers = []
    if len(numbers) not in (2, 3):
        raise InvalidRequest(f"--api {text!r}: prices are INPUT/OUTPUT or INPUT/CACHED/OUTPUT", param="api")
    cached = numbers[1] if len(numbers) == 3 else None
    return Api(text, "a model", "an API", "", numbers[0], numbers[-1], cached, Source("as given", ""))


@cache
def owning() -> Owning:
    """What is assumed of owning if nothing is said."""
    table = _table()["owning"]
    return Owning(**{item.name: float(table[item.name]) for item in fields(Owning)})


def owning_with(**given: float | None) -> Owning:
    """The assumptions with some replaced; None leaves one as it is."""
    return replace(owning(), **{name: value for name, value in given.items() if value is not None})


def staff_a_month(engineer: float | None = None, share: float | None = None) -> float:
    """US dollars a month for the people who keep a deployment running, of whatever size."""
    table = _table()["running"]
    engineer = float(table["engineer"]) if engineer is None else engineer
    share = float(table["share"]) if share is None else share
    if not (math.isfinite(engineer * share) and engineer >= 0 and share >= 0):
        raise InvalidRequest("staff cost must be a number, and not negative", param="staff")
    return engineer * share / 12


def assumption_sources() -> Mapping[str, Source]:
    """Where the assumptions of owning and of running are from."""
    return {key: Source(_table()[key]["source"], _table()[key]["date"]) for key in ("owning", "running")}


@cache
def profiles() -> Mapping[str, Profile]:
    """Load profiles by name."""
    found = {}
    for name, entry in _table()["profiles"].items():
        hours = tuple(float(hour) for hour in entry["hours"])
        week = (_WEEKDAYS + (_DAYS - _WEEKDAYS) * entry["weekend"]) / _DAYS
        mean = sum(hours) / len(hours) / max(hours) * week
        found[name] = Profile(name, mean, hours, float(entry["weekend"]), entry["source"])
    return MappingProxyType(found)


def profile(name: str) -> Profile:
    """A load profile by name. Raises InvalidRequest."""
    if name not in profiles():
        raise InvalidRequest(f"profile {name!r} is none of {', '.join(profiles())}", param="profile")
    return profiles()[name]


def maker(model: str) -> Maker:
    """Who made a model, by its name."""
    entry = _table()["makers"]["deepseek" if model.lower().startswith("deepseek") else "glm"]
    return Maker(entry["name"], entry["licence"], entry["licence_source"], tuple(entry["notes"]))
