"""How long it takes to refuse a key tells nothing about the keys there are: not how much of one was guessed.

First by what is done: a key is hashed and nothing else, and digests are compared in constant time. Then by the clock:
wrong keys that share nothing, half, or all but one character with a real one, asked in turn in a random order. If the
time does not depend on what they share, all orders of the three are equally likely in each round, whatever the machine
does meanwhile; Page's L for ordered alternatives sums the rounds up, and is normal under that assumption. A leak must
both be certain by it and be of a size; a comparison that ends at the first difference is found by the same measure.

Source: Page, "Ordered Hypotheses for Multiple Treatments" (Journal of the American Statistical Association, 1963).
"""

from __future__ import annotations

import gc
import hmac
import math
import random
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn, cast

import numpy as np
import pytest

from freehold.errors import AuthenticationFailed
from freehold.gateway.access import keys as keys_module
from freehold.gateway.access.keys import Keys, digest_of, new_token
from freehold.gateway.door import app
from freehold.gateway.door.app import Door
from freehold.gateway.door.request import RequestReader
from freehold.gateway.door.upstream import Upstreams
from freehold.gateway.identity import Hasher
from freehold.gateway.parts import Admission, Parts, Router, Store
from tests.unit.gateway.settings_text import settings

REAL = new_token()
ROUNDS = 1500
CERTAIN = 6.0  # standard deviations: by chance once in a billion tests
SIZE = 0.02  # of the time that a refusal takes, from nothing shared to all but one character


class Seen(str):
    """A key that fails the test when it is looked into. What is left: to encode it, and whether it is empty."""

    __slots__ = ()

    def _looked_at(self, *_: object) -> NoReturn:
        raise AssertionError("the key itself was compared or looked up")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __contains__ = _looked_at  # type: ignore[assignment]
    __getitem__ = __iter__ = startswith = endswith = find = index = _looked_at  # type: ignore[assignment]
    __hash__ = _looked_at  # type: ignore[assignment]


def keys() -> Keys:
    return Keys(settings(f'[keys.app]\nsha256 = "{digest_of(REAL)}"\n'))


def door() -> Door:
    parts = Parts(keys(), cast("Router", None), cast("Admission", None), cast("Store", None))
    return Door(settings(), parts, cast("Upstreams", None), RequestReader(Hasher(bytes(32))), admin_key=REAL)


def test_only_the_hash_of_a_key_is_looked_up_and_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    real = hmac.compare_digest

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return real(one, other)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    assert keys_module.hmac is app.hmac is hmac
    opens, guarded = keys(), door()
    assert opens.authenticate(Seen(REAL)) is not None
    assert opens.authenticate(Seen(REAL[:-1] + "x")) is None
    guarded._check_admin(Seen(REAL))
    with pytest.raises(AuthenticationFailed):
        guarded._check_admin(Seen(REAL[:-1] + "x"))
    # A wrong key is not even found in the table; the admin's is compared always.
    assert len(compared) == 3
    assert all(len(one) == len(other) == 32 for one, other in compared)
    for owner in (opens, guarded):
        kept = repr([getattr(owner, name, "") for name in vars(owner)])
        assert REAL not in kept
        assert REAL.encode() not in [value for value in vars(owner).values() if isinstance(value, bytes)]
    with pytest.raises(AssertionError, match="itself"):
        _ = Seen(REAL) == REAL  # the check can fail


def wrong(shared: int) -> str:
    """A key of the right length that has so many first characters of the real one, and not the next."""
    rest = new_token()[-(len(REAL) - shared) :]
    other = next(letter for letter in "ABC" if letter != REAL[shared])
    return REAL[:shared] + other + rest[1:]


def leak(refuse: Callable[[str], Any]) -> tuple[float, float]:
    """Standard deviations by which the time rises with what is shared, and by how much of it (medians)."""
    shares = (0, len(REAL) // 2, len(REAL) - 1)
    order = random.Random(5)
    times = np.empty((ROUNDS, 3))
    for _ in range(200):
        refuse(wrong(0))
    gc.collect()
    gc.disable()
    try:
        for round_ in range(ROUNDS):
            tokens = [wrong(shared) for shared in shares]  # new ones: where they lie in memory is no part of it
            for which in order.sample(range(3), 3):
                token = tokens[which]
                start = time.perf_counter_ns()
                refuse(token)
                times[round_, which] = time.perf_counter_ns() - start
    finally:
        gc.enable()
    # Ties, which a coarse clock makes, in a random order: then all orders are equally likely still.
    jitter = np.random.default_rng(5).random(times.shape) * 1e-3
    ranks = (times + jitter).argsort(axis=1).argsort(axis=1) + 1
    page = float((ranks * np.array([1, 2, 3])).sum())
    # In a round L is 12 on average with variance 2, as the six orders have it: 10, 11, 11, 13, 13, 14.
    certain = (page - 12 * ROUNDS) / math.sqrt(2 * ROUNDS)
    return certain, float(np.median(times[:, 2] - times[:, 0]) / np.median(times))


def leaks(refuse: Callable[[str], Any]) -> bool:
    certain, size = leak(refuse)
    return abs(certain) > CERTAIN and abs(size) > SIZE


def test_the_time_of_a_refusal_says_nothing_about_keys() -> None:
    opens = keys()
    assert not leaks(opens.authenticate)


def refused_by(guarded: Door) -> Callable[[str], None]:
    def refuse(token: str) -> None:
        with suppress(AuthenticationFailed):
            guarded._check_admin(token)

    return refuse


def test_the_time_of_a_refusal_says_nothing_about_the_admin_key() -> None:
    assert not leaks(refused_by(door()))


def compared_letter_by_letter(token: str) -> bool:
    """Ends at the first difference, as `==` does of strings, which is only faster."""
    for one, other in zip(token, REAL, strict=False):
        if one != other:
            return False
    return len(token) == len(REAL)


@pytest.mark.parametrize("whose", ["a caller", "the admin"])
def test_a_comparison_that_ends_at_the_first_difference_is_found(whose: str) -> None:
    honest: Callable[[str], Any] = keys().authenticate if whose == "a caller" else refused_by(door())

    def naive(token: str) -> None:
        compared_letter_by_letter(token)
        honest(token)

    certain, size = leak(naive)
    assert certain > 2 * CERTAIN
    assert size > 2 * SIZE
    assert leaks(naive)


def test_the_measure_has_the_moments_that_it_is_said_to_have() -> None:
    from itertools import permutations

    sums = [
        sum(rank * weight for rank, weight in zip(order, (1, 2, 3), strict=True)) for order in permutations((1, 2, 3))
    ]
    assert sorted(sums) == [10, 11, 11, 13, 13, 14]
    assert (np.mean(sums), np.var(sums)) == (12, 2)
