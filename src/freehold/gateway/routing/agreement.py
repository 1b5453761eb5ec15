"""What gateways on one database say to one another while an experiment's share changes: see `routing.crossing`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

from freehold.gateway.keeping.records import Decided

NOTHING = -1
"""The number before the first record."""


class Mark(NamedTuple):
    """How far a gateway is: the number of the record that it follows, and the level."""

    number: int
    level: int


class Conversation(NamedTuple):
    """What was written down of one. at: when it was last heard of, epoch seconds."""

    name: str
    on_canary: bool
    at: float


class Change(NamedTuple):
    """A record from which on another share is to be given. at: when it was written."""

    number: int
    at: float
    share: float
    aa: bool

    @property
    def given(self) -> float:
        """The share that really gets the canary's model."""
        return 0.0 if self.aa else self.share


class Shared(Protocol):
    """What gateways tell one another, by the database. All raise Unavailable."""

    async def join(self, experiment: str, number: int) -> int:
        """Be followed by the others from now on, at level 1 of the lowest number among them; alone: of `number`."""

    async def beat(self, experiment: str, mark: Mark) -> list[Mark] | None:
        """Say how far this gateway is, and that it lives; returns how far the others are that live, as they are after
        that. None: it was taken for dead, and must join."""

    async def share(self, experiment: str, pinned: Mapping[str, float]) -> None:
        """Write down conversations that began on the control, and when they were last heard of."""

    async def shared(self, experiment: str, since: float) -> list[Conversation]:
        """All that was written down of conversations that lived since then."""

    async def claim(self, experiment: str, conversation: str, on_canary: bool) -> bool | None:
        """Write down where a conversation begins, unless it is known; whether it is on the canary. None, and nothing is
        written: this gateway was taken for dead, and must join."""

    async def in_ledger(self, experiment: str, since: float) -> list[tuple[str, str, float, float]]:
        """Arm, conversation, its first and its last call: of the ledger's rows since then."""

    async def changes(self, experiment: str, after: int) -> list[Change]:
        """What the records after a number say."""


def last_fall(changes: Sequence[Change], after: int) -> int:
    """The last change to no more of the canary than before, after one of them; 0: there is none."""
    falls = (index for index in range(len(changes) - 1, after, -1) if changes[index].given <= changes[index - 1].given)
    return next(falls, 0)


def aa_until(changes: Sequence[Change]) -> float:
    """When the last A/A run ended: conversations that began before are on the control, whatever their arm is called.
    Infinite: it still goes on; minus infinity: there was none."""
    if changes and changes[-1].aa:
        return float("inf")
    ends = [after.at for before, after in pairwise(changes) if before.aa and not after.aa]
    return max(ends, default=float("-inf"))


def change_of(record: Decided) -> Change:
    """What a record says about the share."""
    return Change(record.number, record.at, record.record["share"], record.record.get("aa", False))
