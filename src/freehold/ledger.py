"""The row of a call, and readers of stored rows. Shared by the gateway, which writes rows, and by what reads them:
plans, evaluations and load tests. Torch-free.

One immutable row stands for one attempt at one upstream. A call that was retried, failed over or mirrored has several,
which share `request_id`. Token counts are None where neither the upstream nor counting could tell; amounts are in
micro-dollars (1e-6 USD), so that sums are exact. Prompts are not in it.

Facts that come later (feedback, a judge's score) are `Note`s, which name the row and never change it.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

ErrorClass: TypeAlias = Literal[
    "",  # none
    "http",  # the upstream answered with an error status
    "connect",  # refused, reset before an answer, or no connection in time
    "timeout",  # first byte, between chunks, or in total
    "cut",  # the stream ended without its end
    "invalid",  # the answer is no JSON, or no stream of events
    "empty",  # an answer without content, reasoning or tool call
    "looping",  # the same words over and over
    "tool_json",  # arguments of a tool call that are not JSON
    "thinking_cut",  # the length limit came while it still thought
    "refusal",
    "client_gone",  # the client went away: no fault of the upstream
    "refused_here",  # limits or policy of the gateway: no attempt was made
]
# What counts against an upstream or an arm; the others are a client's or our own doing.
FAILURES: frozenset[str] = frozenset(
    ("http", "connect", "timeout", "cut", "invalid", "empty", "looping", "tool_json", "thinking_cut", "refusal")
)
Counted: TypeAlias = Literal["upstream", "counted", "none"]  # who says how many tokens: usage, our count of chunks
SCHEMA_VERSION = 1


class Row(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One attempt. Times: seconds since the epoch in UTC (`at`), or durations in seconds. See the module."""

    # which call
    row_id: str  # unique: ULID-like, sorts by time
    request_id: str  # of the client's request; attempts share it
    attempt: int = 0  # 0, 1, ... in the order they were made
    at: float  # when the client's request arrived
    endpoint: str  # chat, completions, responses, messages, embeddings
    key_id: str = ""  # of the gateway's key, never the key
    team: str = ""
    unit: str = ""  # keyed hash of the sticky unit (conversation or user)
    conversation: str = ""  # keyed hash
    user: str = ""  # keyed hash; who forgets the hash's key erases the user
    # what was asked
    alias: str  # the model the client named
    model_id: str = ""  # the model the upstream was asked for
    upstream: str = ""
    replica: str = ""  # base URL, where an upstream has several
    engine: str = ""  # name and version, if known
    weights: str = ""  # digest of the weights, if known
    prompt_name: str = ""
    prompt_version: str = ""
    task: str = ""  # the client's own label: header x-task
    effort: str = ""
    streamed: bool = False
    data_class: str = ""
    route: str = ""  # the rule that sent it elsewhere than to its alias
    would: str = ""  # the rule in shadow mode that would have
    # experiment
    experiment: str = ""
    arm: str = ""  # assigned: analysed by intention to treat
    served_arm: str = ""  # the one that answered: another after a failover
    shadow_of: str = ""  # row_id of the real one, if this answer was thrown away
    warm_up: bool = False  # not analysed
    # how it went
    status: int = 0  # HTTP status of the upstream; 0: none came
    error: ErrorClass = ""
    finish_reason: str = ""
    input_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None  # generated; reasoning included
    reasoning_tokens: int | None = None
    undelivered_tokens: int = 0  # generated, as far as known, but never delivered to the client
    counted: Counted = "none"
    cost: int | None = None  # micro-dollars
    ttft: float | None = None
    itl_p50: float | None = None
    itl_p99: float | None = None
    tpot: float | None = None
    duration: float = 0.0


class Note(msgspec.Struct, frozen=True, kw_only=True):
    """A late fact about a row: `name` is "feedback", "judge.quality", "judge.groundedness" ...; value 0 to 1."""

    row_id: str
    at: float
    name: str
    value: float
    source: str = ""
