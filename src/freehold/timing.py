"""TTFT, ITL, TPOT, E2E and goodput from timestamps: the one definition, for the engine and for every client.

    started        first chunk                 last chunk
       │── TTFT ──────▶│──ITL─▶│──ITL─▶│──ITL─▶│
       │── E2E ───────────────────────────────▶│

* TTFT: from sending the request to the first token of any kind, reasoning included.
* ITL: the gap between two stream chunks that carry tokens. A chunk may carry several tokens (speculative decoding), so
  an ITL is always read together with the tokens per chunk.
* E2E: from sending the request to the last chunk.
* TPOT = (E2E - TTFT) / (completion tokens - 1); it has no value for fewer than two tokens.
* Goodput: the requests per second that met every objective of an `Slo`.

Times are seconds of one monotonic clock. Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(slots=True)
class StreamClock:
    """The running timestamps of one stream, in constant memory: for whoever sees the chunks as they pass.

    >>> clock = StreamClock(started=10.0)
    >>> clock.tick(10.5, tokens=1), clock.tick(10.75, tokens=2)   # the first chunk has no gap before it
    (None, 0.25)
    >>> clock.ttft, clock.e2e, clock.tpot
    (0.5, 0.75, 0.125)
    """

    started: float
    first: float | None = None
    last: float | None = None
    tokens: int = 0

    def tick(self, now: float, tokens: int) -> float | None:
        """Note a chunk with tokens; returns the gap since the chunk before it (an ITL), None for the first."""
        self.tokens += tokens
        previous, self.last = self.last, now
        if previous is None:
            self.first = now
            return None
        return now - previous

    @property
    def ttft(self) -> float | None:
        return None if self.first is None else self.first - self.started

    @property
    def e2e(self) -> float | None:
        return None if self.last is None else self.last - self.started

    @property
    def tpot(self) -> float | None:
        if self.first is None or self.last is None or self.tokens < 2:
            return None
        return (self.last - self.first) / (self.tokens - 1)


@dataclass(frozen=True, slots=True)
class StreamTiming:
    """The latencies of one finished stream. ttft, e2e and tpot are None where they have no value (see the module).

    itl: one gap per chunk after the first; chunk_tokens: the tokens of every chunk, the first included.
    """

    ttft: float | None
    e2e: float | None
    tpot: float | None
    itl: tuple[float, ...]
    chunk_tokens: tuple[int, ...]

    @classmethod
    def from_chunks(cls, started: float, chunks: Iterable[tuple[float, int]]) -> StreamTiming:
        """From (time, tokens) of every chunk that carried tokens, in order. Chunks without tokens are skipped."""
        clock = StreamClock(started)
        gaps: list[float] = []
        sizes: list[int] = []
        for now, tokens in chunks:
            if tokens < 1:
                continue
            gap = clock.tick(now, tokens)
            if gap is not None:
                gaps.append(gap)
            sizes.append(tokens)
        return cls(clock.ttft, clock.e2e, clock.tpot, tuple(gaps), tuple(sizes))


@dataclass(frozen=True, slots=True)
class Slo:
    """Service level objectives, in seconds; None is no objective. A bound is met when it is not exceeded.

    itl bounds every gap of the stream (its longest stall), not their mean: the mean is what tpot bounds.
    """

    ttft: float | None = None
    tpot: float | None = None
    itl: float | None = None
    e2e: float | None = None

    def met_by(self, timing: StreamTiming) -> bool:
        """Whether a stream met all objectives. A stream that produced no token met none of them."""
        if timing.ttft is None or timing.e2e is None:
            return False
        longest_gap = max(timing.itl, default=0.0)
        pairs = (
            (timing.ttft, self.ttft),
            (timing.tpot or 0.0, self.tpot),
            (longest_gap, self.itl),
            (timing.e2e, self.e2e),
        )
        return all(bound is None or value <= bound for value, bound in pairs)


def goodput(timings: Iterable[StreamTiming], slo: Slo, seconds: float) -> float:
    """Requests per second that met the objectives, over a measured window of `seconds`."""
    if seconds <= 0:
        raise ValueError(f"goodput needs a window longer than 0 s, got {seconds}")
    return sum(slo.met_by(timing) for timing in timings) / seconds
