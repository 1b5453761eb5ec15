"""Wrong pagers: each gives the kernels a wrong expert in one way that a pager could."""

from __future__ import annotations

from concurrent.futures import Future

import numpy as np
from numpy.typing import NDArray

from freehold.model.pager import ExpertPager


class EarlyPager(ExpertPager):
    """Tells the kernels of an expert before it has arrived."""

    def _finish(self, record: int, read: Future[None]) -> None:
        del self._reading[record]
        self._publish(record)


class ForgetfulPager(ExpertPager):
    """Gives a slot to another expert without telling the kernels that the first is gone."""

    def _evict(self, slot: int) -> None:
        record = int(self._owner[slot])
        layer, expert = divmod(record, self._experts)
        places = [self._places[(2 * layer + matrix) * self._experts + expert] for matrix in (0, 1)]
        codes = [place.codes for place in places]
        super()._evict(slot)
        for place, address in zip(places, codes, strict=True):
            place.codes = address


class CarelessPager(ExpertPager):
    """Takes the slots of experts that the step itself needs."""

    def _evictable(self, layer: int, keep: NDArray[np.int64]) -> NDArray[np.int64]:
        return super()._evictable(layer, keep[:1])


class SwappedPager(ExpertPager):
    """Takes an expert's neighbour for it."""

    def _publish(self, record: int) -> None:
        super()._publish(record)
        layer, expert = divmod(record, self._experts)
        if (slot := int(self._slot_of[record ^ 1])) >= 0 and record ^ 1 not in self._reading:
            for matrix in (0, 1):
                at = self._base + self._starts[slot] + self.file.layout.matrix_at(layer, matrix)
                self._places[(2 * layer + matrix) * self._experts + expert].codes = at
