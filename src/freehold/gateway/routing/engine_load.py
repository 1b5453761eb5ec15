"""How busy a replica is, from the `/metrics` of its engine. Torch-free.

Sources of the names: vLLM `v1/metrics/loggers.py` (and the name it had before 0.10 for the cache), SGLang
`srt/metrics/collector.py` (with `--enable-metrics`), llama.cpp `tools/server/server.cpp` (with `--metrics`; newer ones
have no gauge of the cache), and `freehold.engine.metrics`. Requests running, requests waiting, and how full the KV
cache is: these three the Gateway API Inference Extension asks of every model server.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

_FULL = 0.9  # from here on a cache is about to preempt requests or make them wait


@dataclass(frozen=True, slots=True)
class Load:
    """Requests in the engine, whoever sent them. cache: fullness from 0 to 1; 0 if the engine does not say."""

    running: int = 0
    waiting: int = 0
    cache: float = 0.0

    @property
    def score(self) -> float:
        """How long a new request would have to wait its turn, in requests: less is better.

        One that waits counts twice, as it has its whole work still before it. A cache that is nearly full adds up to
        half of what runs: that is what would have to go or be waited for.
        """
        crowded = max(0.0, self.cache - _FULL) / (1 - _FULL)
        return self.running + 2 * self.waiting + crowded * self.running / 2


# By engine: the names of running, waiting and cache; the first that is there counts.
_NAMES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "vllm": (
        ("vllm:num_requests_running",),
        ("vllm:num_requests_waiting",),
        ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"),
    ),
    "sglang": (("sglang:num_running_reqs",), ("sglang:num_queue_reqs",), ("sglang:token_usage",)),
    "llamacpp": (
        ("llamacpp:requests_processing",),
        ("llamacpp:requests_deferred",),
        ("llamacpp:kv_cache_usage_ratio",),
    ),
    "freehold": (
        ("freehold_num_requests_running",),
        ("freehold_num_requests_waiting",),
        ("freehold_kv_cache_usage_ratio",),
    ),
}


def read_load(engine: str, text: str) -> Load | None:
    """The load that Prometheus text tells of; None if this engine's counts of requests are not in it.

    An engine of several ranks has a line for each: their requests add up, and the fullest cache counts.
    """
    names = _NAMES.get(engine)
    if names is None:
        return None
    running, waiting, cache = ([value for name in of for value in _values(text, name)] for of in names)
    if not running or not waiting:
        return None
    return Load(round(sum(running)), round(sum(waiting)), min(max(cache, default=0.0), 1.0))


def _values(text: str, name: str) -> Iterator[float]:
    """Of all lines of one metric that have a finite value from 0 on."""
    start = 0
    while (start := text.find(name, start)) >= 0:
        end = text.find("\n", start)
        line = text[start : end if end >= 0 else len(text)]
        begins_line = start == 0 or text[start - 1] == "\n"
        start += len(line)
        rest = line[len(name) :]
        if not begins_line or not rest.startswith(("{", " ")):
            continue  # a comment, or a longer name that begins with this one
        words = (rest.rpartition("}")[2] or rest).split()
        try:
            value = float(words[0]) if words else math.nan
        except ValueError:
            continue
        if math.isfinite(value) and value >= 0:
            yield value
