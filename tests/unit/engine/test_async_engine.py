"""The engine behind asyncio: streams, aborts, refusals, failures, shutdown. Nothing may hang and nothing may leak."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence

import pytest
from blockbuster import blockbuster_ctx

from freehold.engine import async_engine
from freehold.engine.async_engine import AsyncEngine
from freehold.engine.engine import Engine, EngineConfig
from freehold.engine.step import SeqOutput, StepInput
from freehold.errors import (
    ContextTooLong,
    EngineError,
    FreeholdError,
    InsufficientMemory,
    InvalidRequest,
    Overloaded,
    SlowReader,
    Unavailable,
)
from freehold.types import FinishReason, SamplingParams, TokenChunk


class Gate:
    """Counts up for every request. While `closed`, steps wait, so that tests decide when the engine advances."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.fail: Exception | None = None
        self.threads: set[str] = set()
        self.steps = 0
        self.seconds = 0.0  # that a step takes
        self.is_closed = False

    def execute(self, step: StepInput) -> list[SeqOutput]:
        self.threads.add(threading.current_thread().name)
        self.open.wait(30)
        time.sleep(self.seconds)
        self.steps += 1
        if self.fail is not None:
            raise self.fail
        return [
            SeqOutput(seq.request_id, (seq.start + len(seq.token_ids),) if seq.samples else ()) for seq in step.seqs
        ]

    def release(self, request_ids: tuple[str, ...]) -> None:
        self.threads.add(threading.current_thread().name)

    def close(self) -> None:
        self.threads.add(threading.current_thread().name)
        self.is_closed = True


def make(**options: object) -> tuple[AsyncEngine, Gate]:
    gate = Gate()
    sizes = {
        "model_name": "m",
        "max_model_len": 5000,
        "num_blocks": 400,
        "eos_token_ids": (4999,),
        "vocab_size": 5000,
        "cache_bytes_per_token": 10,
        "block_size": 8,
        "max_num_seqs": 4,
        "max_queue": 4,
    }
    return AsyncEngine(Engine(EngineConfig(**{**sizes, **options}), gate)), gate  # type: ignore[arg-type]


@pytest.fixture
async def running() -> AsyncIterator[tuple[AsyncEngine, Gate]]:
    before = set(threading.enumerate())  # a server that other tests share may be running
    engine, gate = make()
    await engine.start()
    yield engine, gate
    gate.open.set()
    await engine.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "freehold-engine" and thread not in before]


def ask(engine: AsyncEngine, name: str, max_tokens: int = 5) -> AsyncGenerator[TokenChunk, None]:
    return engine.submit(name, [1, 2, 3], SamplingParams(max_tokens=max_tokens))


async def collect(stream: AsyncGenerator[TokenChunk, None]) -> list[TokenChunk]:
    return [chunk async for chunk in stream]


async def until(condition: object, seconds: float = 10.0) -> None:
    """Wait for what the engine's thread will bring about."""
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it did not come about"
        await asyncio.sleep(0.002)


def empty(engine: AsyncEngine) -> bool:
    stats = engine.stats()
    return (stats.running, stats.waiting, stats.kv_usage) == (0, 0, 0.0)


def tokens_of(chunks: Sequence[TokenChunk]) -> list[int]:
    return [token for chunk in chunks for token in chunk.token_ids]


# ── streams ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_tokens_arrive_in_order_and_end(running: tuple[AsyncEngine, Gate]) -> None:
    engine, _ = running
    streams = [ask(engine, f"r{n}", max_tokens=n + 1) for n in range(4)]
    for n, chunks in enumerate(await asyncio.gather(*map(collect, streams))):
        assert tokens_of(chunks) == list(range(3, 4 + n))
        assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + [FinishReason.LENGTH]
    await until(lambda: empty(engine))


async def test_a_finished_stream_stays_finished(running: tuple[AsyncEngine, Gate]) -> None:
    engine, _ = running
    stream = ask(engine, "a")
    await collect(stream)
    assert await collect(stream) == []
    await stream.aclose()
    assert len(tokens_of(await collect(ask(engine, "a")))) == 5, "its id is free again"


async def test_the_runner_is_used_by_one_thread_only(running: tuple[AsyncEngine, Gate]) -> None:
    engine, gate = running
    await collect(ask(engine, "a"))
    await engine.close()
    assert gate.threads == {"freehold-engine"}
    assert gate.is_closed


async def test_an_idle_engine_uses_no_time(running: tuple[AsyncEngine, Gate]) -> None:
    engine, gate = running
    await collect(ask(engine, "a"))
    await until(lambda: empty(engine))
    steps, before = gate.steps, time.process_time()
    await asyncio.sleep(0.3)
    assert gate.steps == steps
    assert time.process_time() - before < 0.15


async def test_the_event_loop_is_never_blocked() -> None:
    with blockbuster_ctx():
        engine, _ = make()
        await engine.start()
        await engine.warm_up()
        streams = [ask(engine, f"r{n}", max_tokens=20) for n in range(8)]
        await streams[0].aclose()
        await asyncio.gather(*map(collect, streams[1:]))
        kept = [ask(engine, f"s{n}", 3000) for n in range(8)]
        with pytest.raises(Overloaded):
            ask(engine, "one too many")
        assert len(kept) == 8
        engine.stats()
        await engine.drain(0.01)
        await engine.close()


# ── going away ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("read", [0, 1])
async def test_closing_a_stream_aborts(running: tuple[AsyncEngine, Gate], read: int) -> None:
    engine, _ = running
    stream = ask(engine, "a", max_tokens=3000)
    for _ in range(read):
        await anext(stream)
    await stream.aclose()
    assert await collect(stream) == []
    await until(lambda: engine.stats().finished[FinishReason.ABORT] == 1)
    assert empty(engine)


async def test_cancelling_the_reader_aborts(running: tuple[AsyncEngine, Gate]) -> None:
    engine, gate = running
    gate.open.clear()
    reader = asyncio.create_task(collect(ask(engine, "a", max_tokens=3000)))
    await asyncio.sleep(0.01)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    gate.open.set()
    await until(lambda: empty(engine))
    await collect(ask(engine, "b"))


async def test_dropping_a_stream_aborts(running: tuple[AsyncEngine, Gate]) -> None:
    engine, _ = running
    stream = ask(engine, "a", max_tokens=3000)
    await anext(stream)
    del stream
    gc.collect()
    await until(lambda: empty(engine))


async def test_closing_wakes_who_waits(running: tuple[AsyncEngine, Gate]) -> None:
    engine, gate = running
    gate.open.clear()
    stream = ask(engine, "a")
    reader = asyncio.create_task(collect(stream))
    await asyncio.sleep(0.01)
    await stream.aclose()
    assert await asyncio.wait_for(reader, 5) == []


async def test_abort_by_id_ends_the_stream_with_abort(running: tuple[AsyncEngine, Gate]) -> None:
    engine, _ = running
    stream = ask(engine, "a", max_tokens=3000)
    await anext(stream)
    engine.abort("a")
    engine.abort("nobody")
    assert (await collect(stream))[-1].finish_reason is FinishReason.ABORT
    await until(lambda: empty(engine))


async def test_a_used_id_is_refused_until_its_request_has_ended(running: tuple[AsyncEngine, Gate]) -> None:
    engine, gate = running
    gate.open.clear()
    stream = ask(engine, "a")
    with pytest.raises(InvalidRequest, match="in use"):
        ask(engine, "a")
    await stream.aclose()
    with pytest.raises(InvalidRequest, match="in use"):
        ask(engine, "a")  # else the old request's chunks would reach the new stream
    gate.open.set()
    await until(lambda: not engine._streams)
    assert len(tokens_of(await collect(ask(engine, "a")))) == 5


async def test_a_stream_that_is_not_read_is_ended(
    running: tuple[AsyncEngine, Gate], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(async_engine, "MOST_UNREAD", 20)
    monkeypatch.setattr(async_engine, "FLUSH_SECONDS", 0.0)
    engine, gate = running
    slow = ask(engine, "slow", 3000)
    await until(lambda: gate.steps > 20 and empty(engine))
    assert engine.stats().finished[FinishReason.ABORT] == 1
    assert len(tokens_of(await collect(ask(engine, "other", 10)))) == 10, "others do not notice"
    chunks = await collect(slow)
    assert [len(chunk.token_ids) for chunk in chunks] == [20, 0], "what waited is not lost, and comes at once"
    assert isinstance(chunks[-1].error, SlowReader)
    assert chunks[-1].finish_reason is FinishReason.ERROR
    assert len(tokens_of(await collect(ask(engine, "slow", 3)))) == 3, "its id is free again"


async def test_a_stream_that_is_read_in_time_is_not_ended(
    running: tuple[AsyncEngine, Gate], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(async_engine, "MOST_UNREAD", 20)
    monkeypatch.setattr(async_engine, "FLUSH_SECONDS", 0.0)
    engine, gate = running
    stream = ask(engine, "a", 21)
    await until(lambda: gate.steps == 21 and empty(engine))
    chunks = await collect(stream)
    assert len(tokens_of(chunks)) == 21, "exactly as many as may wait, and the last"
    assert chunks[-1].finish_reason is FinishReason.LENGTH


async def test_tokens_that_come_fast_travel_together_but_the_first_does_not_wait(
    running: tuple[AsyncEngine, Gate], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(async_engine, "FLUSH_SECONDS", 30.0)
    engine, gate = running
    gate.seconds = 0.005
    chunks = await collect(ask(engine, "a", 40))
    assert [tokens_of([chunk]) for chunk in chunks] == [[3], list(range(4, 43))], "the first, and all with the last"


async def test_tokens_do_not_wait_for_the_next_step(
    running: tuple[AsyncEngine, Gate], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(async_engine, "FLUSH_SECONDS", 0.2)
    engine, gate = running
    gate.seconds = 0.005
    stream = ask(engine, "a", 3000)
    assert tokens_of([await anext(stream)]) == [3]
    await until(lambda: gate.steps >= 3)
    gate.open.clear()  # as if the next step took for ever
    async with asyncio.timeout(10):
        assert tokens_of([await anext(stream)])[:2] == [4, 5], "what had come in the meantime"
    gate.open.set()
    await stream.aclose()


async def test_a_full_stream_that_is_dropped_is_gone(
    running: tuple[AsyncEngine, Gate], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(async_engine, "MOST_UNREAD", 2)
    engine, gate = running
    stream = ask(engine, "a", 2000)
    await until(lambda: gate.steps > 2 and empty(engine))
    await stream.aclose()
    assert await collect(stream) == []


async def test_throwing_into_a_stream_aborts(running: tuple[AsyncEngine, Gate]) -> None:
    engine, _ = running
    stream = ask(engine, "a", max_tokens=3000)
    with pytest.raises(ValueError, match="mine"):
        await stream.athrow(ValueError("mine"))
    await until(lambda: empty(engine))


async def test_many_come_and_half_of_them_go() -> None:
    engine, _ = make(max_num_seqs=16, max_queue=64, num_blocks=60)
    await engine.start()

    async def one(n: int) -> None:
        stream = ask(engine, f"r{n}", max_tokens=20)
        if n % 2:
            async for chunk in stream:
                if chunk.usage.completion_tokens >= n % 10:
                    break
            await stream.aclose()
        else:
            chunks = await collect(stream)
            assert [token for chunk in chunks for token in chunk.token_ids] == list(range(3, 23))

    await asyncio.gather(*(one(n) for n in range(64)))
    await until(lambda: empty(engine))
    await engine.close()
    engine.engine.check_integrity()


# ── refusals ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_full_queue_refuses_at_once(running: tuple[AsyncEngine, Gate]) -> None:
    engine, gate = running
    gate.open.clear()
    streams = [ask(engine, f"r{n}") for n in range(8)]  # 4 run, 4 wait
    with pytest.raises(Overloaded) as caught:
        ask(engine, "one too many")
    assert caught.value.retry_after == 1.0, "nothing is known yet"
    gate.open.set()
    await asyncio.gather(*map(collect, streams))
    assert len(tokens_of(await collect(ask(engine, "later")))) == 5


async def test_retry_after_follows_the_latencies_seen(running: tuple[AsyncEngine, Gate]) -> None:
    engine, gate = running
    engine.metrics.begin("past", 0.0)
    engine.metrics.record([TokenChunk("past", (1,), finish_reason=FinishReason.STOP)], 7.0)
    gate.open.clear()
    for n in range(8):
        ask(engine, f"r{n}")
    with pytest.raises(Overloaded) as caught:
        ask(engine, "one too many")
    assert caught.value.retry_after == 14.0  # two rounds of 7 s


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "error"),
    [
        ([1] * 4990, 20, ContextTooLong),
        ([1] * 3000, 500, InsufficientMemory),
        ([], 5, InvalidRequest),
        ([5000], 5, InvalidRequest),
    ],
)
async def test_what_cannot_run_is_refused_at_once(
    running: tuple[AsyncEngine, Gate], prompt: list[int], max_tokens: int, error: type[FreeholdError]
) -> None:
    engine, _ = running
    with pytest.raises(error):
        engine.submit("a", prompt, SamplingParams(max_tokens=max_tokens))
    assert not engine._streams


async def test_before_the_start_it_is_unavailable() -> None:
    engine, gate = make()
    assert not engine.is_alive
    with pytest.raises(Unavailable, match="starting") as caught:
        ask(engine, "a")
    assert caught.value.retry_after
    await engine.close()
    assert gate.is_closed


# ── life ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_ready_only_after_a_generation(running: tuple[AsyncEngine, Gate]) -> None:
    engine, _ = running
    assert engine.is_alive
    assert not engine.is_ready
    await engine.warm_up()
    assert engine.is_ready
    assert engine.stats().generation_tokens == 0, "a warm-up is in no metric"
    await engine.close()
    assert not engine.is_ready
    assert not engine.is_alive


async def test_a_warm_up_that_fails_says_so(running: tuple[AsyncEngine, Gate]) -> None:
    engine, gate = running
    gate.fail = RuntimeError("no kernel")
    with pytest.raises(EngineError, match="internal error; see the server's log"):
        await engine.warm_up()
    assert not engine.is_ready


async def test_a_failing_runner_fails_every_stream_and_nothing_hangs(running: tuple[AsyncEngine, Gate]) -> None:
    engine, gate = running
    gate.open.clear()
    streams = [ask(engine, f"r{n}", max_tokens=3000) for n in range(6)]
    gate.fail = RuntimeError("boom")
    gate.open.set()
    for chunks in await asyncio.wait_for(asyncio.gather(*map(collect, streams)), 10):
        assert chunks[-1].finish_reason is FinishReason.ERROR
        assert "internal error" in str(chunks[-1].error)
        assert "boom" not in str(chunks[-1].error)  # for the log, not for whoever else was being served
    assert not engine.is_alive
    with pytest.raises(Unavailable, match="internal error"):
        ask(engine, "late")
    await until(lambda: gate.is_closed)
    await engine.drain(1)


async def test_a_request_that_races_with_the_failure_is_failed_too(running: tuple[AsyncEngine, Gate]) -> None:
    engine, gate = running
    gate.open.clear()
    first = ask(engine, "a")
    await until(lambda: engine.stats().running == 1)
    gate.fail = RuntimeError("boom")
    late = ask(engine, "b")  # in the inbox when the thread ends
    gate.open.set()
    for chunks in await asyncio.wait_for(asyncio.gather(collect(first), collect(late)), 10):
        assert chunks[-1].finish_reason is FinishReason.ERROR


async def test_drain_lets_requests_end_and_refuses_new_ones(running: tuple[AsyncEngine, Gate]) -> None:
    engine, gate = running
    await engine.warm_up()
    gate.open.clear()
    stream = ask(engine, "a")
    draining = asyncio.create_task(engine.drain(10))
    await asyncio.sleep(0.01)
    with pytest.raises(Unavailable, match="shutting down"):
        ask(engine, "b")
    assert engine.is_alive
    assert not engine.is_ready
    gate.open.set()
    await asyncio.wait_for(draining, 10)
    assert (await collect(stream))[-1].finish_reason is FinishReason.LENGTH


async def test_drain_aborts_what_takes_too_long(running: tuple[AsyncEngine, Gate]) -> None:
    engine, gate = running
    gate.open.clear()
    stream = ask(engine, "a", max_tokens=3000)
    asyncio.get_running_loop().call_later(0.1, gate.open.set)
    await asyncio.wait_for(engine.drain(0.02), 10)
    assert (await collect(stream))[-1].finish_reason is FinishReason.ABORT


async def test_a_hanging_step_does_not_hang_the_shutdown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("freehold.engine.async_engine._GRACE", 0.05)
    engine, gate = make()
    await engine.start()
    gate.open.clear()
    stream = ask(engine, "a")
    await until(lambda: engine.stats().running == 1)
    await asyncio.wait_for(engine.drain(0.01), 5)
    assert [chunk.finish_reason for chunk in await asyncio.wait_for(collect(stream), 5)] == [FinishReason.ABORT]
    await asyncio.wait_for(engine.close(), 5)
    assert not engine.is_alive
    gate.open.set()
    await until(lambda: gate.is_closed)


async def test_close_ends_streams(running: tuple[AsyncEngine, Gate]) -> None:
    engine, _ = running
    stream = ask(engine, "a", max_tokens=3000)
    await anext(stream)
    await engine.close()
    await engine.close()
    assert (await asyncio.wait_for(collect(stream), 5))[-1].finish_reason is FinishReason.ABORT
    with pytest.raises(Unavailable, match="closed"):
        ask(engine, "b")


def test_a_loop_that_dies_without_close_leaves_no_thread_behind() -> None:
    engine, gate = make()

    async def forget() -> object:
        await engine.start()
        stream = ask(engine, "a", max_tokens=3000)
        await anext(stream)
        gate.open.clear()  # it must not be done before the loop is
        return stream

    stream = asyncio.run(forget())
    gate.open.set()
    deadline = time.monotonic() + 10
    while not gate.is_closed and time.monotonic() < deadline:
        time.sleep(0.01)
    assert gate.is_closed
    del stream
