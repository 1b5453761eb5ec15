"""What the parts of the gateway tell each other about one call: the facts of a request, and where it may go.

`door` reads a `Request` out of the bytes, `route` makes a `Decision` of it, `upstream` tries the decision's targets in
their order, `meter` watches the answer, and the result is a `freehold.ledger.Row` an attempt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

Endpoint: TypeAlias = Literal["chat", "completions", "responses", "messages", "embeddings"]
Effort: TypeAlias = Literal["", "none", "low", "medium", "high", "max"]


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: the key's id and what it may do. Limits in their own units; None: no limit."""

    key_id: str
    team: str = ""
    scopes: frozenset[str] = frozenset()  # endpoints, "feedback", "admin"
    models: frozenset[str] = frozenset()  # aliases; empty: all
    data_class: str = ""  # what its prompts hold, if a request does not say
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent: int | None = None
    budget_per_day: int | None = None  # micro-dollars
    team_budget_per_day: int | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """The facts of a request that routing, limits and the ledger need; `body` goes on as it came."""

    request_id: str
    at: float  # epoch seconds
    endpoint: Endpoint
    caller: Caller
    alias: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)  # lower-case names; credentials left out
    stream: bool = False
    include_usage: bool = False  # the client asked for usage in its stream
    continuous_usage: bool = False  # in every chunk of it
    max_tokens: int | None = None
    choices: int = 1
    effort: Effort = ""
    prompt_name: str = ""
    prompt_version: str = ""
    task: str = ""  # `x-task`: a label for the choice between reasoning and efficiency
    data_class: str = ""
    unit: str = ""  # keyed hash: the conversation, or else the user, or else the key
    conversation: str = ""
    user: str = ""


@dataclass(frozen=True, slots=True)
class Price:
    """Micro-dollars a million tokens (USD x 1e6 per Mtok): an int, so that sums are exact."""

    input: int = 0
    cached_input: int | None = None  # None: as input
    output: int = 0


@dataclass(frozen=True, slots=True)
class Target:
    """One place a request may be sent to: which arm it is, of which upstream, and what its model is called there."""

    upstream: str
    model_id: str
    arm: str = ""
    effort: Effort | None = None  # replaces the request's, if not None
    price: Price = Price()


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a request goes. targets[0] is the first choice; the others are tried in turn, before the first byte only.

    arm: the one assigned; it stays the assigned one when a later target answers. shadow: gets a copy, and its answer
    is thrown away. why: for the log and `x-freehold-route`. unit: what the experiment keeps on one arm, for the row;
    empty outside of an experiment. route: the rule that was applied; would: the first rule in shadow mode that held.
    """

    targets: tuple[Target, ...]
    experiment: str = ""
    arm: str = ""
    shadow: Target | None = None
    why: str = ""
    unit: str = ""
    route: str = ""
    would: str = ""
