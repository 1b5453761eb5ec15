"""What a deployment costs, rented or owned, and from what volume it is cheaper than an API. Torch-free.

A fleet is sized for the peak hour and paid for around the clock; with n replicas of capacity C requests a second, a
spare or more, and a load whose mean is u of its peak, it serves n·C·u requests a second on average. Cost has a fixed
part (staff, spares) and a step a replica; an API's bill is a straight line. Where they cross is solved exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from freehold.errors import InvalidRequest
from freehold.plan.prices import HOURS_A_MONTH, Api, Owning, Tokens, assumption_sources
from freehold.plan.types import Basis, Cost, Figure, Gpu

Tenure = Literal["rent", "own"]
_HOURS_A_YEAR = 365.25 * 24
_SECONDS_A_MONTH = HOURS_A_MONTH * 3600


@dataclass(frozen=True)
class Weights:
    """GPU time that one token of each kind takes, in any unit: how a shared bill is divided."""

    uncached: float
    cached: float
    output: float

    def __post_init__(self) -> None:
        if min(self.uncached, self.cached, self.output) < 0 or self.output <= 0:
            raise ValueError(f"{self} cannot divide a bill")

    def of(self, tokens: Tokens) -> float:
        return tokens.uncached * self.uncached + tokens.cached * self.cached + tokens.output * self.output


@dataclass(frozen=True)
class Economics:
    """What a replica costs and can do.

    hour: US dollars a replica and hour. capacity: requests a second that one replica serves within the SLOs.
    utilisation: mean load over the load that the fleet is sized for. spare: replicas beyond those the peak needs.
    staff: US dollars a month, whatever the size. tokens: of a mean request. gpus: of a replica.
    """

    hour: Figure
    capacity: Figure
    utilisation: float
    spare: int
    staff: float
    tokens: Tokens
    gpus: int

    def __post_init__(self) -> None:
        if not 0 < self.utilisation <= 1:
            raise InvalidRequest(f"a utilisation of {self.utilisation}: it is a share above 0, at most 1")
        if self.spare < 0 or self.staff < 0 or not math.isfinite(self.staff):
            raise InvalidRequest("spares and staff cannot be negative")

    def replicas(self, requests: float) -> int:
        """Replicas for a mean of `requests` a month, spares included."""
        return _replicas_at(self, requests, self.capacity.value)


@dataclass(frozen=True)
class Crossing:
    """Volumes in requests a month. first: from where self-hosting is cheaper than the API; settled: from where it
    stays so as machines are added. None: never.
    """

    first: float | None
    settled: float | None


@dataclass(frozen=True)
class Crossover:
    """Against one API: the crossing as expected, and with every figure at its good and at its bad end.

    tokens: of a mean request here. api_tokens: of the same request at the API, whose model may need more or fewer.
    per_request: US dollars at the API.
    """

    api: Api
    expected: Crossing
    best: Crossing
    worst: Crossing
    tokens: Tokens
    api_tokens: Tokens
    per_request: float


@dataclass(frozen=True)
class Point:
    """Cost of a million output tokens at one volume (requests a month): ours with its interval, and the API's."""

    requests: float
    replicas: int
    ours: float
    low: float
    high: float
    api: float


def gpu_hour(gpu: Gpu, tenure: Tenure, owning: Owning, *, price: float | None = None) -> Figure:
    """US dollars a GPU and hour. price: what is paid for it, rent an hour or price to buy, instead of the table's.

    Owning: depreciation, capital, upkeep, electricity at PUE, and the rack. Where no price to buy is known, an
    analyst's cost of owning. Raises InvalidRequest if no price is known at all, or if it is negative.
    """
    if price is not None and not (math.isfinite(price) and price >= 0):
        raise InvalidRequest(f"a price of {price} for a GPU: it must be a number, and not negative", param="price")
    if tenure == "rent":
        if price is not None:
            return Figure.exact(price, "rent as given")
        if gpu.rent is None:
            raise InvalidRequest(f"no rent is known for {gpu.name}; give --gpu-price, or --own", param="gpu-hour")
        where = gpu.sources["rent"].where if "rent" in gpu.sources else "market"
        return Figure(gpu.rent.typical, gpu.rent.low, gpu.rent.high, "measured", f"rent: {where}")
    if price is None and gpu.capex is None:
        if gpu.owned is None:
            raise InvalidRequest(f"no price to buy {gpu.name} is known; give --gpu-price", param="gpu-price")
        where = gpu.sources["owned"].where if "owned" in gpu.sources else "an analyst"
        value, spread = gpu.owned, owning.spread
        return Figure(value, value * (1 - spread), value * (1 + spread), "interpolated", f"owning: {where}")
    bought = price if price is not None else gpu.capex
    assert bought is not None
    if not gpu.system and price is None:
        bought *= 1 + owning.chassis
    yearly = bought * (1 / owning.years + owning.capital / 2 + owning.upkeep)
    full_kw = gpu.power * owning.server / 1000
    running = full_kw * owning.busy * owning.pue * owning.kwh + full_kw * owning.rack / HOURS_A_MONTH
    spread = 0.0 if price is not None else owning.spread
    ends = [yearly * factor / _HOURS_A_YEAR + running for factor in (1, 1 - spread, 1 + spread)]
    where = gpu.sources["capex"].where if "capex" in gpu.sources else "table"
    source = "price as given" if price is not None else where
    assumed = assumption_sources()["owning"].where
    return Figure(ends[0], ends[1], ends[2], "interpolated", f"owning: {source}; {assumed}")


def cost_at(economics: Economics, weights: Weights, requests: float, task_output: float | None = None) -> Cost:
    """Cost when `requests` a month are served, by as many replicas as that takes and the spares.

    task_output: output tokens of a task; its prompt grows in proportion. The hourly bill of all replicas and staff is
    divided over the tokens of each kind by the GPU time they take.
    """
    if requests <= 0:
        raise InvalidRequest("cost needs some requests")
    capacity, hour, staff = economics.capacity, economics.hour, economics.staff / HOURS_A_MONTH
    # Capacity matters for how many replicas there are; its interval shows as more or fewer of them.
    bills = [
        _replicas_at(economics, requests, served) * rate + staff
        for served, rate in ((capacity.value, hour.value), (capacity.high, hour.low), (capacity.low, hour.high))
    ]
    per_request = [bill * HOURS_A_MONTH / requests for bill in bills]
    source = f"{economics.replicas(requests)} replicas of {economics.gpus} GPUs, and staff"
    return _divided(economics, weights, bills, per_request, source, task_output)


def cost_of_fleet(economics: Economics, weights: Weights, replicas: int, task_output: float | None = None) -> Cost:
    """Cost of `replicas` and the spares, when each of the former is used as far as `economics` says.

    `economics.capacity` is what one serves in the peak hour, and `economics.utilisation` the mean over that.
    """
    hour, capacity, staff = economics.hour, economics.capacity, economics.staff / HOURS_A_MONTH
    machines = replicas + economics.spare
    bills = [machines * rate + staff for rate in (hour.value, hour.low, hour.high)]
    served = [rate * replicas * economics.utilisation * 3600 for rate in (capacity.value, capacity.high, capacity.low)]
    if min(served) <= 0:
        raise InvalidRequest("cost needs some requests")
    per_request = [bill / requests for bill, requests in zip(bills, served, strict=True)]
    source = f"{machines} replicas of {economics.gpus} GPUs, and staff"
    return _divided(economics, weights, bills, per_request, source, task_output)


def _divided(
    economics: Economics,
    weights: Weights,
    bills: Sequence[float],
    per_request: Sequence[float],
    source: str,
    task_output: float | None,
) -> Cost:
    """bills, per_request: US dollars an hour and a request: as expected, at the good end, at the bad end."""
    unit = weights.of(economics.tokens)

    def figure(of: Sequence[float], where: str, basis: Basis) -> Figure:
        return Figure(of[0], min(of), max(of), basis, where)

    basis = _weaker(economics.hour.basis, economics.capacity.basis)

    def per_mtok(weight: float) -> Figure:
        return figure([cost * weight / unit * 1e6 for cost in per_request], "hourly bill by GPU time", basis)

    task = None
    if task_output is not None:
        if not (math.isfinite(task_output) and task_output > 0):
            raise InvalidRequest(f"a task of {task_output} tokens: it needs some", param="task-tokens")
        factor = task_output / economics.tokens.output
        task = figure([cost * factor for cost in per_request], f"{task_output:,.0f} output tokens a task", basis)
    return Cost(
        per_hour=figure(bills, source, economics.hour.basis),
        per_mtok_input=per_mtok(weights.uncached),
        per_mtok_cached=per_mtok(weights.cached),
        per_mtok_output=per_mtok(weights.output),
        per_mtok_whole=per_mtok(unit / economics.tokens.output),
        per_task=task,
    )


def _weaker(first: Basis, second: Basis) -> Basis:
    """The basis of a product: that of the factor known least well."""
    order: tuple[Basis, ...] = ("exact", "measured", "interpolated", "roofline")
    return max(first, second, key=order.index)


def _replicas_at(economics: Economics, requests: float, capacity: float) -> int:
    peak = requests / _SECONDS_A_MONTH / economics.utilisation
    # A hair of slack: a load of exactly one replica's capacity needs one.
    return max(1, math.ceil(peak / capacity * (1 - 1e-12))) + economics.spare


def crossing(economics: Economics, price: float, *, hour: float, capacity: float) -> Crossing:
    """Where self-hosting crosses an API that takes `price` US dollars a request. hour, capacity: of one replica.

    With n replicas in use of C requests a month each and s spares at R a month, and fixed F, cost (n+s)R + F first
    falls below the bill at the n for which (n+s)R + F <= n·C·price; it stays below from the n after which another
    replica no longer lifts it above.
    """
    month = hour * HOURS_A_MONTH
    serves = capacity * economics.utilisation * _SECONDS_A_MONTH
    gain = serves * price - month
    fixed = economics.spare * month + economics.staff
    if gain <= 0 or price <= 0:
        return Crossing(None, None)

    def bill(used: int) -> float:
        return used * month + fixed

    first = max(1, math.ceil(fixed / gain * (1 - 1e-12)))
    settled = max(1, math.ceil((fixed + month) / gain * (1 - 1e-12)))
    # From `settled` replicas on a further one never lifts the cost above the bill, so the last crossing is there.
    return Crossing(bill(first) / price, bill(settled) / price)


def crossover(economics: Economics, api: Api, *, token_ratio: float = 1.0) -> Crossover:
    """Against one API. token_ratio: output tokens that its model needs for each of ours, for the same work."""
    if not (math.isfinite(token_ratio) and token_ratio > 0):
        raise InvalidRequest(f"a token ratio of {token_ratio}: it must be above 0")
    tokens = economics.tokens
    theirs = Tokens(tokens.prompt, tokens.cached, tokens.output * token_ratio)
    price, hour, capacity = api.of(theirs), economics.hour, economics.capacity
    return Crossover(
        api=api,
        expected=crossing(economics, price, hour=hour.value, capacity=capacity.value),
        best=crossing(economics, price, hour=hour.low, capacity=capacity.high),
        worst=crossing(economics, price, hour=hour.high, capacity=capacity.low),
        tokens=tokens,
        api_tokens=theirs,
        per_request=price,
    )


def month_bill(economics: Economics, requests: float) -> Figure:
    """US dollars a month for `requests` a month: machines and staff."""
    hour, capacity = economics.hour, economics.capacity
    bills = [
        count * rate * HOURS_A_MONTH + economics.staff
        for count, rate in (
            (economics.replicas(requests), hour.value),
            (_replicas_at(economics, requests, capacity.high), hour.low),
            (_replicas_at(economics, requests, capacity.low), hour.high),
        )
    ]
    return Figure(bills[0], min(bills), max(bills), "interpolated", "machines and staff")


def curve(economics: Economics, price: float, volumes: Sequence[float]) -> list[Point]:
    """Cost of a million output tokens at each of `volumes` (requests a month), against `price` a request."""
    points = []
    for requests in volumes:
        bill = month_bill(economics, requests)
        mtok = requests * economics.tokens.output / 1e6
        points.append(
            Point(
                requests=requests,
                replicas=economics.replicas(requests),
                ours=bill.value / mtok,
                low=bill.low / mtok,
                high=bill.high / mtok,
                api=price * requests / mtok,
            )
        )
    return points
