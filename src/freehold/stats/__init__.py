"""How sure a measured figure is. Shared by canary, eval and verify. Torch-free.

`intervals`: of figures that are looked at once, when all is measured. `sequences`: of figures that are watched while
they grow, with bounds that hold at every look at the same time.
"""

from __future__ import annotations

from freehold.stats.intervals import (
    RESAMPLES,
    Interval,
    mean,
    mean_ratio,
    paired_difference,
    paired_ratio_difference,
    wilson,
)

__all__ = ["RESAMPLES", "Interval", "mean", "mean_ratio", "paired_difference", "paired_ratio_difference", "wilson"]
