"""A bigram model of token ids, smoothed as well as bigrams are: interpolated Kneser-Ney with one discount a count.

What a language model must beat to have learnt more than which token follows which. Counts are exact, over documents
laid end to end; nothing is counted across the border of two.

Source: R. Kneser and H. Ney (1995); the three discounts: S. Chen and J. Goodman (1999), equations 22 to 26.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.integer]


class Bigram:
    """-log P(token | token before), from counts. vocabulary: ids are 0 .. vocabulary - 1."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self._counts = np.zeros((vocabulary, vocabulary), np.int64)
        self._ready = False

    def add(self, before: Ids, after: Ids) -> None:
        """Count pairs: after[i] stood behind before[i]."""
        pairs = before.astype(np.int64) * self.vocabulary + after.astype(np.int64)
        self._counts += np.bincount(pairs, minlength=self.vocabulary**2).reshape(self._counts.shape)
        self._ready = False

    def add_documents(self, ids: Ids, starts: Sequence[int] | Ids, piece: int = 1 << 21) -> None:
        """Count all pairs within documents ids[starts[i]:starts[i + 1]]."""
        starts = np.asarray(starts, np.int64)
        inside = np.ones(len(ids), bool)  # whether position p follows another position of its document
        inside[starts[starts < len(ids)]] = False
        inside[: starts[0]] = inside[starts[-1] :] = False
        for first in range(1, len(ids), piece):
            here = np.arange(first, min(first + piece, len(ids)))
            here = here[inside[here]]
            self.add(np.asarray(ids[here - 1]), np.asarray(ids[here]))

    def losses(self, ids: Ids) -> NDArray[np.float64]:
        """-log P of ids[1:], each given the one before, in nats."""
        if not self._ready:
            self._estimate()
        before, after = np.asarray(ids[:-1], np.int64), np.asarray(ids[1:], np.int64)
        count = self._counts[before, after]
        kept = count - self._discounts[np.minimum(count, 3)]
        total = self._totals[before]
        with np.errstate(divide="ignore", invalid="ignore"):
            seen = np.where(total > 0, kept / total, 0.0)
            left = np.where(total > 0, self._left[before] / total, 1.0)
        found: NDArray[np.float64] = -np.log(seen + left * self._continuation[after])
        return found

    def _estimate(self) -> None:
        counts = self._counts
        self._totals = counts.sum(1)
        self._discounts = _discounts(counts)
        by_count = [(counts == 1).sum(1), (counts == 2).sum(1), (counts >= 3).sum(1)]
        self._left = sum(d * n for d, n in zip(self._discounts[1:], by_count, strict=True))
        # How many different tokens a token follows; one pseudo-count spread over all keeps unseen tokens possible.
        kinds = (counts > 0).sum(0) + 1 / self.vocabulary
        self._continuation = kinds / kinds.sum()
        self._ready = True


def _discounts(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Discounts of pairs seen 0, 1, 2, and 3 or more times; small counts that never occur fall back to 0.75."""
    n = [int((counts == times).sum()) for times in (1, 2, 3, 4)]
    if not all(n):
        return np.array([0.0, 0.75, 0.75, 0.75])
    ratio = n[0] / (n[0] + 2 * n[1])
    found = [times - (times + 1) * ratio * n[times] / n[times - 1] for times in (1, 2, 3)]
    return np.array([0.0, *(min(max(d, 0.0), times) for times, d in enumerate(found, 1))])


def fit(vocabulary: int, documents: Iterable[Sequence[int]]) -> Bigram:
    """A bigram model of some documents."""
    bigram = Bigram(vocabulary)
    for document in documents:
        ids = np.asarray(document, np.int64)
        bigram.add(ids[:-1], ids[1:])
    return bigram
