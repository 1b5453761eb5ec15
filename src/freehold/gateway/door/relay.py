"""A call, from the decision to the last byte: attempts at its targets in turn, the answer's bytes, a row an attempt.

An attempt is given up for the next one only as long as the client has not had a byte. After the first byte the client
gets what comes, and an error event in its place if it breaks off.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final, TypeAlias

from freehold.errors import FreeholdError, InvalidRequest, Unavailable, UpstreamFailed, UpstreamTimeout
from freehold.gateway.call import Decision, Request, Target
from freehold.gateway.config import Settings, Upstream
from freehold.gateway.door.attempt import Attempt, Failed
from freehold.gateway.door.reply import error_event
from freehold.gateway.door.running_usage import without_usage
from freehold.gateway.door.upstream import Answered, TooMuch, Upstreams
from freehold.gateway.door.watch import Watch
from freehold.gateway.door.wire import Wire, wire_for
from freehold.gateway.http.outbound import Broken
from freehold.gateway.http.sse import DONE, NotAStream, Splitter, data_of
from freehold.gateway.parts import Header, Parts, Sampler
from freehold.ledger import ErrorClass, Row

logger = logging.getLogger("freehold.gateway")

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]

_MAX_ERROR_BYTES: Final = 1 << 20
_MAX_PRELUDE_BYTES: Final = 65_536  # of a stream, before its first event
_AFTER_END: Final = 1.0  # seconds that an upstream has to close its answer after the last event
# Of the upstream's doing, or of ours towards it: the client's request may well succeed elsewhere.
_ELSEWHERE: Final = frozenset((401, 402, 403, 404, 405, 407, 408, 409, 421, 425, 429))
# What tells of an upstream's health; whether an answer is any good tells of the model's.
_FAULTS: Final = frozenset(("http", "connect", "timeout", "cut", "invalid"))
_OURS: Final = frozenset((401, 402, 403, 407))  # between gateway and upstream: not to be shown to the client


class Call:
    """One request on its way. Made for each; `run` it once.

    output_limit: that of the call's ticket. shadow_of: the row of the real call, of which this is a copy. samplers:
    those that wanted the real call.
    """

    def __init__(
        self,
        request: Request,
        decision: Decision,
        settings: Settings,
        parts: Parts,
        upstreams: Upstreams,
        send: Send,
        *,
        output_limit: int | None = None,
        shadow_of: str = "",
        samplers: tuple[Sampler, ...] | None = None,
    ) -> None:
        self.rows: list[Row] = []
        self.answered: Attempt | None = None  # the one whose bytes the client got
        self._request = request
        self._decision = decision
        self._settings = settings
        self._parts = parts
        self._upstreams = upstreams
        self._send = send
        self._watch: Watch | None = None
        self._gone = False
        self._stopping = False
        self._number = 0
        self._output_limit = output_limit
        self._shadow_of = shadow_of
        if samplers is None:
            samplers = tuple(each for each in parts.samplers if each.wants(request, decision))
        self.samplers = samplers

    async def run(self, receive: Receive, headers: tuple[Header, ...]) -> None:
        """Answer the client. headers: for the answer. Raises FreeholdError if the client has had nothing yet."""
        watcher = asyncio.ensure_future(receive())  # the body has been read: what comes now is that the client left
        watcher.add_done_callback(self._client_left)
        try:
            await self._try_all(headers)
        finally:
            watcher.cancel()

    def stop(self) -> None:
        """The gateway ends, and with it this call: the client is told."""
        self._stopping = True
        if self._watch is not None:
            self._watch.interrupt("stopping")

    def _client_left(self, watcher: asyncio.Future[Message]) -> None:
        if not watcher.cancelled():
            self._gone = True
            if self._watch is not None:
                self._watch.interrupt("client_gone")

    async def _try_all(self, headers: tuple[Header, ...]) -> None:
        failed: Failed | None = None
        for target in self._decision.targets:
            upstream = self._settings.upstreams[target.upstream]
            wire = wire_for(self._request.endpoint, upstream.speaks)
            if wire is None:
                failed = failed or _does_not_speak(self._request, target)
                continue
            try:
                body = wire.body(
                    self._request,
                    target,
                    self._limit(wire),
                    upstream.engine,
                    # Of several choices, engines count the one that the chunk is of.
                    continuous=upstream.continuous_usage and self._request.choices == 1,
                )
            except InvalidRequest as error:
                failed = failed or Failed(error, "refused_here")
                continue
            outcome = await self._try(target, upstream, wire, body, headers)
            if outcome is None:
                return
            failed = outcome
            if outcome.final:
                break
        assert failed is not None  # a decision has targets
        await self._refuse(failed, headers)

    async def _try(
        self, target: Target, upstream: Upstream, wire: Wire, body: bytes, headers: tuple[Header, ...]
    ) -> Failed | None:
        """One target: once, and after a connection that failed once more, elsewhere if there is an elsewhere. None: the
        client has its answer, or is gone."""
        avoid: frozenset[str] = frozenset()
        failed: Failed | None = None
        for _ in range(2):
            if self._gone:
                return None
            if self._stopping:
                raise Unavailable("the gateway is stopping", retry_after=1)
            try:
                replica = self._parts.router.choose(target, self._request, avoid)
            except FreeholdError as error:
                return failed or Failed(error, "connect")
            ok = False
            try:
                attempt = Attempt(
                    self._request,
                    self._decision,
                    target,
                    upstream,
                    replica.url,
                    self._number,
                    wire.endpoint,
                    keep_text=bool(self.samplers),
                    shadow_of=self._shadow_of,
                )
                self._number += 1
                failed = await self._attempt(attempt, wire, body, headers)
                ok = attempt.error not in _FAULTS or (failed is not None and failed.final)
            finally:
                self._parts.router.done(replica, ok)
            if failed is None or failed.kind != "connect":
                return failed
            avoid |= {replica.url}
        return failed

    def _limit(self, wire: Wire) -> int | None:
        """Output tokens that an upstream is told, of a request that names no limit: the alias's, or one that its API
        wants, and never more than was reserved. None: as many as it likes."""
        model = self._settings.models.get(self._request.alias)
        named = model.output_limit if model is not None else None
        limits = (wire.default_limit if named is None else named, self._output_limit)
        return min((limit for limit in limits if limit is not None), default=None)

    async def _refuse(self, failed: Failed, headers: tuple[Header, ...]) -> None:
        if failed.body is None:
            raise failed.error
        body = self._upstreams.scrub(failed.body)
        start = {
            "type": "http.response.start",
            "status": failed.status,
            "headers": [
                (b"content-type", failed.content_type.encode("latin-1")),
                (b"content-length", b"%d" % len(body)),
                *headers,
                *failed.headers,
            ],
        }
        await self._send(start)
        await self._send({"type": "http.response.body", "body": body})

    # ---- one attempt -------------------------------------------------------------------------------------------

    async def _attempt(self, attempt: Attempt, wire: Wire, body: bytes, headers: tuple[Header, ...]) -> Failed | None:
        """None: the client has its answer, whole or broken off, or is gone. Otherwise it has had nothing."""
        times = attempt.upstream.timeouts
        watch = self._watch = Watch(min(times.first_byte, times.between_chunks, times.total))
        watch.until(watch.now() + min(times.first_byte, times.total))
        answer: Answered | None = None
        exchange = Exchange(self._send, headers, attempt, self._request, wire)
        failed: Failed | None = None
        try:
            if self._gone:
                watch.interrupt("client_gone")
            answer = await self._open(attempt, wire, body)
            attempt.status = answer.status
            if answer.status != 200:
                failed = await self._error_of(attempt, answer, wire)
            elif self._request.stream:
                failed = await exchange.stream(answer, watch)
            else:
                failed = await exchange.whole(answer, self._settings.gateway.max_answer_bytes)
        except asyncio.CancelledError:
            if not watch.caught():
                attempt.error = "client_gone"
                raise
            failed = await exchange.interrupted(watch.why or "timeout")
        except Broken as error:
            kind: ErrorClass = "connect" if error.before_answer else "cut"
            failed = await exchange.broke(kind, UpstreamFailed(f"{attempt.target.upstream}: {error}"))
        except (ValueError, NotAStream, TooMuch) as error:
            failed = await exchange.broke("invalid", UpstreamFailed(f"{attempt.target.upstream}: {error}"))
        finally:
            watch.close()
            self._watch = None
            if answer is not None:
                answer.close()
            self._record(attempt, exchange)
        return failed

    async def _open(self, attempt: Attempt, wire: Wire, body: bytes) -> Answered:
        return await self._upstreams.post(
            attempt.target.upstream,
            attempt.replica + wire.path,
            body,
            self._request.headers,
            self._request.request_id,
            messages=wire.endpoint == "messages",
        )

    async def _error_of(self, attempt: Attempt, answer: Answered, wire: Wire) -> Failed:
        """What an answer that is no 200 means. Only a status that the client can act on is passed on to it."""
        attempt.error = "http"
        status = answer.status
        error = UpstreamFailed(f"{attempt.target.upstream} answered {status}")
        if not 400 <= status < 600 or status in _OURS:
            return Failed(error, "http")
        try:
            body = await answer.read(_MAX_ERROR_BYTES)
        except (Broken, TooMuch):
            return Failed(error, "http")
        final = status < 500 and status not in _ELSEWHERE
        if status in (404, 405):
            return Failed(error, "http")  # the settings name what the upstream does not have
        return Failed(
            error, "http", status, wire.error(body, status), "application/json", tuple(answer.headers), final=final
        )

    def _record(self, attempt: Attempt, exchange: Exchange) -> None:
        if exchange.started:
            self.answered = attempt
        row = attempt.row()
        self.rows.append(row)
        self._parts.store.append(row)
        try:
            for observer in self._parts.observers:
                observer(row)
            for sampler in self.samplers:
                sampler.take(self._request, row, attempt.meter.text)
        except Exception:  # who looks on must not spoil the call
            logger.exception("an observer of row %s failed", row.row_id)


class Exchange:
    """The answer of one attempt on its way to the client. started: the client has had a byte."""

    def __init__(self, send: Send, headers: tuple[Header, ...], attempt: Attempt, request: Request, wire: Wire) -> None:
        self.started = False
        self._has_data = False  # an event with data came
        self._send = send
        self._headers = headers
        self._attempt = attempt
        self._request = request
        self._wire = wire

    async def whole(self, answer: Answered, most: int) -> Failed | None:
        """Raises Broken, TooMuch, ValueError."""
        attempt = self._attempt
        body = await answer.read(most)
        attempt.meter.whole(body)
        attempt.error = attempt.meter.failure()
        body = self._wire.whole(body)
        await self._start(answer, b"application/json", (b"content-length", b"%d" % len(body)))
        await self._send({"type": "http.response.body", "body": body})
        attempt.delivered = attempt.meter.output_tokens or 0
        return None

    async def stream(self, answer: Answered, watch: Watch) -> Failed | None:
        """Raises Broken, NotAStream, ValueError: if `started`, what has been sent stands."""
        attempt, meter = self._attempt, self._attempt.meter
        if not answer.content_type.startswith("text/event-stream"):
            raise NotAStream(f"a stream was asked for, and {answer.content_type or 'nothing'} came")
        times = attempt.upstream.timeouts
        end = watch.now() + times.total - (time.perf_counter() - attempt.started)
        splitter, translate = Splitter(), self._wire.stream(self._request)
        held = b""
        as_it_comes = translate is None and self._request.endpoint in ("chat", "completions")
        drops_usage = as_it_comes and not self._request.include_usage
        cuts_usage = as_it_comes and attempt.upstream.continuous_usage and not self._request.continuous_usage
        while data := await answer.next():
            events = splitter.feed(data)
            if events:
                out = self._pass(events, time.perf_counter(), drops_usage, cuts_usage)
                if meter.error_event is not None and not self.started:
                    return self._failed_at_once()
                if translate is not None:
                    out = translate.feed(out)
                if (
                    not self._has_data
                ):  # comments and other lines are no answer yet: another upstream can still give one
                    held += out
                    if len(held) > _MAX_PRELUDE_BYTES:
                        raise NotAStream("a stream was asked for, and what came has no event")
                elif out:
                    out, held = held + out, b""
                    watch.until(end)  # a slow reader is not the upstream's fault
                    if not self.started:
                        await self._start(answer, b"text/event-stream", (b"cache-control", b"no-cache"))
                    await self._send({"type": "http.response.body", "body": out, "more_body": True})
                    attempt.delivered = meter.output_tokens or 0
            watch.until(min(end, watch.now() + (_AFTER_END if meter.complete else times.between_chunks)))
        return await self._ended(answer, translate.end() if translate is not None else b"")

    def _pass(self, events: bytes, now: float, drops_usage: bool, cuts_usage: bool) -> bytes:
        """The events as they came, noted; without the usage that we asked for, and not the client."""
        meter = self._attempt.meter
        changed = False
        kept: list[bytes] = []
        for event in events.split(b"\n\n"):
            data = data_of(event) if event else b""
            self._has_data = self._has_data or bool(data)
            only_usage = bool(data) and meter.event(data, now)
            if only_usage and drops_usage:
                changed = True
                continue
            if cuts_usage and data and not only_usage and data != DONE:
                changed, event = True, without_usage(event, data, null=self._request.include_usage)
            kept.append(event)
        return b"\n\n".join(kept) if changed else events

    def _failed_at_once(self) -> Failed:
        self._attempt.error = "http"
        return Failed(UpstreamFailed(f"{self._attempt.target.upstream}: the stream began with an error"), "http")

    async def _ended(self, answer: Answered, rest: bytes) -> Failed | None:
        attempt, meter = self._attempt, self._attempt.meter
        if meter.error_event is not None:  # its words have gone to the client
            attempt.error = "cut"
        elif not (meter.complete or meter.finish_reason):
            error = UpstreamFailed(f"{attempt.target.upstream}: the stream ended before its end")
            return await self.broke("cut", error)
        else:
            attempt.error = meter.failure()
        if not self.started:
            await self._start(answer, b"text/event-stream", (b"cache-control", b"no-cache"))
        await self._send({"type": "http.response.body", "body": rest})
        attempt.delivered = meter.output_tokens or 0  # also what only a usage of after the last text said
        return None

    async def _start(self, answer: Answered, content_type: bytes, *more: Header) -> None:
        self.started = True
        head: list[Header] = [(b"content-type", content_type), *more, *self._headers, *answer.headers]
        head.append((b"x-freehold-row", self._attempt.row_id.encode()))
        await self._send({"type": "http.response.start", "status": 200, "headers": head})

    async def interrupted(self, why: str) -> Failed | None:
        """After a `Watch` has interrupted the attempt."""
        attempt = self._attempt
        if why == "client_gone":
            attempt.error = "client_gone"
            return None
        if why == "stopping":
            attempt.error = "client_gone"
            return await self.broke("client_gone", Unavailable("the gateway is stopping", retry_after=1))
        if self.started and attempt.meter.complete:  # all was said; only the connection was not closed
            attempt.error = attempt.meter.failure()
            await self._send({"type": "http.response.body", "body": b""})
            return None
        seconds = time.perf_counter() - attempt.started
        return await self.broke(
            "timeout", UpstreamTimeout(f"{attempt.target.upstream}: silent; given up at {seconds:.1f} s")
        )

    async def broke(self, kind: ErrorClass, error: FreeholdError) -> Failed | None:
        """The answer ends here. A client that has had a part of it is told."""
        self._attempt.error = kind
        if not self.started:
            return Failed(error, kind)
        if self._request.stream:
            last = error_event(error, self._request.endpoint)
            await self._send({"type": "http.response.body", "body": last})
        return None


def _does_not_speak(request: Request, target: Target) -> Failed:
    words = (
        f"{request.alias!r} is not to be had by way of {request.endpoint}: {target.upstream} does not speak that API"
    )
    return Failed(InvalidRequest(words, param="model"), "refused_here", final=False)
