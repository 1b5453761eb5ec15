"""The least that makes a gateway run, with nothing on disk: keys of the settings, a weighted choice, no limits.

Each part here conforms to its Protocol in `parts` and can stand in for the full one.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from freehold.errors import NotFound
from freehold.gateway.call import Caller, Decision, Endpoint, Price, Request, Target
from freehold.gateway.config import Arm, Settings, Upstream
from freehold.gateway.parts import Header
from freehold.ledger import Note, Row

EVERY_SCOPE = frozenset((*get_args(Endpoint), "feedback"))


class ConfigKeys:
    """The keys of the settings, by their digest: a look-up whose time depends on the digest of what was sent only."""

    def __init__(self, settings: Settings) -> None:
        self._callers: dict[bytes, Caller] = {}
        self.configure(settings)

    def configure(self, settings: Settings) -> None:
        self._callers = {
            bytes.fromhex(key.sha256): Caller(
                key_id=name,
                team=key.team,
                scopes=frozenset(key.scopes),
                models=frozenset(key.models),
                data_class=key.data_class,
            )
            for name, key in settings.keys.items()
        }

    def authenticate(self, token: str) -> Caller | None:
        if not self._callers and not token:
            return _ANYBODY
        return self._callers.get(hashlib.sha256(token.encode()).digest(), None if self._callers else _ANYBODY)


_ANYBODY = Caller(key_id="", scopes=EVERY_SCOPE)


@dataclass(frozen=True, slots=True)
class Address:
    url: str


class WeightedRouter:
    """Arms in proportion to their weights, by the request's unit, and the other arms as fallback; replicas in turn."""

    def __init__(self, settings: Settings) -> None:
        self._turns: Counter[str] = Counter()
        self._settings = settings

    def configure(self, settings: Settings) -> None:
        self._settings = settings

    def decide(self, request: Request) -> Decision:
        model = self._settings.models.get(request.alias)
        if model is None:
            raise NotFound(f"there is no model {request.alias!r}; GET /v1/models lists them", param="model")
        arms = [arm for arm in model.arms if arm.weight > 0]
        point = int(request.unit[:12] or "0", 16) / 16**12 * sum(arm.weight for arm in arms)
        bounds = itertools.accumulate(arm.weight for arm in arms)
        first = next((arm for arm, bound in zip(arms, bounds, strict=True) if point < bound), arms[-1])
        order = [first, *(arm for arm in arms if arm is not first)]
        return Decision(tuple(self._target(arm) for arm in order), arm=first.name)

    def _target(self, arm: Arm) -> Target:
        prices = self._settings.upstreams[arm.upstream].models[arm.model].prices
        micro = [
            None if usd is None else round(usd * 1e6) for usd in (prices.input, prices.cached_input, prices.output)
        ]
        return Target(arm.upstream, arm.model, arm.name, arm.effort, Price(micro[0] or 0, micro[1], micro[2] or 0))

    def choose(self, target: Target, request: Request, avoid: frozenset[str] = frozenset()) -> Address:
        upstream: Upstream = self._settings.upstreams[target.upstream]
        urls = [url for url in upstream.replicas if url not in avoid] or list(upstream.replicas)
        self._turns[target.upstream] += 1
        return Address(urls[self._turns[target.upstream] % len(urls)])

    def done(self, replica: object, ok: bool) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Free:
    headers: Sequence[Header] = ()


class NoLimits:
    async def admit(self, request: Request, decision: Decision) -> Free:
        return _FREE

    def settle(self, ticket: object, rows: Sequence[Row]) -> None:
        pass


_FREE = Free()


class Forgetful:
    """A store in memory that keeps the last rows and notes."""

    def __init__(self, most: int = 1000) -> None:
        self.rows: deque[Row] = deque(maxlen=most)
        self.notes: deque[Note] = deque(maxlen=most)

    def append(self, row: Row) -> None:
        self.rows.append(row)

    def note(self, note: Note) -> None:
        self.notes.append(note)

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        pass
