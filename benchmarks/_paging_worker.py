"""One engine in a process of its own, for benchmarks/paging.py: its answers, its speed, and the memory it took.

Reads one JSON object from the command line, prints one. `limit`: bytes of private memory, mapped files' included, that
the process may have; the kernel refuses more (RLIMIT_DATA).
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

ASKED: dict[str, Any] = json.loads(sys.argv[1])
if ASKED["limit"]:
    resource.setrlimit(resource.RLIMIT_DATA, (ASKED["limit"], ASKED["limit"]))

import torch  # noqa: E402 - the limit holds for what importing takes, too

from freehold.engine.engine import Engine  # noqa: E402
from freehold.engine.loading import EngineOptions, build_engine  # noqa: E402
from freehold.engine.request import Request  # noqa: E402
from freehold.engine.runner import ModelRunner  # noqa: E402
from freehold.model.pager import ExpertPager  # noqa: E402
from freehold.types import SamplingParams  # noqa: E402


def status(*names: str) -> dict[str, int]:
    """Bytes that the kernel counts for this process."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[name].split()[0]) * 1024 for name in names}


def answer(engine: Engine, number: int, prompt: int, tokens: int) -> dict[str, Any]:
    """One sampled answer; the seed makes it the same wherever the logits are."""
    g = torch.Generator().manual_seed(number)
    ids = tuple(torch.randint(0, engine.config.vocab_size - 200, (prompt,), generator=g).tolist())
    params = SamplingParams(max_tokens=tokens, temperature=1.0, seed=number, ignore_eos=True)
    before = counts(engine)
    engine.add(Request(f"r{number}", ids, params))
    found: list[int] = []
    times, started = [], time.perf_counter()
    first: dict[str, float] = {}
    while engine.has_work:
        for chunk in engine.step():
            if chunk.error is not None:
                raise chunk.error
            if chunk.token_ids and not found:
                first = counts(engine)
            found += chunk.token_ids
            times.append(time.perf_counter() - started)
    after = counts(engine)
    return {
        "tokens": found,
        "ttft": times[0],
        "decode_seconds": times[-1] - times[0],
        "prefill": {key: first[key] - before[key] for key in first},
        "decode": {key: after[key] - first[key] for key in first},
    }


def counts(engine: Engine) -> dict[str, float]:
    paging = engine.stats().paging
    names = ("reads", "read_bytes", "ahead", "wasted", "wait_seconds")
    return {name: 0 if paging is None else getattr(paging, name) for name in names}


def disk_rate(pager: ExpertPager, seconds: float) -> float:
    """Bytes a second of the file's records in random order, read past the page cache by as many threads as the pager
    has, into memory that is there already: what no way of reading experts from this file can beat."""
    from concurrent.futures import ThreadPoolExecutor

    layout, until = pager.file.layout, time.perf_counter() + seconds
    g = torch.Generator().manual_seed(1)
    order = torch.randperm(layout.records, generator=g).tolist()

    def read(worker: int) -> int:
        size = 0
        for record in order[worker::4]:
            layer, expert = divmod(record, layout.experts)
            pager.file.read(layer, expert, pager._views[worker][: layout.record_bytes(layer)])
            size += layout.record_bytes(layer)
            if time.perf_counter() > until:
                break
        return size

    for view in pager._views[:4]:
        view[:] = bytes(len(view))
    started = time.perf_counter()
    with ThreadPoolExecutor(4) as pool:
        size = sum(pool.map(read, range(4)))
    return size / (time.perf_counter() - started)


def main() -> None:
    started = time.perf_counter()
    options = EngineOptions(
        threads=ASKED["threads"], cache_bytes=ASKED["cache_bytes"], max_num_seqs=4, max_model_len=8192,
        max_num_batched_tokens=ASKED["chunk"], quantize=ASKED["quantize"], expert_bytes=ASKED["memory"],
        enable_prefix_cache=False, num_draft_tokens=0,
    )  # fmt: skip
    engine, _ = build_engine(ASKED["directory"], options)
    loaded, peak = time.perf_counter() - started, status("VmHWM", "RssAnon", "RssFile")
    runner = engine.runner
    assert isinstance(runner, ModelRunner)
    pager = runner.model.pager
    found: dict[str, Any] = {"load_seconds": loaded, "loaded": peak, "answers": [], "disk": []}
    if pager is not None:
        found["file_bytes"] = pager.file.num_bytes
        if not ASKED["read_ahead"]:
            pager._stages = 0
            for paged in pager._paged:
                paged.ahead = type(paged.ahead)()  # null
        if ASKED["disk_seconds"]:  # before anything is in the slots: they are scratch
            found["disk"].append(disk_rate(pager, ASKED["disk_seconds"]))
    for number in range(ASKED["answers"]):
        found["answers"].append(answer(engine, number, ASKED["prompt"], ASKED["tokens"]))
    found["ended"] = status("VmHWM", "RssAnon", "RssFile")
    engine.close()
    print(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
