"""The engine behind asyncio: its own thread, one message in per request, few messages out. Torch-free.

    event loop                                      engine thread
    submit ──add───▶ ┌───────────────┐ ──take──▶ engine.add / engine.abort
    aclose ──abort─▶ │ inbox (queue) │           engine.step
                     └───────────────┘               │
    streams ◀──deliver── call_soon_threadsafe ◀──────┘   one call for all chunks of a step

The event loop never waits for the engine and shares no lock with it; the engine's thread sleeps in its inbox while
there is nothing to do. Everything here but `_Worker` runs on the event loop, and so needs no locks of its own.

A step may take a millisecond, and sending its tokens to eight clients about as much. So a stream is woken at most every
FLUSH_SECONDS, for all that came since; the first tokens of a request and its last never wait.

A stream that is not read does not slow the others down, nor its own request: a paused request would hold its blocks for
as long as a client likes. Its chunks wait, MOST_UNREAD of them at most; then the request is aborted, and its reader, if
it ever comes back, gets what waited and a `SlowReader` error. (A client that is served over HTTP has the buffers of
the sockets on top of that.)
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import queue
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from types import TracebackType
from typing import Any

from freehold.engine.engine import Engine, EngineConfig
from freehold.engine.metrics import EngineMetrics, EngineStats
from freehold.engine.request import Request
from freehold.errors import FreeholdError, InvalidRequest, Overloaded, SlowReader, Unavailable
from freehold.types import FinishReason, SamplingParams, TokenChunk

FLUSH_SECONDS = 0.025  # between two readings of a stream: forty a second read as smoothly as a thousand
# Chunks: minutes of a reader's absence, some 10 MB, and far more than a busy event loop falls behind by.
MOST_UNREAD = 16_384
_LONGEST_RETRY = 60.0  # seconds; the estimate gets poor beyond it
_SOON = 5.0  # seconds after which to retry when the engine starts or drains
_GRACE = 5.0  # seconds that a step has to end once everything is aborted


class _Worker(threading.Thread):
    """The engine's thread: takes messages, steps while there is work, sleeps in the inbox while there is none.

    A message is a Request to add, the id of one to abort, or None to stop.
    """

    def __init__(self, engine: Engine, deliver: Callable[[list[TokenChunk]], None], ended: Callable[[], None]) -> None:
        super().__init__(name="freehold-engine", daemon=True)
        self.inbox: queue.SimpleQueue[Request | str | None] = queue.SimpleQueue()
        self._engine = engine
        self._send = deliver
        self._ended = ended

    def run(self) -> None:
        engine = self._engine
        try:
            while engine.failure is None and self._take_messages():
                self._deliver(engine.step())
        finally:
            try:
                engine.close()
            finally:
                self._ended()

    def _deliver(self, chunks: list[TokenChunk]) -> None:
        if chunks:
            self._send(chunks)

    def _take_messages(self) -> bool:
        """Handle every message there is, and wait for one if there is nothing else to do. False: stop."""
        while not self._engine.has_work or not self.inbox.empty():
            message = self.inbox.get()
            if message is None:
                return False
            if isinstance(message, Request):
                self._add(message)
            else:
                self._engine.abort(message)
        return True

    def _add(self, request: Request) -> None:
        try:
            self._engine.add(request)
        except FreeholdError as error:
            self._deliver([TokenChunk(request.request_id, finish_reason=FinishReason.ERROR, error=error)])


class _Mailbox:
    """Chunks of one request on their way to its stream.

    due: when they may be read, in seconds of the event loop's clock; what is put in sooner waits for `wake`.
    """

    __slots__ = ("abandoned", "chunks", "due", "full", "ready", "waiter")

    def __init__(self) -> None:
        self.chunks: deque[TokenChunk] = deque()
        self.due = 0.0
        self.ready = False
        self.waiter: asyncio.Future[None] | None = None
        self.abandoned = False  # nobody will read it; it stays until the engine has ended the request
        self.full = False  # it took all it takes, and its last chunk says so

    def put(self, chunk: TokenChunk, now: float) -> bool:
        """Take a chunk. False if it is one too many: the request should be aborted."""
        if self.abandoned or self.full:
            return True
        self.full = len(self.chunks) >= MOST_UNREAD and chunk.finish_reason is None
        if self.full:
            error = SlowReader(
                f"{MOST_UNREAD:,} parts of the answer were waiting to be read, and the request was ended; "
                "read the stream as it comes"
            )
            chunk = dataclasses.replace(
                chunk, token_ids=(), logprobs=None, finish_reason=FinishReason.ERROR, stop_token_id=None, error=error
            )
        self.chunks.append(chunk)
        if now >= self.due or chunk.finish_reason is not None:
            self.wake(now)
        return not self.full

    def abandon(self) -> None:
        self.abandoned = True
        self.chunks.clear()
        self._notify()

    async def get(self) -> TokenChunk:
        """The next chunk, with all that waits behind it; StopAsyncIteration once abandoned."""
        while not (self.chunks and self.ready):
            if self.abandoned:
                raise StopAsyncIteration
            self.waiter = asyncio.get_running_loop().create_future()
            await self.waiter
        chunk = self.chunks.popleft()
        while self.chunks and (merged := chunk.then(self.chunks[0])) is not None:
            chunk = merged
            self.chunks.popleft()
        self.ready = bool(self.chunks)
        return chunk

    def wake(self, now: float) -> None:
        """Let all that is there be read, and nothing more for a while."""
        self.ready = True
        self.due = now + FLUSH_SECONDS
        self._notify()

    def _notify(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)


class TokenStream(AsyncGenerator[TokenChunk, None]):
    """The chunks of one request. Closing, cancelling or dropping it before the last chunk aborts the request.

    A class and not a generator function: a generator that was never started does not notice that it is closed.
    """

    def __init__(self, request_id: str, mailbox: _Mailbox, abandon: Callable[[str], None]) -> None:
        self.request_id = request_id
        self._mailbox = mailbox
        self._abandon = abandon
        self._loop = asyncio.get_running_loop()
        self._done = False

    async def asend(self, value: None) -> TokenChunk:
        if self._done:
            raise StopAsyncIteration
        try:
            chunk = await self._mailbox.get()
        except BaseException:
            self._stop()
            raise
        self._done = chunk.finish_reason is not None
        return chunk

    async def athrow(self, typ: Any, val: BaseException | object = None, tb: TracebackType | None = None) -> TokenChunk:
        self._stop()
        error = val if isinstance(val, BaseException) else typ if isinstance(typ, BaseException) else typ()
        raise error.with_traceback(tb)

    async def aclose(self) -> None:
        self._stop()

    def _stop(self) -> None:
        if not self._done:
            self._done = True
            self._abandon(self.request_id)

    def __del__(self) -> None:
        if not self._done:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and the engine with it
                self._loop.call_soon_threadsafe(self._abandon, self.request_id)


class AsyncEngine:
    """Runs an `Engine` for one event loop: the one on which `start` was awaited.

    max_num_seqs + max_queue requests may be unfinished at a time; one more is refused with Overloaded.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._streams: dict[str, _Mailbox] = {}  # every unfinished request
        self._flush: asyncio.TimerHandle | None = None  # set: some streams have chunks that are not due yet
        self._idle = asyncio.Event()  # set: no request is unfinished
        self._ended = asyncio.Event()  # set: the engine's thread has ended
        self._worker: _Worker | None = None
        self._warm = False
        self._draining = False
        self._idle.set()

    @property
    def config(self) -> EngineConfig:
        return self.engine.config

    @property
    def metrics(self) -> EngineMetrics:
        return self.engine.metrics

    @property
    def is_alive(self) -> bool:
        """Whether the engine's thread runs and its runner has not failed."""
        return self._worker is not None and not self._ended.is_set() and self.engine.failure is None

    @property
    def is_ready(self) -> bool:
        """Whether it completed a generation and takes requests."""
        return self._warm and self.is_alive and not self._draining

    def stats(self) -> EngineStats:
        return self.engine.stats()

    # ── life ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def start(self) -> None:
        """Start the engine's thread; once."""
        if self._worker is not None:
            raise RuntimeError("AsyncEngine.start() was called twice")
        loop = asyncio.get_running_loop()

        def deliver(chunks: list[TokenChunk]) -> None:
            try:
                loop.call_soon_threadsafe(self._deliver, chunks)
            except RuntimeError:  # the loop was closed without close(): nobody listens any more
                worker.inbox.put(None)

        def ended() -> None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._on_ended)

        self._worker = worker = _Worker(self.engine, deliver, ended)
        # Thread.start() waits until the thread runs, which is not for the event loop to wait for.
        await asyncio.to_thread(worker.start)

    async def warm_up(self) -> None:
        """Complete one short generation, which no metric counts; then `is_ready` is true. Raises what went wrong."""
        length = max(1, min(8, self.config.max_model_len - 2))
        params = SamplingParams(max_tokens=min(2, self.config.max_model_len - length), temperature=0.0, ignore_eos=True)
        request = Request("freehold-warm-up", [0] * length, params, measured=False)
        async for chunk in self._submit(request):
            if chunk.error is not None:
                raise chunk.error
        self._warm = True

    async def drain(self, timeout: float) -> None:  # noqa: ASYNC109 - it bounds others' work, not the call
        """Refuse new requests, let the unfinished ones end within `timeout` seconds, abort the rest."""
        self._draining = True
        if await self._wait(self._idle, timeout):
            return
        for request_id in self._streams:
            self.abort(request_id)
        if not await self._wait(self._idle, _GRACE):
            self._end_all(TokenChunk("", finish_reason=FinishReason.ABORT))  # a step hangs

    async def close(self) -> None:
        """Abort everything, end the thread, close the runner; idempotent. Waits for a running step, but not forever."""
        self._draining = True
        if self._worker is None:
            self._ended.set()
            await asyncio.to_thread(self.engine.close)
            return
        self._worker.inbox.put(None)
        if await self._wait(self._ended, _GRACE):
            await asyncio.to_thread(self._worker.join)  # its last act was to say that it ended
        else:
            self._on_ended()  # a step hangs; the thread ends with it, or with the process

    @staticmethod
    async def _wait(event: asyncio.Event, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await event.wait()
        except TimeoutError:
            return event.is_set()
        return True

    # ── requests ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def submit(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        cache_salt: str | None = None,
        adapter: str | None = None,
    ) -> AsyncGenerator[TokenChunk, None]:
        """Queue a request; its chunks come from the returned generator, the last with a finish reason.

        Refuses at once, by raising: Overloaded (the queue is full; retry_after is an estimate), Unavailable (starting,
        draining, dead), InvalidRequest, NotFound (no such adapter), ContextTooLong, InsufficientMemory. Closing the
        generator aborts the request, and so does cancelling the task that waits on it; its blocks are free within a
        step.
        """
        self._require_running()
        if len(self._streams) >= self.config.max_num_seqs + self.config.max_queue:
            raise Overloaded(
                f"the queue is full ({len(self._streams)} requests are unfinished); try again later",
                retry_after=self._retry_after(),
            )
        self.engine.check_prompt(prompt_token_ids)
        self.engine.check_adapter(adapter)
        self.engine.check(len(prompt_token_ids), params)
        arrival = self.engine.clock()
        return self._submit(
            Request(request_id, prompt_token_ids, params, cache_salt=cache_salt, adapter=adapter, arrival=arrival)
        )

    def abort(self, request_id: str) -> None:
        """End a request with an ABORT chunk, within a step; nothing happens if there is no such request."""
        if self._worker is not None and request_id in self._streams:
            self._worker.inbox.put(request_id)

    def _submit(self, request: Request) -> TokenStream:
        worker = self._require_running()
        if request.request_id in self._streams:
            raise InvalidRequest(f"request id {request.request_id!r} is in use; ids must be unique", param="request_id")
        self._streams[request.request_id] = mailbox = _Mailbox()
        self._idle.clear()
        worker.inbox.put(request)
        return TokenStream(request.request_id, mailbox, self._abandon)

    def _require_running(self) -> _Worker:
        if self._worker is None:
            raise Unavailable("the engine is starting; try again soon", retry_after=_SOON)
        if not self.is_alive:
            failure = self.engine.failure
            cause = "it was closed" if failure is None else failure.message
            raise Unavailable(f"the engine has stopped: {cause}; restart the server", retry_after=_LONGEST_RETRY)
        if self._draining:
            raise Unavailable("the engine is shutting down; try again on another server", retry_after=_SOON)
        return self._worker

    def _retry_after(self) -> float:
        """Seconds in which the requests before this one would be done, if they take as long as those so far did."""
        mean = self.metrics.mean_e2e()
        if mean is None:
            return 1.0
        rounds = len(self._streams) / self.config.max_num_seqs
        return float(min(max(1, math.ceil(mean * rounds)), _LONGEST_RETRY))

    def _abandon(self, request_id: str) -> None:
        """A stream was closed before its last chunk."""
        mailbox = self._streams.get(request_id)
        if mailbox is not None:
            mailbox.abandon()
            self.abort(request_id)

    def _deliver(self, chunks: list[TokenChunk]) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        for chunk in chunks:
            mailbox = self._streams.get(chunk.request_id)
            if mailbox is None:
                continue
            taken = mailbox.put(chunk, now)
            if chunk.finish_reason is not None:
                del self._streams[chunk.request_id]
            elif not taken:
                self.abort(chunk.request_id)
            elif not mailbox.ready and self._flush is None:
                self._flush = loop.call_at(mailbox.due, self._wake_all)
        if not self._streams:
            self._idle.set()

    def _wake_all(self) -> None:
        """What waits is due, for one stream at least: waking all of them together is cheaper than one by one."""
        self._flush = None
        now = asyncio.get_running_loop().time()
        for mailbox in self._streams.values():
            if mailbox.chunks:
                mailbox.wake(now)

    def _on_ended(self) -> None:
        """The thread is gone: end what it has not ended, for instance what was submitted while it failed."""
        self._ended.set()
        failure = self.engine.failure
        if failure is None:
            self._end_all(TokenChunk("", finish_reason=FinishReason.ABORT))
        else:
            self._end_all(TokenChunk("", finish_reason=FinishReason.ERROR, error=failure))

    def _end_all(self, last: TokenChunk) -> None:
        self._deliver([dataclasses.replace(last, request_id=request_id) for request_id in self._streams])
