"""Rows of training tokens: documents packed side by side, each seen alone.

Documents are put into rows of a few lengths, the shortest that takes them, as they come in an order that the seed and
the epoch decide; a row holds whole documents, and positions begin anew with each. Which rows make batch n is a
function of (corpus, seed, n): a run that goes on after a kill needs to know n only. Torch-free up to `Batch`.

Shape suffixes: B sequences side by side, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from freehold.errors import InvalidRequest

_OPEN_ROWS = 32  # rows that a document may still go into
_BLOCK_EPOCHS = 0x9E3779B9  # keeps the random streams of epochs apart


@dataclass(frozen=True, slots=True)
class Batch:
    """ids_BT int64; weight_BT fp32, what predicting each token counts for; document_BT int64, -1 where a row is not
    filled; positions_BT int64, from 0 in each document."""

    ids_BT: Tensor
    weight_BT: Tensor
    document_BT: Tensor
    positions_BT: Tensor

    @property
    def tokens(self) -> int:
        """Tokens of documents."""
        return int((self.document_BT >= 0).sum())

    def allowed(self) -> Tensor:
        """Bool [B, T, T]: same document, not later."""
        length = self.ids_BT.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        same = self.document_BT[:, :, None] == self.document_BT[:, None, :]
        return same & causal


@dataclass(frozen=True, slots=True)
class Documents:
    """What batches are made of: ids and trained of all documents end to end, document d at starts[d] .. starts[d+1]."""

    ids: np.ndarray
    trained: np.ndarray
    starts: np.ndarray


class Batches:
    """Batch n of a corpus, for any n.

    lengths: of rows, ascending; documents longer than the last are cut into pieces of it. tokens: of a batch, about;
    rows of every length come in batches of as many tokens. prompt_weight: what a token counts that is not one of the
    model's own to say. Raises InvalidRequest for a corpus without documents.
    """

    def __init__(
        self,
        documents: Documents,
        *,
        lengths: Sequence[int],
        tokens: int,
        seed: int,
        prompt_weight: float = 1.0,
    ) -> None:
        if len(documents.starts) < 2:
            raise InvalidRequest("there is nothing to train on: the corpus has no documents")
        self._documents, self._lengths, self._tokens = documents, tuple(sorted(lengths)), tokens
        self._seed, self._prompt_weight = seed, prompt_weight
        self._first, self._size = _pieces(documents.starts, self._lengths[-1])
        self._epoch: tuple[int, list[list[list[int]]]] | None = None
        self.per_epoch = len(self._plan(0))

    def __getitem__(self, number: int) -> Batch:
        """The batch of step `number`, from 0."""
        epoch = 0
        while number >= len(plan := self._plan(epoch)):
            number -= len(plan)
            epoch += 1
        rows = plan[number]
        longest = max(int(self._size[row].sum()) for row in rows)
        length = next(length for length in self._lengths if length >= longest)
        return self._batch(rows, length)

    def _plan(self, epoch: int) -> list[list[list[int]]]:
        """Batches of one epoch, as rows, as pieces of documents."""
        if self._epoch is None or self._epoch[0] != epoch:
            random = np.random.default_rng((self._seed, epoch, _BLOCK_EPOCHS))
            order = random.permutation(len(self._size))
            batches: list[list[list[int]]] = []
            shortest = 0
            for length in self._lengths:
                fits = order[(self._size[order] > shortest) & (self._size[order] <= length)]
                rows = _pack(fits.tolist(), self._size, length)
                many = max(1, self._tokens // length)
                batches += [rows[i : i + many] for i in range(0, len(rows), many)]
                shortest = length
            random.shuffle(batches)
            self._epoch = (epoch, batches)
        return self._epoch[1]

    def _batch(self, rows: list[list[int]], length: int) -> Batch:
        shape = (len(rows), length)
        ids, weight = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.float32)
        document, positions = np.full(shape, -1, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        for b, row in enumerate(rows):
            t = 0
            for number, piece in enumerate(row):
                first, size = int(self._first[piece]), int(self._size[piece])
                part = slice(t, t + size)
                ids[b, part] = self._documents.ids[first : first + size]
                trained = self._documents.trained[first : first + size]
                weight[b, part] = np.where(trained, 1.0, self._prompt_weight)
                document[b, part], positions[b, part] = number, np.arange(size)
                weight[b, t] = 0.0  # nothing predicts the first
                t += size
        return Batch(*(torch.from_numpy(array) for array in (ids, weight, document, positions)))


def _pieces(starts: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """(first token, size) of documents, those longer than `longest` cut."""
    firsts, sizes = starts[:-1].astype(np.int64), np.diff(starts).astype(np.int64)
    if sizes.max(initial=0) <= longest:
        kept = sizes > 1
        return firsts[kept], sizes[kept]
    cut = [
        (first + at, min(longest, size - at))
        for first, size in zip(firsts.tolist(), sizes.tolist(), strict=True)
        for at in range(0, size, longest)
        if min(longest, size - at) > 1
    ]
    return np.array([first for first, _ in cut]), np.array([size for _, size in cut])


def _pack(pieces: list[int], sizes: np.ndarray, length: int) -> list[list[int]]:
    """Rows of whole pieces. Each goes into the fullest open row that takes it; a new row closes the fullest one."""
    rows: list[list[int]] = []
    open_rows: list[tuple[int, list[int]]] = []  # (room, row), least room first
    for piece in pieces:
        size = int(sizes[piece])
        at = next((i for i, (room, _) in enumerate(open_rows) if room >= size), None)
        if at is not None:
            room, row = open_rows.pop(at)
        else:
            if len(open_rows) == _OPEN_ROWS:
                open_rows.pop(0)
            room, row = length, []
            rows.append(row)
        row.append(piece)
        where = next((i for i, (other, _) in enumerate(open_rows) if other >= room - size), len(open_rows))
        open_rows.insert(where, (room - size, row))
    return rows
