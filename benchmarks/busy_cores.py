"""Do threads give way? Decode speed with 2 threads and with 1, while every core is busy with something else.

A pool whose threads spin loses most of its speed on a busy machine: each barrier waits for a thread that has no
processor. Here one busy process per core runs beside the engine, steps with both settings alternate, and the medians'
ratio must be at least a half. The ratio without the busy processes is printed beside it.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch
from _common import Report, arguments

from freehold.engine.loading import EngineOptions, load_model
from freehold.model.cache import PagedCache
from freehold.model.config import GlmConfig
from freehold.model.glm import Glm
from freehold.model.inputs import single_sequence
from freehold.model.tiny import make_tiny

CONTEXT = 1024


def burn() -> None:
    while True:
        sum(range(10_000))


@contextmanager
def busy(processes: int) -> Iterator[None]:
    started = [multiprocessing.get_context("spawn").Process(target=burn, daemon=True) for _ in range(processes)]
    for process in started:
        process.start()
    try:
        time.sleep(1.0)  # until they have imported what they need
        yield
    finally:
        for process in started:
            process.terminate()
            process.join()


def samples_of(models: dict[int, Glm], caches: dict[int, PagedCache], rounds: int) -> dict[int, list[float]]:
    """Milliseconds of single decode steps, by number of threads, in turn."""
    found: dict[int, list[float]] = {threads: [] for threads in models}
    with torch.inference_mode():
        for position in range(CONTEXT, CONTEXT + rounds):
            for threads, model in models.items():
                start = time.perf_counter()
                model.logits(model(single_sequence([position % 4000], start=position), caches[threads]))
                found[threads].append((time.perf_counter() - start) * 1e3)
    return {threads: times[5:] for threads, times in found.items()}


def main() -> int:
    args = arguments(__doc__).parse_args()
    report = Report("busy_cores", args.quick)
    rounds = 100 if args.quick else 400
    with tempfile.TemporaryDirectory() as directory:
        make_tiny(directory, "small")
        config = GlmConfig.from_file(directory)
        models = {n: load_model(Path(directory), config, EngineOptions(threads=n)) for n in (1, 2)}
        caches = {n: PagedCache(config, (CONTEXT + rounds) // 64 + 1, 64, torch.bfloat16) for n in models}
        for cache in caches.values():
            for tensor in (*cache.latent, *cache.index):
                if isinstance(tensor, torch.Tensor):
                    tensor.normal_()
        quiet = samples_of(models, caches, rounds)
        with busy(len(os.sched_getaffinity(0))):
            beside = samples_of(models, caches, rounds)
    for name, samples in (("alone", quiet), ("beside busy cores", beside)):
        one, two = median(samples[1]), median(samples[2])
        print(f"{name}: 1 thread {one:.2f} ms a step, 2 threads {two:.2f} ms, {one / two:.2f} times the speed")
        report.samples[name] = {str(threads): times for threads, times in samples.items()}
    ratio = median(beside[1]) / median(beside[2])
    report.bar("2 threads beside busy cores, times the speed of 1", ratio, ">=", 0.5)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
