"""Other ways to decide about the same simulated canaries, all metrics' sums at every look in arrays.

naive z       a z-test at 5% made again at every look, as dashboards do; also with Bonferroni's correction
asymptotic    an asymptotic confidence sequence (Waudby-Smith et al. 2024, one-sided, tuned for 1,000 requests): the
              best known test that need not know the effect, on the one metric that is affected
oracle        Wald's sequential probability ratio test that knows the control's distribution, which metric is affected
              and by how much: no test with the same chance of a false alarm decides earlier on average
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from _canary_sim import LOOK, Truth, _draw, _without
from numpy.typing import NDArray

Floats = NDArray[np.float64]
TUNED_FOR = 1000


@dataclass(frozen=True)
class Sums:
    """Of one metric, at every look [L]: count, mean and variance in control and canary."""

    control: tuple[Floats, Floats, Floats]
    canary: tuple[Floats, Floats, Floats]

    @property
    def effect_L(self) -> Floats:
        return self.canary[1] - self.control[1]

    @property
    def error_L(self) -> Floats:
        squared: Floats = self.canary[2] / self.canary[0] + self.control[2] / self.control[0]
        return np.sqrt(np.maximum(squared, 1e-30))


def watch(truth: Truth, seed: int, looks: int, share: float) -> dict[str, Sums]:
    """One canary's metrics at every look."""
    generator = np.random.default_rng((seed, 11))
    others = round(LOOK * (1 - share) / share)
    control, _ = _draw(_without(truth), generator, looks * others)
    canary, _ = _draw(truth, generator, looks * LOOK)
    for columns in (control, canary):
        columns["ttft"] = np.log(columns["ttft"])
    found = {
        name: Sums(_running(control[name], others), _running(canary[name], LOOK))
        for name in control
        if name != "quality"
    }
    lost = -canary["quality"]
    zero = (np.ones(looks) * 1e12, np.zeros(looks), np.zeros(looks))
    found["quality"] = Sums(zero, _running(lost, LOOK // 2))
    return found


def _running(values: Floats, each: int) -> tuple[Floats, Floats, Floats]:
    blocks = values.reshape(-1, each)
    count_L = np.arange(1, len(blocks) + 1) * float(each)
    mean_L = np.cumsum(blocks.sum(1)) / count_L
    return count_L, mean_L, np.cumsum((blocks**2).sum(1)) / count_L - mean_L**2


def naive(found: dict[str, Sums], alpha: float) -> bool:
    """Whether a one-sided z-test of any metric passes at any look."""
    limit = NormalDist().inv_cdf(1 - alpha)
    # A normal approximation of rates wants some failures: without five nobody would make the test.
    return any(
        bool(np.any((sums.effect_L / sums.error_L > limit) & _enough(name, sums))) for name, sums in found.items()
    )


def _enough(name: str, sums: Sums) -> NDArray[np.bool_]:
    count_L, mean_L, _ = sums.canary
    return count_L * mean_L >= 5 if name in ("error", "refusal") else count_L >= 0


def asymptotic(sums: Sums, alpha: float) -> float:
    """The canary's requests when the lower bound passes 0; infinite if never."""
    goal = -2 * math.log(2 * alpha)
    rho2 = (goal + math.log(goal + 1)) / TUNED_FOR
    count_L = np.arange(1, len(sums.effect_L) + 1) * float(LOOK)
    spread_L = count_L * rho2 + 1
    width_L = sums.error_L * np.sqrt(2 * spread_L / (count_L * rho2) * np.log(1 + np.sqrt(spread_L) / (2 * alpha)))
    return _first(sums.effect_L > width_L)


def oracle(metric: str, sums: Sums, truth: Truth, alpha: float) -> float:
    """The canary's requests when Wald's test passes 1/alpha."""
    count_L, mean_L, variance_L = sums.canary
    if metric == "error":
        base, real = 0.01, truth.error
        hits_L = count_L * mean_L
        log_L = hits_L * math.log(real / base) + (count_L - hits_L) * math.log((1 - real) / (1 - base))
    else:
        base_L = sums.control[1][-1]
        effect = {"ttft": math.log(truth.ttft), "cost": (truth.cost - 1) * base_L, "quality": -truth.quality}[metric]
        log_L = effect * count_L * (mean_L - base_L - effect / 2) / variance_L[-1]
    return _first(log_L >= -math.log(alpha))


def _first(passes_L: NDArray[np.bool_]) -> float:
    return float(np.argmax(passes_L) + 1) * LOOK if passes_L.any() else math.inf
