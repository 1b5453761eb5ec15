"""The replicas of an upstream: which take calls, and which of them gets the next one. No I/O; `probes` feeds it.

A replica is in one of these states, told by `Replica.state`:

    fresh ──a generation──▶ ready ──probes fail──▶ out ──a probe and a generation──▶ ready
      └──────probes or the generation fail────────▶ out
    draining: takes no new calls, whatever it is otherwise; ended when none runs

Fresh ones (nobody has asked them yet) are used only where no ready one is. Apart from that, a circuit breaker stands
before each replica: after `breaker.failures` failed calls in a row none is sent for `open_seconds`, then one; if that
succeeds the circuit is closed. Torch-free, and on the hot path.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from hashlib import blake2b
from typing import Literal, TypeAlias

from freehold.errors import Unavailable
from freehold.gateway.config import Upstream
from freehold.gateway.routing.engine_load import Load

State: TypeAlias = Literal["fresh", "ready", "out", "draining"]
Clock: TypeAlias = Callable[[], float]

SHY_SECONDS = 1.0
"""So long after a failed call a replica is asked only if no other is left."""
BUSIER, MORE = 1.25, 4.0
"""A conversation leaves its replica where that has over BUSIER times and MORE requests more than the least loaded."""


class Replica:
    """One address of an upstream, and what is known of it. `done` and the probes keep it up to date."""

    __slots__ = (
        "_open_until", "_trial", "draining", "failed_at", "failures", "fresh", "healthy", "in_flight", "load",
        "load_at", "load_in_flight", "probe_failures", "ready", "settings", "upstream", "url",
    )  # fmt: skip

    def __init__(self, upstream: str, url: str, settings: Upstream) -> None:
        self.upstream, self.url, self.settings = upstream, url, settings
        self.in_flight = 0
        self.draining = False
        # what probes say
        self.fresh = True
        self.ready = False  # a generation was completed, and no probe has failed too often since
        self.healthy = True
        self.probe_failures = 0  # in a row
        self.load: Load | None = None
        self.load_at = -math.inf
        self.load_in_flight = 0  # our own calls when the engine was asked
        # what calls say
        self.failures = 0  # in a row
        self.failed_at = -math.inf
        self._open_until: float | None = None  # the circuit is open; from then on one call may try
        self._trial = False

    @property
    def state(self) -> State:
        if self.draining:
            return "draining"
        if not self.healthy:
            return "out"
        return "ready" if self.ready else "fresh" if self.fresh else "out"

    @property
    def circuit_open(self) -> bool:
        return self._open_until is not None

    def wait(self, now: float) -> float:
        """Seconds until the circuit lets a call through; 0: it does now, infinite: one is being tried."""
        if self._open_until is None:
            return 0.0
        return math.inf if self._trial else max(0.0, self._open_until - now)

    def begin(self) -> None:
        """A call is sent."""
        self.in_flight += 1
        self._trial = self._open_until is not None

    def end(self, ok: bool, now: float) -> None:
        """A call is over. Called once for each `begin`."""
        self.in_flight -= 1
        if ok:
            self.failures, self._open_until, self._trial = 0, None, False
            return
        self.failures += 1
        self.failed_at = now
        if self._trial or self.failures >= self.settings.breaker.failures:
            self._open_until, self._trial = now + self.settings.breaker.open_seconds, False

    def busy(self, now: float) -> float | None:
        """Requests of all gateways that it works on, weighed by `Load.score`; None: the engine does not say, or said
        it too long ago. Our own calls since then are added."""
        if self.load is None or now - self.load_at > 3 * self.settings.health.every:
            return None
        return max(0.0, self.load.score + self.in_flight - self.load_in_flight)


class Pool:
    """The replicas of one upstream."""

    def __init__(
        self, name: str, settings: Upstream, replicas: Iterable[Replica], clock: Clock = time.monotonic
    ) -> None:
        self.name, self.settings = name, settings
        self.replicas = tuple(replicas)
        self._clock = clock
        self._turn = 0

    @property
    def ready(self) -> bool:
        return any(replica.state == "ready" for replica in self.replicas)

    def choose(self, conversation: str, avoid: frozenset[str] = frozenset()) -> Replica:
        """The replica for a call, whose in-flight count it raises. avoid: URLs to be used only if there is no other.

        A conversation has one order of all replicas (rendezvous hashing), and goes to the first that takes calls: where
        its prefix is cached. It does so unless that one is much busier than the least loaded, which otherwise gets it.
        Raises Unavailable, with the time to come back.
        """
        now = self._clock()
        limit = self.settings.max_concurrent
        if limit is not None and sum(replica.in_flight for replica in self.replicas) >= limit:
            raise Unavailable(f"upstream {self.name!r} has its {limit} calls; try again", retry_after=1.0)
        able = self._able(now, avoid)
        chosen = able[0] if len(able) == 1 else self._among(able, conversation, now)
        chosen.begin()
        return chosen

    def _able(self, now: float, avoid: frozenset[str]) -> list[Replica]:
        """Those that may be called, of the best sort that there is."""
        serving = [replica for replica in self.replicas if replica.state in ("ready", "fresh")]
        closed = [replica for replica in serving if replica.wait(now) == 0.0]
        if not closed:
            waits = [replica.wait(now) for replica in serving]
            back = min((wait for wait in waits if math.isfinite(wait)), default=self.settings.health.every)
            raise Unavailable(f"upstream {self.name!r} has no replica that takes calls now", retry_after=max(back, 0.1))
        closed = [replica for replica in closed if replica.url not in avoid] or closed
        ready = [replica for replica in closed if replica.ready] or closed
        steady = [replica for replica in ready if now - replica.failed_at >= SHY_SECONDS]
        return steady or ready

    def _among(self, able: list[Replica], conversation: str, now: float) -> Replica:
        told = [replica.busy(now) for replica in able]
        # Figures of some engines and mere counts of calls to others could not be compared.
        loads = [replica.in_flight if None in told else busy or 0.0 for replica, busy in zip(able, told, strict=True)]
        least = min(loads)
        if conversation and self.settings.affinity:
            best = max(range(len(able)), key=lambda number: _affinity(conversation, able[number].url))
            if loads[best] <= max(BUSIER * least, least + MORE):
                return able[best]
        self._turn += 1
        equal = [replica for replica, load in zip(able, loads, strict=True) if load == least]
        return equal[self._turn % len(equal)]


def _affinity(conversation: str, url: str) -> bytes:
    """The replica with the greatest one is the conversation's. The same in every gateway, so that they agree."""
    return blake2b(f"{conversation}\0{url}".encode(), digest_size=8).digest()
