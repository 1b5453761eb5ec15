"""An event loop on a thread of its own, for callers that are not async: `LLM`, the terminal chat, notebooks."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, Self, TypeVar

T = TypeVar("T")


class BackgroundLoop:
    """Runs coroutines on a private event loop and waits for them; from any thread but its own.

    Ctrl-C (or any exception) while waiting cancels the coroutine. Works inside programs that have a loop of their own.
    """

    def __init__(self, name: str = "freehold-loop") -> None:
        self._loop: asyncio.AbstractEventLoop
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._running = threading.Event()
        self._thread.start()
        self._running.wait()

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine and return its result, or raise what it raised."""
        if threading.current_thread() is self._thread:
            work.close()
            raise RuntimeError("BackgroundLoop.call from its own thread would wait for itself")
        if not self._thread.is_alive():
            work.close()
            raise RuntimeError("this was closed")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # nothing if it has ended
            raise

    def iterate(self, source: AsyncGenerator[T, None]) -> LoopIterator[T]:
        """An async generator as an iterator. It advances only while somebody waits for its next item."""
        return LoopIterator(self, source)

    def close(self) -> None:
        """Cancel what still runs and end the thread; idempotent."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    def _run(self) -> None:
        self._loop = asyncio.new_event_loop()
        # Its own, and shut down here: asyncio's way takes a new thread, which cannot be had when Python is ending.
        executor = ThreadPoolExecutor(thread_name_prefix=self._thread.name)
        self._loop.set_default_executor(executor)
        self._loop.call_soon(self._running.set)
        try:
            self._loop.run_forever()
            self._loop.run_until_complete(_end_tasks())
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        finally:
            executor.shutdown()
            self._loop.close()


async def _end_tasks() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class LoopIterator(Iterator[T], Generic[T]):
    """Items of an async generator. Close it, or leave its `with` block, to end the generator early."""

    def __init__(self, loop: BackgroundLoop, source: AsyncGenerator[T, None]) -> None:
        self._loop = loop
        self._source = source

    def __next__(self) -> T:
        item = self._loop.call(_next(self._source))
        if item is _END:
            raise StopIteration
        return item  # type: ignore[return-value]

    def close(self) -> None:
        self._loop.call(_close(self._source))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


_END = object()


async def _next(source: AsyncGenerator[T, None]) -> T | object:
    return await anext(source, _END)


async def _close(source: AsyncGenerator[Any, None]) -> None:
    await source.aclose()
