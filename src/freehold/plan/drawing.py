"""Random numbers as public load generators draw them, without numpy: importing it would take a tenth of a plan's time.

vLLM's and InferenceX's generators use numpy's legacy `RandomState`, a Mersenne Twister as Python's own is, seeded
otherwise. With the same seed this gives the same numbers, bit for bit (a test compares them).
"""

from __future__ import annotations

import math
import random
from functools import cache

_WORDS = 624


class Drawing:
    """Each method gives `count` numbers."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random()
        self._random.setstate((3, (*_seeded(seed), _WORDS), None))

    def integers(self, low: int, high: int, count: int) -> list[int]:
        """Evenly from low to high, both included; `RandomState.randint(low, high + 1, count)`."""
        most = high - low
        if not 0 <= most < 2**32 - 1:
            raise ValueError(f"no integers from {low} to {high}")
        if most == 0:
            return [low] * count
        mask, bits = (1 << most.bit_length()) - 1, self._random.getrandbits
        found: list[int] = []
        while len(found) < count:
            value = bits(32) & mask
            if value <= most:
                found.append(low + value)
        return found

    def uniform(self, low: float, high: float) -> float:
        """One number; `RandomState.uniform(low, high)`."""
        return low + (high - low) * self._random.random()

    def exponential(self, scale: float, count: int) -> list[float]:
        """With mean `scale`; `RandomState.exponential(scale, count)`."""
        return [scale * -math.log(1.0 - self._random.random()) for _ in range(count)]


@cache
def _seeded(seed: int) -> tuple[int, ...]:
    """The generator's first state (Matsumoto and Nishimura's init_genrand, 2002)."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"{seed} is no seed")
    words = [seed]
    for at in range(1, _WORDS):
        words.append((1812433253 * (words[-1] ^ (words[-1] >> 30)) + at) & 0xFFFFFFFF)
    return tuple(words)


def percentile(values: list[float], percent: float) -> float:
    """Of sorted values, between two of them on a straight line (numpy's default)."""
    place = (len(values) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(values) - 1)
    return values[below] + (values[above] - values[below]) * (place - below)


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)
