"""Puts the parts together: the one place that knows which implementation stands for which Protocol."""

from __future__ import annotations

from freehold.gateway.config import Settings
from freehold.gateway.kept import open_kept
from freehold.gateway.parts import Parts
from freehold.gateway.simple import WeightedRouter


async def build_parts(settings: Settings) -> Parts:
    """The parts of a gateway with these settings; of them only the store is started. Raises ConfigError."""
    router = WeightedRouter(settings)
    kept = await open_kept(settings)
    return Parts(
        keys=kept.keys,
        router=router,
        admission=kept.admission,
        store=kept.store,
        samplers=(kept.texts,),
        configured=(kept.keys, router, kept.admission, kept.texts, kept.log),
        identity=kept.identity,
    )
