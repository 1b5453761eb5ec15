"""Puts the parts together: the one place that knows which implementation stands for which Protocol."""

from __future__ import annotations

from freehold.gateway.config import Settings
from freehold.gateway.parts import Parts
from freehold.gateway.simple import ConfigKeys, Forgetful, NoLimits, WeightedRouter


async def build_parts(settings: Settings) -> Parts:
    """The parts of a gateway with these settings, none of them started. Raises ConfigError."""
    keys, router = ConfigKeys(settings), WeightedRouter(settings)
    return Parts(keys=keys, router=router, admission=NoLimits(), store=Forgetful(), configured=(keys, router))
