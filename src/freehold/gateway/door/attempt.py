"""One attempt at one upstream: what it was, how it went, and the row that says so."""

from __future__ import annotations

import time
from dataclasses import dataclass

from freehold.errors import FreeholdError
from freehold.gateway.call import Decision, Endpoint, Request, Target
from freehold.gateway.config import Upstream
from freehold.gateway.door.meter import Meter
from freehold.gateway.identity import new_id
from freehold.gateway.prices import cost
from freehold.ledger import ErrorClass, Row

_BYTES_A_TOKEN = 4  # of text, about: for the input of an answer that ended before its usage


@dataclass(frozen=True, slots=True)
class Failed:
    """Why an attempt gave the client nothing. The next may.

    status, body, headers: the upstream's own answer, if there was one that may be passed on when no other attempt is
    left. final: no other upstream would say anything else (the request itself is wrong).
    """

    error: FreeholdError
    kind: ErrorClass
    status: int = 0
    body: bytes | None = None
    content_type: str = "application/json"
    headers: tuple[tuple[bytes, bytes], ...] = ()
    final: bool = False


class Attempt:
    """Filled while it runs; `row` at the end. Times of `time.perf_counter()`.

    speaks: the API in which the upstream is asked. keep_text: for samplers. shadow_of: the row of the real one.
    """

    __slots__ = (
        "decision",
        "delivered",
        "error",
        "meter",
        "number",
        "replica",
        "request",
        "row_id",
        "shadow_of",
        "started",
        "status",
        "target",
        "upstream",
    )

    def __init__(
        self,
        request: Request,
        decision: Decision,
        target: Target,
        upstream: Upstream,
        replica: str,
        number: int,
        speaks: Endpoint,
        *,
        keep_text: bool = False,
        shadow_of: str = "",
    ) -> None:
        self.request = request
        self.decision = decision
        self.target = target
        self.upstream = upstream
        self.replica = replica
        self.number = number
        self.shadow_of = shadow_of
        self.row_id = new_id()
        self.started = time.perf_counter()
        self.meter = Meter(speaks, self.started, keep_text=keep_text)
        self.status = 0
        self.error: ErrorClass = ""
        self.delivered = 0  # output tokens that went to the client

    def row(self) -> Row:
        """The row of the attempt, which is over.

        output_tokens are those delivered; what was generated beyond is `undelivered_tokens`.
        """
        request, meter, target = self.request, self.meter, self.target
        seen = meter.output_tokens
        output = seen if seen is None or self.shadow_of else min(seen, self.delivered)
        p50, p99 = meter.itl()
        return Row(
            row_id=self.row_id,
            request_id=request.request_id,
            attempt=self.number,
            at=request.at,
            endpoint=request.endpoint,
            key_id=request.caller.key_id,
            team=request.caller.team,
            unit=self.decision.unit or request.unit,
            conversation=request.conversation,
            user=request.user,
            alias=request.alias,
            model_id=target.model_id,
            upstream=target.upstream,
            replica=self.replica,
            engine=self.upstream.engine,
            weights=self.upstream.models[target.model_id].weights,
            prompt_name=request.prompt_name,
            prompt_version=request.prompt_version,
            task=request.task,
            effort=request.effort if target.effort is None else target.effort,
            streamed=request.stream,
            data_class=request.data_class,
            route=self.decision.route,
            would=self.decision.would,
            experiment=self.decision.experiment,
            arm=self.decision.arm,
            served_arm=target.arm,
            shadow_of=self.shadow_of,
            status=self.status,
            error=self.error,
            finish_reason=meter.finish_reason,
            input_tokens=meter.input_tokens,
            cached_tokens=meter.cached_tokens,
            output_tokens=output,
            reasoning_tokens=meter.reasoning_tokens,
            undelivered_tokens=0 if seen is None or output is None else seen - output,
            counted=meter.counted,
            cost=self._cost(output),
            ttft=meter.clock.ttft if request.stream else None,
            itl_p50=p50,
            itl_p99=p99,
            tpot=meter.tpot,
            duration=time.perf_counter() - self.started,
        )

    def _cost(self, output: int | None) -> int | None:
        """Micro-dollars. None: nothing says that the upstream did anything."""
        meter = self.meter
        if meter.input_tokens is None and not output:
            return None
        if meter.input_tokens is not None:
            return cost(self.target.price, meter.input_tokens, meter.cached_tokens or 0, output or 0)
        return cost(self.target.price, -(-len(self.request.body) // _BYTES_A_TOKEN), 0, output or 0)
