"""Fit the few efficiencies of the step-time model to measured runs, and say how far runs lie from it. Torch-free.

    fitted = fit(runs())
    print(residuals(runs(), fitted))

A run's mean TTFT and TPOT are sums of amounts by cause times factors (`simulate.Served`), so with the schedule given
they are linear in the factors. A fit simulates all runs, solves for the factors that make relative errors small (in
absolute value, nearly: single runs are off by a third for reasons of their own), and repeats until they stay. Factors
are bounded by physics (no more than the peak, no negative times) and, where runs say little, drawn to what is usual:

    memory                           0.83 of the peak, as large copies reach
    links                            0.7 of the peak, as large all-reduces reach
    launches, sequences, requests    nothing, unless runs show it: they can stand for one another where runs are few

Seven numbers stand for all hardware, models and precisions; rows are never fitted one by one. What is counted (the
kernels of a layer, how evenly rows choose experts, what is usual) was decided with the bundled runs in sight, so errors
of groups left out flatter a little; the runs under `measured.checks` were not in sight.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from freehold.errors import InvalidRequest
from freehold.plan.kept import bundled
from freehold.plan.measured import Measured, runs
from freehold.plan.roofline import CAUSES, Efficiencies, Work
from freehold.plan.simulate import Served

_SMALL = 0.03  # relative errors below are as good as none
_STILL = 0.004  # mean relative change of what is predicted, at which a fit has arrived
_ROUNDS, _REWEIGHTINGS, _SWEEPS = 6, 30, 4000
_LOWEST = np.array([float(cause in ("memory", "compute", "links")) for cause in CAUSES])
_USUAL = {"memory": (1 / 0.83, 3.0), "links": (1 / 0.7, 2.0)}  # factor, strength
_COST = {"launches": 30e-6, "sequences": 30e-6, "requests": 50e-3}  # a size at which it counts
_COST_STRENGTH = 0.3
START = Efficiencies(
    memory=0.83, compute=0.11, links=0.7, kernels=3.6e-6, launches=25e-6, sequences=13e-6, requests=60e-3
)
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Means of a simulated run in seconds, and what they consist of."""

    ttft: float
    tpot: float
    to_first: Work
    per_token: Work


@dataclass(frozen=True, slots=True)
class Residual:
    """A run's relative errors: predicted over measured, minus 1. None where nothing was measured."""

    run: Measured
    outcome: Outcome
    ttft: float | None
    tpot: float | None


def outcome(run: Measured, efficiencies: Efficiencies) -> Outcome:
    """Simulate a measured run. Raises InvalidRequest if it has no answer of two tokens or more."""
    served = run.simulate(efficiencies).served
    several = [one for one in served if one.tpot is not None]
    if not several:
        raise InvalidRequest(f"{run.name}: no answer of two tokens or more, so there is no time a token")
    return Outcome(
        float(np.mean([one.ttft for one in served])),
        float(np.mean([one.tpot for one in several])),
        _mean([one.to_first for one in served]),
        _mean([_per_token(one) for one in several]),
    )


def _per_token(one: Served) -> Work:
    return tuple(amount / (one.call.output - 1) for amount in one.rest)


def _mean(works: Sequence[Work]) -> Work:
    return tuple(float(amount) for amount in np.mean(np.array(works), axis=0))


def fit(
    measured: Sequence[Measured],
    start: Efficiencies = START,
    *,
    rounds: int = _ROUNDS,
    first: Sequence[Outcome] | None = None,
) -> Efficiencies:
    """The efficiencies that suit all runs best.

    rounds: simulations of each run at most. first: outcomes of the runs at `start`, if they are known already.
    """
    if not measured:
        raise InvalidRequest("there are no runs to calibrate with", param="results")
    current, outcomes = start, first
    for turn in range(rounds):
        outcomes = outcomes or [outcome(run, current) for run in measured]
        before = np.array(current.factors)
        factors = solve(measured, outcomes, current)
        # Half of the way after the first turn, so that schedule and factors do not chase one another.
        after = factors if turn == 0 else (before + factors) / 2
        works = np.array([work for found in outcomes for work in (found.to_first, found.per_token)])
        current, outcomes = Efficiencies.from_factors(tuple(after)), None
        if np.mean(np.abs(works @ after / (works @ before) - 1)) <= _STILL:
            break
    return current


def solve(measured: Sequence[Measured], outcomes: Sequence[Outcome], around: Efficiencies) -> Floats:
    """The best factors for given amounts: least absolute relative errors, by reweighted least squares."""
    pairs = [
        pair
        for run, found in zip(measured, outcomes, strict=True)
        for pair in ((run.ttft, found.to_first), (run.tpot, found.per_token))
    ]
    matrix = np.array([np.array(work) / seen for seen, work in pairs if seen is not None])
    # In units in which every factor is about 1.
    scale = np.maximum(np.array(around.factors), np.array(START.factors) * 1e-3)
    prior, target = _priors(scale)
    reweighted = np.ones(len(matrix))
    unknowns = np.array(around.factors) / scale
    for _ in range(_REWEIGHTINGS):
        each = np.sqrt(reweighted)
        left = np.vstack([matrix * scale * each[:, None], prior])
        right = np.concatenate([each, target])
        unknowns = _bounded(left, right, _LOWEST / scale, unknowns)
        errors = np.abs(matrix @ (scale * unknowns) - 1)
        reweighted = 1 / np.maximum(errors, _SMALL)
    found: Floats = scale * unknowns
    return found


def _priors(scale: Floats) -> tuple[Floats, Floats]:
    prior, target = [], []
    for cause, (usual, strength) in _USUAL.items():
        row = np.zeros(len(CAUSES))
        at = CAUSES.index(cause)
        row[at] = strength * scale[at] / usual
        prior.append(row)
        target.append(strength)
    for cause, size in _COST.items():
        row = np.zeros(len(CAUSES))
        at = CAUSES.index(cause)
        row[at] = _COST_STRENGTH * scale[at] / size
        prior.append(row)
        target.append(0.0)
    return np.array(prior), np.array(target)


def _bounded(left: Floats, right: Floats, lowest: Floats, start: Floats) -> Floats:
    """argmin |left x - right| with x >= lowest, one coordinate after another (the problem is convex and small)."""
    gram, goal = left.T @ left, left.T @ right
    x = np.maximum(start, lowest)
    for _ in range(_SWEEPS):
        before = x.copy()
        for at in range(len(x)):
            if gram[at, at] > 0:
                x[at] = max(lowest[at], x[at] + (goal[at] - gram[at] @ x) / gram[at, at])
        if np.all(np.abs(x - before) <= 1e-8 * (np.abs(x) + 1e-3)):
            break
    return x


def residuals(measured: Iterable[Measured], efficiencies: Efficiencies) -> list[Residual]:
    """Simulate all runs and compare."""
    found = []
    for run in measured:
        made = outcome(run, efficiencies)
        ttft = None if run.ttft is None else made.ttft / run.ttft - 1
        tpot = None if run.tpot is None else made.tpot / run.tpot - 1
        found.append(Residual(run, made, ttft, tpot))
    return found


def left_out(
    measured: Sequence[Measured], start: Efficiencies, *, rounds: int = _ROUNDS
) -> list[tuple[str, Efficiencies, list[Residual]]]:
    """For every group: the efficiencies that all other groups give, and the group's residuals with them."""
    groups = list(dict.fromkeys(run.setup.group for run in measured))
    if len(groups) < 2:
        raise InvalidRequest("to leave one group out, there must be another", param="results")
    found = []
    for group in groups:
        fitted = fit([run for run in measured if run.setup.group != group], start, rounds=rounds)
        inside = [run for run in measured if run.setup.group == group]
        found.append((group, fitted, residuals(inside, fitted)))
    return found


def mape(errors: Iterable[float | None]) -> float:
    """Mean absolute relative error, of those that there are."""
    values = [abs(error) for error in errors if error is not None]
    if not values:
        raise InvalidRequest("no run has this figure")
    return float(sum(values) / len(values))  # numpy's own numbers are no JSON


@dataclass(frozen=True, slots=True)
class Recalibrated:
    """before, after: residuals of one's own runs with the efficiencies given and with those refitted."""

    efficiencies: Efficiencies
    before: list[Residual]
    after: list[Residual]


def recalibrate(
    own: Sequence[Measured], start: Efficiencies | None = None, *, with_bundled: bool = False
) -> Recalibrated:
    """Refit to runs of one's own (with_bundled: and to those that Freehold comes with)."""
    start = bundled() if start is None else start
    chosen = [*own, *(runs() if with_bundled else ())]
    fitted = fit(chosen, start, rounds=4)
    return Recalibrated(fitted, residuals(own, start), residuals(own, fitted))
