"""What the parts of the gateway ask of one another. The door (`app`, `relay`) knows the others by these alone.

Everything here runs on one event loop. What is not `async` is called there in the middle of a request and must not
block. What is `configure`d gets settings that were read and checked; it changes all of itself or, with ConfigError,
nothing, and it keeps what it has counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias, runtime_checkable

from freehold.gateway.call import Caller, Decision, Request, Target
from freehold.gateway.config import Settings
from freehold.ledger import Note, Row

Header: TypeAlias = tuple[bytes, bytes]  # name in lower case, value

Observer: TypeAlias = Callable[[Row], None]
"""Is shown each row once, after its attempt: metrics, windows of an experiment, spans."""


class Keys(Protocol):
    def authenticate(self, token: str) -> Caller | None:
        """Whose key this is; None: nobody's. In memory, and in a time that tells nothing about the keys.

        "" (no key was sent) is somebody's, with every scope, as long as there are no keys at all.
        """


class Replica(Protocol):
    """One address of an upstream."""

    @property
    def url(self) -> str:
        """Base URL, without a slash at the end."""


class Router(Protocol):
    def decide(self, request: Request) -> Decision:
        """Where a request goes; policy was asked about every target of the decision, `shadow` included.

        Raises NotFound (no such alias), InvalidRequest, PolicyRefused.
        """

    @property
    def crossing(self) -> bool:
        """Whether several gateways are just changing an experiment's share: then `settle` comes before `decide`."""

    async def settle(self, request: Request) -> None:
        """Have the arm of the request's conversation agreed with them; what `decide` raises is raised here, too.

        `decide` follows without another wait. Raises Unavailable: they cannot be asked.
        """

    def choose(self, target: Target, request: Request, avoid: frozenset[str] = frozenset()) -> Replica:
        """The replica to try, whose in-flight count it raises. Raises Unavailable: none takes calls now.

        avoid: URLs that have failed this request, which are tried again only if there is no other.
        """

    def done(self, replica: Replica, ok: bool) -> None:
        """An attempt at a chosen replica is over, once for each `choose`. ok: the upstream did its part, also where
        the client went away or asked for what it may not have."""


class Sampler(Protocol):
    """Is given what some calls said: a judge of pairs, or the keeper of texts."""

    def wants(self, request: Request, decision: Decision) -> bool:
        """Asked once a call, before its first attempt. Only then is text put aside."""

    def take(self, request: Request, row: Row, answer: str) -> None:
        """After each attempt that was wanted, of the shadow too (`row.shadow_of`): the text of the answer."""


class Ticket(Protocol):
    """What was reserved for one call."""

    @property
    def headers(self) -> Sequence[Header]:
        """`x-ratelimit-*`, for the answer."""

    @property
    def output_limit(self) -> int | None:
        """Output tokens of each choice that were paid for in advance, of a request that names no limit: upstreams must
        be told so. None: the request names one, or no budget guards it."""


class Admission(Protocol):
    """Rate limits, concurrency and budgets."""

    async def admit(self, request: Request, decision: Decision) -> Ticket:
        """Take what the call may cost at most. Raises RateLimited, or BudgetExhausted."""

    def count(self, caller: Caller) -> Sequence[Header]:
        """Take one request, which is no call of a model, of the caller's rate. Returns `x-ratelimit-*`, for the answer.
        Raises RateLimited."""

    def settle(self, ticket: Ticket, rows: Sequence[Row]) -> None:
        """Give back what was not used. Called once for each ticket, also when a call was aborted; rows: one an attempt,
        none if there was none."""


class Store(Protocol):
    def append(self, row: Row) -> None:
        """Write a row, soon."""

    def note(self, note: Note) -> None:
        """Write a late fact, soon."""

    async def start(self) -> None: ...

    async def stop(self) -> None:
        """Everything appended is on the disk when this returns."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A request to a route that is not a call of a model: `/metrics`, `/v1/feedback`, the admin API."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]  # lower-case names; credentials left out
    body: bytes
    caller: Caller | None = None  # None: the admin, or nobody was asked who it is
    names: Mapping[str, str] = field(default_factory=dict)  # what stands for the {…} of the route


@dataclass(frozen=True, slots=True)
class Answer:
    body: bytes
    status: int = 200
    content_type: str = "application/json"
    headers: Sequence[Header] = ()


Handler: TypeAlias = Callable[[Asked], Awaitable[Answer]]
"""Raises FreeholdErrors, which become answers in OpenAI's shape."""

Routes: TypeAlias = Mapping[str, Handler]
"""By method and path, as "POST /admin/experiments/{name}/pause". All below `/admin/` want the admin key, which the
door checks; without one in the settings there are none of them."""


class Configured(Protocol):
    def configure(self, settings: Settings) -> None:
        """Take new settings: at a reload, on the event loop. See the module."""


@runtime_checkable
class Prepared(Protocol):
    async def prepare(self, settings: Settings) -> None:
        """Before `configure`, while the old settings serve: whatever takes time. Raises a FreeholdError: keep them."""


@dataclass(frozen=True, slots=True)
class Parts:
    """All of a gateway but its door. configured: those that take part in a reload, in this order.

    background: each is started with the gateway and ended with it (probes, the canary's timer).
    """

    keys: Keys
    router: Router
    admission: Admission
    store: Store
    observers: tuple[Observer, ...] = ()
    samplers: tuple[Sampler, ...] = ()
    routes: Routes = field(default_factory=dict)
    configured: tuple[Configured, ...] = ()
    background: tuple[Callable[[], Awaitable[None]], ...] = ()
    identity: bytes = b""  # what pseudonyms of users and conversations are made with; b"": the data directory's

    def watched_by(self, observer: Observer) -> Parts:
        """The same parts, with one more who is shown each row."""
        return dataclasses.replace(self, observers=(*self.observers, observer))
