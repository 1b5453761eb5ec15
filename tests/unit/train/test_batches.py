"""Batches: every token of an epoch once, documents whole and apart, the same batch for the same number."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from freehold.errors import InvalidRequest
from freehold.train.batches import Batches, Documents


def documents(sizes: list[int]) -> Documents:
    """Token t of document d is 1000 · d + t; every third is trained."""
    ids = np.concatenate([1000 * d + np.arange(size) for d, size in enumerate(sizes)])
    starts = np.concatenate([[0], np.cumsum(sizes)])
    return Documents(ids, np.arange(len(ids)) % 3 == 0, starts)


def batches(sizes: list[int], **changes: object) -> Batches:
    settings = {"lengths": (16, 40), "tokens": 80, "seed": 1, "prompt_weight": 0.25, **changes}
    return Batches(documents(sizes), **settings)  # type: ignore[arg-type]


SIZES = [3, 16, 17, 40, 9, 9, 30, 5, 12, 2, 38, 21, 7, 7, 7, 11] * 3


def test_an_epoch_has_every_token_once() -> None:
    made = batches(SIZES)
    for epoch in range(2):
        seen: list[int] = []
        for number in range(made.per_epoch):
            batch = made[epoch * made.per_epoch + number]
            assert batch.ids_BT.shape[1] in (16, 40)
            assert batch.ids_BT.numel() <= 80
            seen += batch.ids_BT[batch.document_BT >= 0].tolist()
        assert sorted(seen) == sorted(documents(SIZES).ids.tolist())


def test_documents_are_whole_and_see_only_themselves() -> None:
    batch = batches(SIZES)[2]
    allowed = batch.allowed()
    for row in range(batch.ids_BT.shape[0]):
        for number in range(int(batch.document_BT[row].max()) + 1):
            places = (batch.document_BT[row] == number).nonzero()[:, 0]
            ids = batch.ids_BT[row, places]
            assert (ids % 1000).tolist() == list(range(len(ids)))
            assert len(ids) == SIZES[int(ids[0]) // 1000]
            assert batch.positions_BT[row, places].tolist() == list(range(len(ids)))
            assert batch.weight_BT[row, places[0]] == 0
            for t in places.tolist():
                expected = (batch.document_BT[row] == number) & (torch.arange(len(allowed[row, t])) <= t)
                assert torch.equal(allowed[row, t], expected)


def test_weights() -> None:
    made = documents(SIZES)
    trained = dict(zip(made.ids.tolist(), made.trained.tolist(), strict=True))
    batch = batches(SIZES)[0]
    for id_, weight, position in zip(
        batch.ids_BT.flatten().tolist(), batch.weight_BT.flatten().tolist(), batch.positions_BT.flatten().tolist(),
        strict=True,
    ):  # fmt: skip
        assert weight == (0.0 if position == 0 else 1.0 if trained[id_] else 0.25)


def test_the_same_number_is_the_same_batch_and_seeds_differ() -> None:
    one, other = batches(SIZES), batches(SIZES)
    later = other[one.per_epoch + 1]
    assert torch.equal(one[one.per_epoch + 1].ids_BT, later.ids_BT)
    assert torch.equal(one[1].ids_BT, other[1].ids_BT)
    assert any(not torch.equal(one[n].ids_BT, batches(SIZES, seed=2)[n].ids_BT) for n in range(3))
    assert any(not torch.equal(one[n].ids_BT, one[n + one.per_epoch].ids_BT) for n in range(3))


def test_long_documents_are_cut() -> None:
    made = batches([100, 3])
    seen = [made[n] for n in range(made.per_epoch)]
    sizes = [int((b.document_BT[row] == d).sum()) for b in seen for row in range(len(b.ids_BT)) for d in (0, 1)]
    assert sorted(size for size in sizes if size) == [3, 20, 40, 40]


def test_no_documents() -> None:
    with pytest.raises(InvalidRequest, match="nothing to train on"):
        Batches(Documents(np.zeros(0), np.zeros(0), np.zeros(1)), lengths=(8,), tokens=8, seed=0)
