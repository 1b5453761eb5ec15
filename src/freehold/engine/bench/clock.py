"""A clock that gives every nanosecond to exactly one part. Torch-free.

    clock.start("scheduler")
    clock.enter("attention.project")     time until now was the scheduler's
    clock.enter("attention.attend")      time until now was the projections'
    clock.leave()                        time until now was gathering's, what follows is the projections' again
    seconds = clock.stop()

Parts nest, and an outer part is charged only for what no inner one is: so they add up to the whole, whatever is
wrapped.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from statistics import median

from freehold.errors import EngineError
from freehold.model.traffic import PARTS, Part

SUM_TOLERANCE = 0.02
"""The parts of a step sum to its duration, taken by another clock within, to this fraction and 20 µs."""

_now = time.perf_counter_ns


class PartClock:
    """Used from one thread; `start` and `stop` enclose what is measured."""

    def __init__(self) -> None:
        self._spent: dict[Part, float] = dict.fromkeys(PARTS, 0.0)  # nanoseconds
        self._open: list[Part] = []
        self._mark = 0

    def start(self, base: Part) -> None:
        """Begin, in part `base`."""
        for part in PARTS:
            self._spent[part] = 0.0
        self._open = [base]
        self._mark = _now()

    def stop(self) -> dict[Part, float]:
        """Seconds of every part since `start`. Raises EngineError if a part was entered and not left."""
        self._charge()
        if len(self._open) != 1:
            raise EngineError(f"profiling: parts were entered and not left: {self._open[1:]}")
        return {part: spent / 1e9 for part, spent in self._spent.items()}

    @property
    def current(self) -> Part:
        return self._open[-1]

    def enter(self, part: Part) -> None:
        self._charge()
        self._open.append(part)

    def leave(self) -> None:
        self._charge()
        self._open.pop()

    def charged(self, part: Part) -> float:
        """Nanoseconds the part has so far, up to the last `enter`, `leave` or `move`."""
        return self._spent[part]

    def move(self, parts: Mapping[str, float], before: float) -> None:
        """Give `parts` (seconds, by a native clock) what the current part was charged since it had `before` ns.

        Another clock may have measured a little more than this one, so shares are scaled down to what there is.
        Raises EngineError for a name that is no part.
        """
        self._charge()
        unknown = sorted(set(parts) - set(PARTS))
        if unknown:
            raise EngineError(f"profiling: the native clock has a part {unknown[0]!r}; known are {', '.join(PARTS)}")
        there, claimed = self._spent[self.current] - before, 1e9 * sum(parts.values())
        if claimed <= 0:
            return
        scale = 1e9 * min(1.0, there / claimed)
        self._spent[self.current] -= min(there, claimed)
        for part in PARTS:
            self._spent[part] += scale * parts.get(part, 0.0)

    def _charge(self) -> None:
        now = _now()
        self._spent[self._open[-1]] += now - self._mark
        self._mark = now


def check_sums(samples: Sequence[tuple[float, Mapping[Part, float]]]) -> None:
    """Raise EngineError unless parts sum to their step: of (seconds, parts) of several steps, at least half must.

    Not all: the process may be put aside between the readings of the two clocks.
    """
    lost = [(abs(seconds - sum(parts.values())) - 20e-6) / seconds for seconds, parts in samples]
    if median(lost) > SUM_TOLERANCE:
        raise EngineError(
            f"profiling: the parts of a step sum to {median(lost):.1%} more or less than its duration; "
            "time was lost or counted twice"
        )
