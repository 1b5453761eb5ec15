"""The bigram baseline: a distribution for every history, better than it would be unsmoothed, nothing across borders."""

from __future__ import annotations

import numpy as np
import pytest
from _bigram import Bigram, fit


def _chain(tokens: int, seed: int, vocabulary: int = 40) -> np.ndarray:
    """A Markov chain whose rows are uneven, and whose entropy rate is known to `_entropy`."""
    table = _table(vocabulary)
    generator = np.random.default_rng(seed)
    ids = [0]
    for _ in range(tokens):
        ids.append(int(generator.choice(vocabulary, p=table[ids[-1]])))
    return np.array(ids)


def _table(vocabulary: int) -> np.ndarray:
    return np.random.default_rng(0).dirichlet(np.full(vocabulary, 0.2), vocabulary)


@pytest.mark.parametrize("tokens", [5, 300, 20_000])
def test_every_history_has_a_distribution(tokens: int) -> None:
    bigram = fit(40, [_chain(tokens, seed=1)])
    for history in (0, 7, 39):  # seen often, seldom, perhaps never
        total = sum(float(np.exp(-bigram.losses(np.array([history, token]))[0])) for token in range(40))
        assert total == pytest.approx(1.0, abs=1e-9)


def test_it_comes_near_to_the_entropy_of_a_markov_chain() -> None:
    train, test = _chain(40_000, seed=2), _chain(5_000, seed=3)
    table = _table(40)
    ideal = float(-np.log(table[test[:-1], test[1:]]).mean())
    found = float(fit(40, [train]).losses(test).mean())
    assert ideal <= found + 0.02
    assert found < ideal + 0.03


def test_pairs_across_documents_are_not_counted() -> None:
    ids = np.array([1, 2, 1, 2, 3, 1, 3, 1], np.uint16)
    whole, parts = Bigram(5), Bigram(5)
    whole.add_documents(ids, [0, 4, 8], piece=3)
    for document in (ids[:4], ids[4:]):
        parts.add(document[:-1], document[1:])
    probe = np.array([2, 3, 1, 2, 1])
    assert whole.losses(probe) == pytest.approx(parts.losses(probe))
    joined = fit(5, [ids])
    assert joined.losses(np.array([2, 3]))[0] < whole.losses(np.array([2, 3]))[0]
