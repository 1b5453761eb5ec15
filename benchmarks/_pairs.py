"""What samples say for certain: an upper bound of their median that assumes nothing of how they are spread."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb


def median_at_most(samples: Sequence[float], confidence: float = 0.95) -> float:
    """The least order statistic that is an upper bound of the median with at least this confidence, one-sided.

    Exact for independent samples of any distribution: the i-th smallest of n is below the median only if at least i of
    the n are, and their number is at most binomial(n, 1/2). For n = 20 and 95 % it is the 15th. Raises ValueError for
    too few samples: even the largest is no such bound then.
    """
    n, below = len(samples), 0
    for i, sample in enumerate(sorted(samples)):
        below += comb(n, i)  # of 2^n: at most i samples below the median
        if below >= confidence * 2**n:
            return sample
    raise ValueError(f"{n} samples give no bound of a median with confidence {confidence}")
