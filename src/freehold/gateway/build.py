"""Puts the parts together: the one place that knows which implementation stands for which Protocol."""

from __future__ import annotations

import asyncio
import logging
import time

from freehold.errors import FreeholdError
from freehold.gateway.canary import feedback
from freehold.gateway.canary.canaries import Canaries
from freehold.gateway.canary.judge import Judge
from freehold.gateway.canary.ledger import ExperimentLedger
from freehold.gateway.config import Settings
from freehold.gateway.door.upstream import auth_headers
from freehold.gateway.keeping.kept import open_kept
from freehold.gateway.keeping.store import Store
from freehold.gateway.metrics import GatewayMetrics
from freehold.gateway.parts import Parts
from freehold.gateway.policy import check_addresses
from freehold.gateway.routing.admin import admin_routes
from freehold.gateway.routing.agreement import aa_until, change_of
from freehold.gateway.routing.assign import PIN_SECONDS
from freehold.gateway.routing.crossing import Crossings
from freehold.gateway.routing.router import Router
from freehold.gateway.routing.savings import Savings
from freehold.gateway.telemetry import exporting

_log = logging.getLogger("freehold.gateway")


async def build_parts(settings: Settings, base_url: str) -> Parts:
    """The parts of a gateway with these settings; of them only the store is started. base_url: its own, for a judge.

    Raises ConfigError; then nothing is left open.
    """
    await asyncio.to_thread(check_addresses, settings)
    spans = [exporting(settings.telemetry.endpoint)] if settings.telemetry.endpoint else []
    kept = await open_kept(settings)
    try:
        experiments = Canaries(ExperimentLedger(kept.store), settings)
        crossings = _crossings(settings, kept.store)
        standings = crossings or experiments
        secret = await kept.store.secret("assign")
        router = Router(settings, secret, standings, auth_headers, crossings=crossings)
        await _resume(settings, kept.store, experiments, router, crossings)
        judge = Judge(settings, base_url, kept.store.note, time.time)
    except BaseException:
        await kept.store.stop()
        raise
    shared = () if crossings is None else (crossings,)
    metrics, savings = GatewayMetrics(), Savings(settings)
    return Parts(
        keys=kept.keys,
        router=router,
        admission=kept.admission,
        store=kept.store,
        observers=(metrics, savings, router.learn, *spans),
        samplers=(judge, kept.texts, *spans),
        routes={
            "GET /metrics": metrics.route,
            **feedback.routes(kept.store.note, time.time),
            **experiments.routes(),
            **admin_routes(router.fleet, savings),
        },
        configured=(kept.keys, experiments, *shared, router, kept.admission, judge, kept.texts, kept.log, savings),
        background=(router.run, experiments.run, *(each.run for each in shared), judge.run),
        identity=kept.identity,
    )


def _crossings(settings: Settings, store: Store) -> Crossings | None:
    """None: this gateway is the only one on its database."""
    if settings.store.kind != "postgres":
        return None
    from freehold.gateway.keeping.pins import SharedPins
    from freehold.gateway.keeping.postgres import PostgresStore

    assert isinstance(store, PostgresStore)
    return Crossings(settings, SharedPins(store))


async def _resume(
    settings: Settings, store: Store, experiments: Canaries, router: Router, crossings: Crossings | None
) -> None:
    """Know where experiments stand, and on which arm conversations are, before the first call."""
    for name in settings.experiments:
        try:
            await experiments.advance(name)
            if crossings is not None:
                await crossings.turn(name)
        except FreeholdError as error:  # it is tried again while the gateway runs; till then its canary gets nothing
            _log.warning("experiment %s: %s", name, error)
        if crossings is None:
            control = settings.experiments[name].control
            ended = aa_until([change_of(each) for each in await store.decisions(name)])
            for arm, conversation, first, last in await store.conversations(name, time.time() - PIN_SECONDS):
                router.recall(name, control if first < ended else arm, conversation, last)
