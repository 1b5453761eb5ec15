"""One definition of the latencies: hand-computed streams."""

from __future__ import annotations

import pytest

from freehold.timing import Slo, StreamClock, StreamTiming, goodput


def test_a_stream_by_hand() -> None:
    timing = StreamTiming.from_chunks(100.0, [(100.5, 1), (101.0, 3), (101.25, 1)])
    assert timing.ttft == 0.5
    assert timing.e2e == 1.25
    assert timing.itl == (0.5, 0.25)
    assert timing.chunk_tokens == (1, 3, 1)
    assert timing.tpot == pytest.approx(0.75 / 4)  # (E2E - TTFT) / (5 tokens - 1)


def test_chunks_without_tokens_do_not_count() -> None:
    assert StreamTiming.from_chunks(0.0, [(1.0, 0), (2.0, 1), (3.0, 0)]) == StreamTiming(2.0, 2.0, None, (), (1,))


def test_no_tokens_no_latencies() -> None:
    timing = StreamTiming.from_chunks(0.0, [])
    assert timing == StreamTiming(None, None, None, (), ())
    assert not Slo().met_by(timing)


def test_one_chunk_of_several_tokens_has_a_tpot_of_zero() -> None:
    assert StreamTiming.from_chunks(0.0, [(1.0, 4)]).tpot == 0.0


def test_the_clock_agrees_with_the_timing() -> None:
    chunks = [(1.5, 2), (2.0, 1), (4.0, 5)]
    clock = StreamClock(1.0)
    gaps = tuple(gap for now, tokens in chunks if (gap := clock.tick(now, tokens)) is not None)
    timing = StreamTiming.from_chunks(1.0, chunks)
    assert (clock.ttft, clock.e2e, clock.tpot, gaps) == (timing.ttft, timing.e2e, timing.tpot, timing.itl)


@pytest.mark.parametrize(
    ("slo", "met"),
    [
        (Slo(), True),
        (Slo(ttft=0.5, tpot=0.1875, itl=0.5, e2e=1.25), True),  # met when not exceeded
        (Slo(ttft=0.4), False),
        (Slo(tpot=0.18), False),
        (Slo(itl=0.49), False),  # the longest gap, not the mean
        (Slo(e2e=1.2), False),
    ],
)
def test_slo(slo: Slo, met: bool) -> None:
    timing = StreamTiming.from_chunks(100.0, [(100.5, 1), (101.0, 3), (101.25, 1)])
    assert slo.met_by(timing) is met


def test_goodput_counts_requests_that_met_everything() -> None:
    fast = StreamTiming.from_chunks(0.0, [(0.1, 1), (0.2, 1)])
    slow = StreamTiming.from_chunks(0.0, [(5.0, 1), (5.1, 1)])
    assert goodput([fast, fast, slow], Slo(ttft=1.0), seconds=4.0) == 0.5
    with pytest.raises(ValueError, match="longer than 0"):
        goodput([fast], Slo(), seconds=0.0)
