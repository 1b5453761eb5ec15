"""A small thing to train in a loop, and a script that trains it: what the loop does is tested with it, not learning."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from freehold.train.loop import Loop, LoopSettings, StepReport
from freehold.train.optim import Optim


@dataclass(frozen=True)
class Points:
    x: Tensor
    y: Tensor

    @property
    def tokens(self) -> int:
        return len(self.x)


class NumberedPoints:
    """Batch n of a fixed function's values, of n-dependent size."""

    def __getitem__(self, number: int) -> Points:
        random = torch.Generator().manual_seed(number)
        x = torch.randn(4 + number % 3, 8, generator=random)
        return Points(x, x[:, :1].sin() * x[:, 1:2])


@dataclass(frozen=True)
class StandInLosses:
    total: Tensor
    parts: dict[str, float]


class StandIn(nn.Module):
    """Two matrices with dropout (so that the random state matters) and a number that `balance` moves."""

    def __init__(self) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(7)
        self.first = nn.Parameter(torch.randn(16, 8, generator=random))
        self.second = nn.Parameter(torch.randn(1, 16, generator=random))
        self.bias = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.spoil: Callable[[int], bool] = lambda _: False
        self.calls = 0

    def losses(self, batch: Points) -> StandInLosses:
        hidden = nn.functional.dropout((batch.x @ self.first.T).tanh(), 0.1)
        loss = ((hidden @ self.second.T + self.bias - batch.y) ** 2).mean()
        if self.spoil(self.calls):
            loss = loss * float("nan")
        self.calls += 1
        return StandInLosses(loss, {"square": float(loss.detach())})

    @torch.no_grad()
    def balance(self) -> None:
        self.bias.mul_(0.5).add_(0.01)

    def loop(self, directory: Path, settings: LoopSettings, **others: Any) -> Loop[Points]:
        trained = {name: p for name, p in self.named_parameters() if p.requires_grad}
        return Loop(self, trained, dict(self.named_parameters()), NumberedPoints(), settings, directory, **others)


def settings(steps: int = 12, **others: Any) -> LoopSettings:
    return LoopSettings(steps, **{"optim": Optim(lr=0.02), "accumulate": 2, "save_steps": 5, **others})


if __name__ == "__main__":  # DIRECTORY SECONDS: trains with a pause after each step, to be killed meanwhile

    def slowly(made: StepReport) -> None:
        print(made.step, flush=True)
        time.sleep(float(sys.argv[2]))

    StandIn().loop(Path(sys.argv[1]), settings()).run({}, slowly)
