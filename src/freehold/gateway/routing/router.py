"""The router that the door calls: decisions from the settings, replicas from the fleet. Torch-free.

router = Router(settings, secret, experiments, auth)
await router.prepare(new)      # at a reload, before the parts are configured; old settings serve meanwhile
router.configure(new)
asyncio.create_task(router.run())
"""

from __future__ import annotations

import time

from freehold.gateway.call import Caller, Decision, Request, Target
from freehold.gateway.config import Settings
from freehold.gateway.parts import Replica as AnyReplica
from freehold.gateway.routing.crossing import Crossings
from freehold.gateway.routing.fleet import Fleet
from freehold.gateway.routing.probes import Auth
from freehold.gateway.routing.replicas import Clock, Replica
from freehold.gateway.routing.route import Experiments, Table, Unclaimed
from freehold.ledger import Row


class Router:
    """A `parts.Router`. See `Table` for secret and experiments, `probes.Auth` for auth."""

    def __init__(
        self,
        settings: Settings,
        secret: bytes,
        experiments: Experiments,
        auth: Auth,
        clock: Clock = time.monotonic,
        crossings: Crossings | None = None,
    ) -> None:
        """crossings: where several gateways have one database; then they are the experiments, too."""
        self._secret = secret
        self._experiments = experiments
        self._crossings = crossings
        self._table = Table(settings, secret, experiments)
        self.fleet = Fleet(settings, auth, clock)
        if crossings is not None:
            crossings.pins = lambda experiment: self._table.pins.get(experiment)

    def decide(self, request: Request) -> Decision:
        return self._table.decide(request)

    @property
    def crossing(self) -> bool:
        """See `parts.Router`."""
        return self._crossings is not None and self._crossings.open

    async def settle(self, request: Request) -> None:
        """See `parts.Router`."""
        while self._crossings is not None:
            try:
                self._table.decide(request)
            except Unclaimed as asked:
                await self._crossings.claim(asked.experiment, asked.conversation, request.at)
            else:
                return

    def aliases(self, caller: Caller) -> list[str]:
        """What `/v1/models` lists for a caller."""
        return self._table.aliases(caller)

    def choose(self, target: Target, request: Request, avoid: frozenset[str] = frozenset()) -> Replica:
        return self.fleet.choose(target, request, avoid)

    def done(self, replica: AnyReplica, ok: bool) -> None:
        if not isinstance(replica, Replica):
            raise TypeError("this replica was not chosen here")
        self.fleet.done(replica, ok)

    async def prepare(self, settings: Settings) -> None:
        """See `Fleet.prepare`. Raises Unavailable."""
        await self.fleet.prepare(settings)

    def configure(self, settings: Settings) -> None:
        table = Table(settings, self._secret, self._experiments, self._table.pins)
        self.fleet.configure(settings)
        self._table = table

    def learn(self, row: Row) -> None:
        """Where a conversation is, from a row of before the start or of another gateway. See `Table.learn`."""
        self._table.learn(row)

    def recall(self, experiment: str, arm: str, conversation: str, at: float) -> None:
        """See `Table.recall`."""
        self._table.recall(experiment, arm, conversation, at)

    async def run(self) -> None:
        """Watch replicas until cancelled."""
        await self.fleet.run()
