"""Every error Freehold raises on purpose, in one tree; each maps to one HTTP status and one exit code.

    FreeholdError                     500  1
    ├── InvalidRequest                400  2   a field, flag or value is wrong; `param` names it
    │   ├── UnknownField              400  2
    │   ├── UnsupportedField          400  2   not honoured here, and ignoring it would change the result
    │   └── ContextTooLong            400  2   prompt + max_tokens exceed the context length
    ├── AuthenticationFailed          401  2
    ├── PermissionDenied              403  2   the key is known, and may not do this
    │   └── PolicyRefused             403  2   a rule on where data may go leaves no upstream
    ├── NotFound                      404  2   no such model or route
    ├── RequestTimeout                408  2   the request did not arrive in time
    ├── Conflict                      409  5   somebody else changed it first: read it again
    ├── TooLarge                      413  2   the body is over the limit
    ├── Overloaded                    429  5   the queue is full; `retry_after` seconds
    │   ├── RateLimited               429  5   the key's own limit; `retry_after` seconds
    │   ├── BudgetExhausted           429  5   asking again does not help before the next day
    │   └── SlowReader                429  5   a client left too much of its stream unread, and its request was ended
    ├── UpstreamFailed                502  5   no upstream gave an answer that is one
    │   └── UpstreamTimeout           504  5
    ├── Unavailable                   503  5   starting, draining or dead; `retry_after` seconds
    ├── InsufficientMemory            507  5   it cannot fit; the message says how many bytes it needs and has
    ├── ConfigError                   500  3   config.json or a settings file: unknown, missing or contradictory key
    ├── CheckpointError               500  4   weights: missing shard, truncated file, wrong shape, unused tensor
    │   └── DiskFull                  500  4
    ├── MissingExtra                  501  6   a dependency is not installed; the message has the line that does it
    ├── EngineError                   500  7   the engine failed inside a step
    └── TrainingFailed                500  8   the loss or a gradient is no longer finite

A message names the cause and the cure, in one line, without a traceback for the user.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar


class FreeholdError(Exception):
    """Root of the tree. `status` is the HTTP status, `exit_code` the process's, `code` a stable word for machines."""

    status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 1
    type: ClassVar[str] = "server_error"  # OpenAI's error.type
    code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after


class InvalidRequest(FreeholdError):
    status, exit_code, type, code = 400, 2, "invalid_request_error", "invalid_value"


class UnknownField(InvalidRequest):
    code = "unknown_field"


class UnsupportedField(InvalidRequest):
    code = "unsupported_field"


class ContextTooLong(InvalidRequest):
    code = "context_length_exceeded"


class AuthenticationFailed(FreeholdError):
    status, exit_code, type, code = 401, 2, "authentication_error", "invalid_api_key"


class PermissionDenied(FreeholdError):
    status, exit_code, type, code = 403, 2, "permission_error", "permission_denied"


class PolicyRefused(PermissionDenied):
    code = "policy_refused"


class NotFound(FreeholdError):
    status, exit_code, type, code = 404, 2, "invalid_request_error", "not_found"


class RequestTimeout(FreeholdError):
    status, exit_code, type, code = 408, 2, "invalid_request_error", "request_timeout"


class Conflict(FreeholdError):
    status, exit_code, type, code = 409, 5, "invalid_request_error", "conflict"


class TooLarge(FreeholdError):
    status, exit_code, type, code = 413, 2, "invalid_request_error", "request_too_large"


class Overloaded(FreeholdError):
    headers: Sequence[tuple[bytes, bytes]] = ()  # of the HTTP answer, besides `retry-after`
    status, exit_code, type, code = 429, 5, "rate_limit_error", "queue_full"


class RateLimited(Overloaded):
    code = "rate_limit_exceeded"


class BudgetExhausted(Overloaded):
    type, code = "insufficient_quota", "budget_exhausted"


class SlowReader(Overloaded):
    code = "slow_reader"


class UpstreamFailed(FreeholdError):
    status, exit_code, type, code = 502, 5, "server_error", "upstream_failed"


class UpstreamTimeout(UpstreamFailed):
    status, code = 504, "upstream_timeout"


class Unavailable(FreeholdError):
    status, exit_code, type, code = 503, 5, "server_error", "unavailable"


class InsufficientMemory(FreeholdError):
    status, exit_code, type, code = 507, 5, "server_error", "insufficient_memory"


class ConfigError(FreeholdError):
    exit_code, code = 3, "config_error"


class CheckpointError(FreeholdError):
    exit_code, code = 4, "checkpoint_error"


class DiskFull(CheckpointError):
    code = "disk_full"


class MissingExtra(FreeholdError):
    status, exit_code, code = 501, 6, "missing_extra"


INTERNAL_ERROR = "the engine failed on an internal error; see the server's log"
"""What callers are told of an exception that nobody foresaw; the log has its traceback."""


class EngineError(FreeholdError):
    exit_code, code = 7, "engine_error"


class TrainingFailed(FreeholdError):
    exit_code, code = 8, "training_failed"
