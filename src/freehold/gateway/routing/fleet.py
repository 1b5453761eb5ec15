"""All replicas of all upstreams: kept over reloads, watched in the background, drained and brought back. Torch-free.

Switching weights, quantisation or machines behind an alias without a failed request:

1.  `prepare(settings)`: what the new settings add is asked for a generation. The old settings serve meanwhile, and if
    none of an upstream's replicas completes one, they stay.
2.  `configure(settings)`: from one request to the next, calls go to the new replicas.
3.  Calls at the replicas that are gone run to their end: `leaving` counts them, `drained` waits for them.

A replica is the same over a reload if its upstream's name, its address, its engine and the digests of its weights are.
With other ones it is a new replica, although at an old address. `drain` and `restore` do the same by hand for one
replica, whose process is then restarted.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Mapping, Sequence

from freehold.errors import NotFound, Unavailable
from freehold.gateway.call import Request, Target
from freehold.gateway.config import Settings, Upstream
from freehold.gateway.routing.probes import Auth, Prober, is_warmed
from freehold.gateway.routing.replicas import Clock, Pool, Replica

_AGAIN_SECONDS = 0.5  # between probes of what is awaited

Key = tuple[object, ...]


class Fleet:
    """auth: see `probes.Auth`. clock: monotonic seconds."""

    def __init__(self, settings: Settings, auth: Auth, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._prober = Prober(auth, air_gapped=settings.gateway.air_gapped, clock=clock)
        self._auth = auth
        self._replicas: dict[Key, Replica] = {}
        self._prepared: dict[Key, Replica] = {}
        self._leaving: list[Replica] = []
        self._models: dict[str, tuple[str, ...]] = {}
        self._idle = asyncio.Event()  # set whenever some replica's last call has ended
        self._watchers: dict[Replica, asyncio.Task[None]] | None = None  # None: not running
        self.pools: Mapping[str, Pool] = {}
        self.configure(settings)

    def choose(self, target: Target, request: Request, avoid: frozenset[str] = frozenset()) -> Replica:
        """See `parts.Router`. Raises Unavailable, also if a reload took the upstream away since the decision."""
        pool = self.pools.get(target.upstream)
        if pool is None:
            raise Unavailable(f"upstream {target.upstream!r} is not in the settings any more", retry_after=0.1)
        return pool.choose(request.conversation, avoid)

    def done(self, replica: Replica, ok: bool) -> None:
        replica.end(ok, self._clock())
        if replica.in_flight == 0:
            self._idle.set()
            if self._leaving:
                self._leaving = self.leaving

    @property
    def leaving(self) -> list[Replica]:
        """Those that are in the settings no more, but still have calls."""
        return [replica for replica in self._leaving if replica.in_flight]

    def configure(self, settings: Settings) -> None:
        """Take new settings, at once. What was prepared is ready; what is known is kept, with its calls."""
        self._prober.air_gapped = settings.gateway.air_gapped
        known = self._replicas | self._prepared
        self._prepared = {}
        self._replicas = {key: known.get(key) or replica for key, replica in _replicas(settings).items()}
        kept = set(self._replicas.values())
        self._leaving = self.leaving + [each for key, each in known.items() if each not in kept and each.in_flight]
        pools: dict[str, Pool] = {}
        for name, upstream in settings.upstreams.items():
            own = [replica for replica in self._replicas.values() if replica.upstream == name]
            for replica in own:
                replica.settings = upstream
            pools[name] = Pool(name, upstream, own, self._clock)
        self.pools = pools
        self._models = models_by_upstream(settings)
        self._watch()

    async def prepare(self, settings: Settings) -> None:
        """Make ready what these settings add, before they are taken.

        Of each upstream that has no ready replica, one must complete a generation within `health.warm_up_seconds`; the
        others come when they are ready. Raises Unavailable, which names the upstream; then nothing has changed.
        """
        models = models_by_upstream(settings)
        fresh: dict[Key, Replica] = {}
        awaited: dict[str, list[Replica]] = {}
        for key, replica in _replicas(settings).items():
            known = self._replicas.get(key)
            if known is None:
                fresh[key] = replica
            if is_warmed(replica.settings) and models.get(replica.upstream):
                awaited.setdefault(replica.upstream, []).append(known or replica)
        prober = Prober(self._auth, air_gapped=settings.gateway.air_gapped, clock=self._clock)
        new = set(fresh.values())
        try:
            await asyncio.gather(
                *(
                    self._first_ready(prober, name, [replica for replica in replicas if replica in new], models[name])
                    for name, replicas in awaited.items()
                    # One that was there before and is down is no reason to refuse another change.
                    if all(replica in new for replica in replicas)
                )
            )
        finally:
            await prober.close()
        self._prepared = fresh

    async def run(self) -> None:
        """Watch all replicas until cancelled."""
        self._watchers = {}
        self._watch()
        try:
            await asyncio.Event().wait()
        finally:
            watchers, self._watchers = self._watchers, None
            for task in watchers.values():
                task.cancel()
            await asyncio.gather(*watchers.values(), return_exceptions=True)
            await self._prober.close()

    def drain(self, url: str) -> list[Replica]:
        """No new calls to the replicas at this address. Raises NotFound."""
        found = self._at(url)
        for replica in found:
            replica.draining = True
        return found

    async def drained(self, url: str) -> None:
        """Returns when no call runs at this address any more, also if it left the settings."""
        wanted = url.rstrip("/")
        while any(replica.in_flight for replica in (*self._replicas.values(), *self._leaving) if replica.url == wanted):
            self._idle.clear()
            await self._idle.wait()

    async def restore(self, url: str) -> list[Replica]:
        """Back from draining, after a generation: what is behind the address is another process now. Raises NotFound,
        or Unavailable if it generates nothing; then it stays drained, and this can be tried again."""
        found = self._at(url)
        for replica in found:
            replica.ready, replica.fresh = False, True
            await self._prober.look(replica, self._models.get(replica.upstream, ()))
            if not replica.ready:
                raise Unavailable(f"{replica.url} of upstream {replica.upstream!r} completed no generation")
            replica.draining = False
        return found

    def describe(self) -> list[dict[str, object]]:
        """Each replica's state, for the admin API."""
        now = self._clock()
        return [
            {
                "upstream": replica.upstream,
                "url": replica.url,
                "state": replica.state if replica in current else "leaving",
                "in_flight": replica.in_flight,
                "circuit_open": replica.circuit_open,
                "busy": replica.busy(now),
            }
            for current in (set(self._replicas.values()),)
            for replica in (*self._replicas.values(), *self.leaving)
        ]

    def _at(self, url: str) -> list[Replica]:
        found = [replica for replica in self._replicas.values() if replica.url == url.rstrip("/")]
        if not found:
            raise NotFound(f"no upstream has a replica at {url}")
        return found

    def _watch(self) -> None:
        """Have one task for each replica of now."""
        if self._watchers is None:
            return
        current = set(self._replicas.values())
        for replica in [each for each in self._watchers if each not in current]:
            self._watchers.pop(replica).cancel()
        for replica in current - self._watchers.keys():
            self._watchers[replica] = asyncio.create_task(self._keep_asking(replica), name=f"watch {replica.url}")

    async def _keep_asking(self, replica: Replica) -> None:
        while True:
            await self._prober.look(replica, self._models.get(replica.upstream, ()))
            # Not all gateways at once, nor all replicas.
            await asyncio.sleep(replica.settings.health.every * random.uniform(0.9, 1.1))

    async def _first_ready(self, prober: Prober, name: str, replicas: Sequence[Replica], models: Sequence[str]) -> None:
        seconds = replicas[0].settings.health.warm_up_seconds

        async def until_ready(replica: Replica) -> None:
            while not replica.ready:
                await prober.look(replica, models)
                if not replica.ready:
                    await asyncio.sleep(_AGAIN_SECONDS)

        tasks = [asyncio.create_task(until_ready(replica)) for replica in replicas]
        try:
            done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(*tasks, return_exceptions=True)
        if not done:
            raise Unavailable(f"upstream {name!r}: no replica completed a generation within {seconds:g} s")


def models_by_upstream(settings: Settings) -> dict[str, tuple[str, ...]]:
    """What each upstream is asked for by the aliases, each model once."""
    arms = [arm for model in settings.models.values() for arm in model.arms]
    return {
        name: tuple(dict.fromkeys(arm.model for arm in arms if arm.upstream == name))
        for name in settings.upstreams
        if any(arm.upstream == name for arm in arms)
    }


def _replicas(settings: Settings) -> dict[Key, Replica]:
    """New objects, by what makes a replica the same one."""
    return {
        (name, url, upstream.engine, _weights(upstream)): Replica(name, url, upstream)
        for name, upstream in settings.upstreams.items()
        for url in upstream.replicas
    }


def _weights(upstream: Upstream) -> tuple[tuple[str, str], ...]:
    return tuple((name, model.weights) for name, model in upstream.models.items() if model.weights)
