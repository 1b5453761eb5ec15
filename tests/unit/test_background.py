"""The private event loop: results, errors, interruption, and nothing left behind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Iterator

import pytest

from freehold.background import BackgroundLoop


@pytest.fixture
def loop() -> Iterator[BackgroundLoop]:
    background = BackgroundLoop("test-loop")
    yield background
    background.close()


async def double(number: int) -> int:
    await asyncio.sleep(0)
    if number < 0:
        raise ValueError(number)
    return 2 * number


def test_call_returns_and_raises(loop: BackgroundLoop) -> None:
    assert loop.call(double(4)) == 8
    with pytest.raises(ValueError, match="-1"):
        loop.call(double(-1))


def test_it_works_inside_another_event_loop(loop: BackgroundLoop) -> None:
    async def outside() -> int:
        return loop.call(double(3))

    assert asyncio.run(outside()) == 6


def test_a_call_from_its_own_thread_is_refused(loop: BackgroundLoop) -> None:
    async def inside() -> None:
        loop.call(double(1))

    with pytest.raises(RuntimeError, match="wait for itself"):
        loop.call(inside())


def test_close_cancels_what_runs_and_ends_the_thread() -> None:
    background = BackgroundLoop("test-closing")
    ended = threading.Event()

    async def start() -> asyncio.Task[None]:
        async def forever() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

        task = asyncio.create_task(forever())
        await asyncio.sleep(0)
        return task

    background.call(start())
    background.close()
    background.close()
    assert ended.is_set()
    assert all(thread.name != "test-closing" for thread in threading.enumerate())
    with pytest.raises(RuntimeError, match="closed"):
        background.call(double(1))


def test_iterate_advances_on_demand_and_closes(loop: BackgroundLoop) -> None:
    made: list[int] = []
    ended: list[bool] = []

    async def count() -> AsyncGenerator[int, None]:
        try:
            for number in range(5):
                made.append(number)
                yield number
        finally:
            ended.append(True)

    assert list(loop.iterate(count())) == [0, 1, 2, 3, 4]
    made.clear()
    with loop.iterate(count()) as numbers:
        assert next(numbers) == 0
        assert made == [0]
    assert ended == [True, True]
    with pytest.raises(StopIteration):
        next(numbers)
