"""Learning-rate schedules: what the peak rate is multiplied by at each step. Torch-free.

Both warm up linearly. `cosine` then falls along half a cosine for the rest of the run; `wsd` (warm-up, stable, decay)
holds the peak and falls in a straight line at the end, so that a run can be stopped or prolonged before its decay.

Source: Loshchilov & Hutter 2016 (cosine), Hu et al. 2024, MiniCPM (WSD).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from freehold.errors import InvalidRequest

Kind: TypeAlias = Literal["wsd", "cosine", "constant"]


@dataclass(frozen=True, slots=True)
class Schedule:
    """warmup, decay: shares of the run's steps (`decay` of wsd only). floor: the factor it falls to. All 0 to 1."""

    kind: Kind = "wsd"
    warmup: float = 0.02
    decay: float = 0.3
    floor: float = 0.0

    def __post_init__(self) -> None:
        for name in ("warmup", "decay", "floor"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidRequest(f"{name} = {getattr(self, name)!r} must be between 0 and 1", param=name)

    def factor(self, step: int, steps: int) -> float:
        """What multiplies the peak rate at `step`, 0 to steps - 1, of a run of `steps`. Above 0."""
        if not 0 <= step < steps:
            raise ValueError(f"step {step} is outside a run of {steps} steps")
        warmup = round(self.warmup * steps)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if self.kind == "constant":
            return 1.0
        start = warmup if self.kind == "cosine" else max(warmup, steps - round(self.decay * steps))
        if step < start:
            return 1.0
        done = (step - start + 1) / (steps - start + 1)  # 1 would be the step after the last: none is wasted at rate 0
        falling = (1 + math.cos(math.pi * done)) / 2 if self.kind == "cosine" else 1 - done
        return self.floor + (1 - self.floor) * falling
