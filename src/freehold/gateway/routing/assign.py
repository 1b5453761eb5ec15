"""Who gets which arm: the same unit the same arm, without a table, on every gateway that has the same secret.

A unit (a conversation, a user or a key) is hashed with keyed BLAKE2b to a point in [0, 1). The canary has the units
below its share, so raising the share only adds units, and lowering it only takes the latest ones away. Another
experiment has another salt, and so another, independent order of the units.

Among weighted arms a unit goes to the one with the smallest -ln(point) / weight, a point for each arm (weighted
rendezvous hashing). Then the shares are as the weights, and changing one weight, or adding or removing an arm, moves
units only to or from that arm. Torch-free.

Source: Wang and Ravishankar, "A Name-Based Mapping Scheme for Rendezvous" (University of Michigan, 1996); the weights
are an exponential race, in which arm i is first with probability w_i / Σw.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from operator import itemgetter
from typing import TypeVar

_T = TypeVar("_T")
PIN_SECONDS = 3600.0  # a conversation that is quiet for longer is over
_STEP = 2.0**-53  # between neighbouring floats in [0.5, 1): the finest grid on which all points are exact


class Points:
    """Where units lie in [0, 1), for one purpose (`salt`). Equal secret, salt and unit give an equal point everywhere.

    secret: 16 to 64 bytes, the gateway's. Who does not have it can neither choose an arm by choosing an id, nor tell
    from the arm of one experiment which arm of another a unit has.
    """

    __slots__ = ("_begun",)

    def __init__(self, secret: bytes, salt: str) -> None:
        if not 16 <= len(secret) <= 64:
            raise ValueError(f"the secret must have 16 to 64 bytes, not {len(secret)}")
        key = blake2b(salt.encode(), key=secret, digest_size=32).digest()
        self._begun = blake2b(key=key, digest_size=8)  # copying it saves the round over the key for each unit

    def __call__(self, unit: str) -> float:
        return self.grid(unit) * _STEP

    def grid(self, unit: str) -> int:
        """The point in steps of 2^-53."""
        hashed = self._begun.copy()
        hashed.update(unit.encode())
        return int.from_bytes(hashed.digest(), "big") >> 11

    def race(self, unit: str, weight: float) -> float:
        """When an arm of this weight arrives, exponentially distributed; the first one gets the unit."""
        return -math.log((self.grid(unit) + 0.5) * _STEP) / weight if weight > 0 else math.inf


def ranking(arms: Sequence[tuple[Points, float, _T]], unit: str) -> list[_T]:
    """The arms (points, weight, arm) in the order in which this unit prefers them; those without weight are left out.

    The first is the unit's own; the next is the one it would have if the first did not exist, and so on.
    """
    if len(arms) == 1:
        return [arms[0][2]] if arms[0][1] > 0 else []
    races = [(points.race(unit, weight), number) for number, (points, weight, _) in enumerate(arms) if weight > 0]
    return [arms[number][2] for _, number in sorted(races)]


class Pins:
    """Conversations that began on the control of an experiment, which the canary's growing share must not reach.

    A hash alone would move a running conversation as soon as the share passes its point. So the ones that began on the
    control are remembered while they are alive: `idle_seconds` after their last request they are forgotten, and if
    there are more than `most`, so is the one that was quiet for the longest. Those of the canary need no memory: its
    share only grows. When it shrinks (a rollback), leaving the canary is what is wanted.
    """

    __slots__ = ("_held", "_seen", "canary", "idle_seconds", "most")

    def __init__(self, idle_seconds: float = PIN_SECONDS, most: int = 100_000) -> None:
        self.idle_seconds = idle_seconds
        self.most = most
        self.canary: set[str] = set()  # of those whose unit a rising share just reaches: known to be the canary's
        self._seen: OrderedDict[str, float] = OrderedDict()  # by last request
        self._held: dict[str, float] = {}  # those that were kept from the canary lately

    def __len__(self) -> int:
        return len(self._seen)

    def holds(self, conversation: str, now: float) -> bool:
        """Whether this conversation began on the control, and lives. now: epoch seconds."""
        seen = self._seen.get(conversation)
        return seen is not None and now - seen <= self.idle_seconds

    def pin(self, conversation: str, now: float) -> None:
        """Remember it, or that it is alive."""
        seen = self._seen
        seen[conversation] = max(now, seen.get(conversation, now))
        seen.move_to_end(conversation)
        while len(seen) > self.most or now - next(iter(seen.values())) > self.idle_seconds:
            seen.popitem(last=False)

    def recall(self, found: Iterable[tuple[str, float]]) -> None:
        """Remember more, heard of elsewhere: conversations and their last requests (epoch seconds), in any order. Each
        gets its place by that, so that beyond the maximum the quietest are forgotten, not the living."""
        seen = self._seen
        later: dict[str, float] = {}
        for conversation, at in found:
            if at > max(seen.get(conversation, -math.inf), later.get(conversation, -math.inf)):
                later[conversation] = at
        if later:
            self._seen = OrderedDict(sorted((seen | later).items(), key=itemgetter(1))[-self.most :])

    def hold(self, conversation: str, now: float) -> None:
        """It was kept from the canary, and lives."""
        self._held[conversation] = now
        self.pin(conversation, now)

    def held(self) -> dict[str, float]:
        """Those that were kept from the canary since this was asked the last time, and when last."""
        held, self._held = self._held, {}
        return held

    def living(self, now: float) -> dict[str, float]:
        """All that live, and their last requests."""
        return {conversation: at for conversation, at in self._seen.items() if now - at <= self.idle_seconds}

    def to_canary(self, conversation: str) -> None:
        """It began on the canary, on another gateway."""
        self._seen.pop(conversation, None)
        self.canary.add(conversation)
