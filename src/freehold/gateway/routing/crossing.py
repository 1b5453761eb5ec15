"""How a step of the ramp takes effect on several gateways at once, so that no conversation changes its arm by it.

A rising share gives the canary a *band* of units, from the old share to the new one. Those of its conversations that
began on the control must stay there, on whichever gateway they go on; the others are the canary's. A gateway knows the
conversations that it has seen itself (`assign.Pins`). What it does not know it must ask for exactly as long as the
gateways may differ about the share, and that is short. So each one goes through three levels, and tells the others:

    1  It knows of the step. The old share is in force. It has written down its pins for all; and a conversation of the
       band that is new to it is **claimed** in the database before it gets an arm: the control's, unless another
       gateway was first.
    2  All gateways are at 1 or above. The new share is in force. A new conversation of the band is claimed for the
       canary, unless another gateway was first.
    3  All are at 2 or above: nobody gives one of these the control any more. What was written down is read. Nothing is
       claimed any more, and calls cost what they cost before.

At 1 beside 0, all that do not know better say control. At 1 beside 2, all claim. At 2 beside 3, all say canary. So no
two gateways ever give one conversation different arms, whenever they hear of the step, and no clocks are compared.

A gateway that has told nothing for `LIVE_SECONDS` is not waited for; its own clock tells it that, and then it joins
again before it decides about what it does not know. One that joins begins where the last of the others is, and takes no
call before it has caught up. A falling share (a rollback) takes effect on each gateway as soon as it hears of it,
within a second.

Why not a table of all conversations: most have one call, and each would cost a write and a wait. Why not a moment that
all agree on: a conversation may begin on one gateway just before it, and go on at another just after.

What is left: a conversation that began on a gateway less than 0.2 s before that was killed is known to nobody, and one
that begins on a gateway that stalls for `LIVE_SECONDS` right then, before it notices, may be missed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from freehold.errors import FreeholdError, Unavailable
from freehold.gateway.config import Settings
from freehold.gateway.routing.agreement import NOTHING, Change, Mark, Shared, aa_until, last_fall
from freehold.gateway.routing.assign import PIN_SECONDS, Pins

_log = logging.getLogger(__name__)

LIVE_SECONDS = 5.0
TURN_SECONDS = 0.5
REFRESH_SECONDS = 300.0
"""So often gateways tell one another which of the pinned conversations are still alive."""
WAIT_SECONDS = 5.0
"""So long a call waits at most until its gateway has caught up with the others."""
_JOINS = 3  # in one turn; one that is taken for dead more often has a database too slow to agree on anything
_OLD, _NEW, _SETTLED = 1, 2, 3


@dataclass(frozen=True, slots=True)
class Agreed:
    """A standing: `route.Standing`."""

    share: float
    aa: bool = False
    band: tuple[float, float] | None = None


@dataclass(slots=True)
class _Place:
    """Where this gateway stands in one experiment. heard: the last number that was read."""

    control: str
    changes: list[Change] = field(default_factory=lambda: [Change(NOTHING, 0.0, 0.0, False)])
    heard: int = NOTHING
    at: int = 0  # index of the change that is followed
    level: int = _SETTLED
    until: float = -1.0  # monotonic; later this gateway may be taken for dead
    standing: Agreed | None = None
    claims: int = 0  # for the control that are on their way
    written: asyncio.Event = field(default_factory=asyncio.Event)  # there are none
    refreshed: float = 0.0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    pending: asyncio.Task[None] | None = None  # the turn that all claims wait for

    def __post_init__(self) -> None:
        self.written.set()

    def claiming(self, more: int) -> None:
        """So many more claims for the control are on their way."""
        self.claims += more
        if self.claims:
            self.written.clear()
        else:
            self.written.set()

    @property
    def mark(self) -> Mark:
        return Mark(self.changes[self.at].number, self.level)

    def stand(self) -> None:
        """Have in force what the level says."""
        new, old = self.changes[self.at], self.changes[max(0, self.at - 1)]
        if new.number == NOTHING:
            self.standing = None
        elif self.level == _SETTLED:
            self.standing = Agreed(new.share, new.aa)
        else:
            now = old if self.level == _OLD else new
            self.standing = Agreed(now.share, now.aa, (old.given, new.given))


class Crossings:
    """Standings of experiments as all gateways agree on them: `route.Experiments`. pins: this gateway's, by name."""

    def __init__(self, settings: Settings, shared: Shared, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.pins: Callable[[str], Pins | None] = lambda experiment: None
        self._shared, self._clock = shared, clock
        self._places: dict[str, _Place] = {}
        self.configure(settings)

    def configure(self, settings: Settings) -> None:
        self._places = {
            name: known if (known := self._places.get(name)) and known.control == each.control else _Place(each.control)
            for name, each in settings.experiments.items()
        }

    def standing(self, experiment: str) -> Agreed | None:
        place = self._places.get(experiment)
        if place is None or place.standing is None:
            return None
        if self._clock() > place.until:  # the others may have gone on without this one: ask about everybody
            return Agreed(place.standing.share, place.standing.aa, (0.0, 1.0))
        return place.standing

    @property
    def open(self) -> bool:
        """Whether anything is being agreed about now: otherwise nobody need `claim`."""
        now = self._clock()
        return any(
            place.standing is not None and (place.standing.band is not None or now > place.until)
            for place in self._places.values()
        )

    async def claim(self, experiment: str, conversation: str, at: float) -> None:
        """Learn where a conversation is that is new here, or what has changed. at: now, epoch seconds.

        Raises Unavailable: the database does not answer, or not within `WAIT_SECONDS`.
        """
        place, pins = self._places.get(experiment), self.pins(experiment)
        if place is None or pins is None:
            return
        if self._clock() > place.until:
            await self._caught_up(experiment, place)
            return
        on_canary = place.level != _OLD
        place.claiming(int(not on_canary))
        try:
            found = await self._shared.claim(experiment, conversation, on_canary)
        finally:
            place.claiming(-int(not on_canary))
        if found is None:
            place.until = -1.0
        if self._clock() > place.until:  # the others may have gone on meanwhile, and so this answer may not hold
            await self._caught_up(experiment, place)
        elif found:
            pins.to_canary(conversation)
        else:
            pins.pin(conversation, at)

    async def _caught_up(self, experiment: str, place: _Place) -> None:
        """Wait for one turn, the same for all that wait. Raises Unavailable."""
        if place.pending is None or place.pending.done():
            place.pending = asyncio.create_task(self._catch_up(experiment, place))
            place.pending.add_done_callback(_seen)
        turn = place.pending
        await asyncio.wait({turn}, timeout=WAIT_SECONDS)  # it goes on for the others when one of them hangs up
        if turn.done() and not turn.cancelled():
            turn.result()
        if self._clock() > place.until:
            raise Unavailable(f"experiment {experiment!r}: the other gateways cannot be heard", retry_after=1)

    async def _catch_up(self, experiment: str, place: _Place) -> None:
        async with place.lock:
            if self._clock() > place.until:  # else the turn that had the lock did it
                await self._go_on(experiment, place)

    async def run(self) -> None:
        """Keep up with the others, until cancelled."""
        while True:
            for name in list(self._places):
                try:
                    await self.turn(name)
                except FreeholdError as error:
                    _log.warning("experiment %s: %s", name, error)
                except Exception:
                    _log.exception("experiment %s: its share stands still here", name)
            await asyncio.sleep(TURN_SECONDS)

    async def turn(self, experiment: str) -> None:
        """Hear of records, tell the others how far this gateway is, and go as far as they let it."""
        place = self._places.get(experiment)
        if place is None:
            return
        async with place.lock:
            await self._go_on(experiment, place)

    async def _go_on(self, experiment: str, place: _Place) -> None:
        """A turn, by the holder of the lock."""
        joins = 0
        if place.until < 0:
            await self._join(experiment, place)
        else:
            await self._hear(experiment, place)
        while True:
            begun = self._clock()
            others = await self._shared.beat(experiment, place.mark)
            if others is None:
                joins += 1
                if joins > _JOINS:
                    raise Unavailable(f"experiment {experiment!r}: the database is too slow to agree", retry_after=1)
                await self._join(experiment, place)
            elif not await self._rise(experiment, place, others):
                break
        place.until = begun + LIVE_SECONDS  # only now: it has caught up with the others
        await self._refresh(experiment, place)

    @asynccontextmanager
    async def _kept(self, experiment: str, place: _Place, told: Mark) -> AsyncIterator[None]:
        """Stay alive during something that takes long. told: what the others know, which stays true meanwhile."""
        ended = asyncio.Event()
        beats = asyncio.create_task(self._keep(experiment, place, told, ended))
        try:
            yield
        finally:
            ended.set()
            await beats  # not cancelled: one that is on its way must not arrive after the next mark

    async def _keep(self, experiment: str, place: _Place, told: Mark, ended: asyncio.Event) -> None:
        while True:
            try:
                await asyncio.wait_for(ended.wait(), LIVE_SECONDS / 3)
                return
            except TimeoutError:
                begun = self._clock()
            try:
                if await self._shared.beat(experiment, told) is None:
                    return  # the turn's own beat will say so, too
            except FreeholdError:
                continue
            if begun < place.until:  # one that has not caught up with the others stays behind until it has
                place.until = begun + LIVE_SECONDS

    async def _join(self, experiment: str, place: _Place) -> None:
        await self._hear(experiment, place)
        number = await self._shared.join(experiment, place.changes[-1].number)
        await self._hear(experiment, place)  # only now: what the others have gone on to without this one was written
        place.at = max(index for index, each in enumerate(place.changes) if each.number <= number)
        place.level, place.until = _OLD, -1.0  # until it has caught up: what fails on the way is begun anew
        place.stand()
        async with self._kept(experiment, place, place.mark):
            await self._remember(experiment, place)

    async def _hear(self, experiment: str, place: _Place) -> None:
        for change in await self._shared.changes(experiment, place.heard):
            place.heard = change.number
            last = place.changes[-1]
            if last.number == NOTHING or (change.share, change.aa) != (last.share, last.aa):
                place.changes.append(change)

    async def _rise(self, experiment: str, place: _Place, others: Iterable[Mark]) -> bool:
        """Go one level on, if that is allowed; whether it was. The others may hear of it only after that."""
        told = place.mark
        fallen = last_fall(place.changes, place.at)
        if fallen > place.at:
            place.at, place.level = fallen, _SETTLED
            self._settle(experiment, place)
        elif place.level == _OLD and all(each >= place.mark for each in others):
            place.level = _NEW
            place.stand()
            async with self._kept(experiment, place, told):
                await place.written.wait()  # what was claimed for the control
        elif place.level == _NEW and all(each >= place.mark for each in others):
            async with self._kept(experiment, place, told):
                await self._learn(experiment, place)
            place.level = _SETTLED
            self._settle(experiment, place)
        elif place.level == _SETTLED and place.at + 1 < len(place.changes):
            place.at, place.level = place.at + 1, _OLD
            place.stand()
            try:
                async with self._kept(experiment, place, told):
                    await self._remember(experiment, place)
            except BaseException:  # the others must not hear of a level that was not reached
                place.at, place.level = place.at - 1, _SETTLED
                place.stand()
                raise
        else:
            return False
        return True

    def _settle(self, experiment: str, place: _Place) -> None:
        place.stand()
        if (pins := self.pins(experiment)) is not None:
            pins.canary.clear()

    async def _remember(self, experiment: str, place: _Place) -> None:
        """Write down all that began on the control: here, or according to the ledger on a gateway that is gone."""
        if (pins := self.pins(experiment)) is None:
            return
        since = time.time() - PIN_SECONDS
        ended = aa_until(place.changes)
        rows = await self._shared.in_ledger(experiment, since)
        pins.recall((name, last) for arm, name, first, last in rows if arm == place.control or first < ended)
        await self._shared.share(experiment, pins.living(time.time()))

    async def _learn(self, experiment: str, place: _Place) -> None:
        """Take over all that was written down."""
        if (pins := self.pins(experiment)) is None:
            return
        found = await self._shared.shared(experiment, time.time() - PIN_SECONDS - REFRESH_SECONDS)
        pins.recall((each.name, each.at) for each in found if not each.on_canary)
        for each in found:
            if each.on_canary:
                pins.to_canary(each.name)

    async def _refresh(self, experiment: str, place: _Place) -> None:
        pins = self.pins(experiment)
        if pins is None or self._clock() < place.refreshed + REFRESH_SECONDS:
            return
        first, place.refreshed = not place.refreshed, self._clock()
        if not first and place.level == _SETTLED:
            async with self._kept(experiment, place, place.mark):
                await self._shared.share(experiment, pins.held())
                await self._learn(experiment, place)
            pins.canary.clear()


def _seen(turn: asyncio.Task[None]) -> None:
    """All that waited for it may have gone: then nobody asks how it ended."""
    if not turn.cancelled():
        turn.exception()
