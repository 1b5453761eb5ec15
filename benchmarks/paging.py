"""A checkpoint of 6 GB in 3 GB of memory: is it right, how fast beside what the disk allows, and how long is a start?

The checkpoint has random weights (bf16) and 128 experts a layer, of which a token uses 8. Every engine is a process of
its own, answers the same prompts by seeded sampling, and must give the tokens of an engine that holds everything.

Memory is the most that was ever resident, as the kernel counts it (VmHWM: private memory and the pages of mapped files;
the page cache of files that are read or written belongs to no process, and experts are read past it). The limit is also
set with RLIMIT_DATA, so that the kernel refuses private memory beyond it.

The bound of decoding is the rate of the disk over the bytes that were read for a token and used (or the speed with all
in memory, if that is less). The disk is measured by the same process, on the same file: whole records in random order
by as many threads as the pager has.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from _common import Report, arguments
from _paging_policies import POLICIES, hit_rate, made_trace, recorded_trace, router_ahead

from freehold.model.sizes import size_config
from freehold.model.tiny import write_random_checkpoint

WORKER = str(Path(__file__).with_name("_paging_worker.py"))
FREEHOLD = str(Path(sys.executable).with_name("freehold"))
GB = 10**9
FULL = size_config("medium") | {"n_routed_experts": 128, "num_experts_per_tok": 8}
SHARD = 512 << 20


class Bench:
    def __init__(self, report: Report, directory: Path, *, quick: bool, threads: int) -> None:
        self.report, self.directory, self.quick = report, directory, quick
        config = size_config("small") | {"num_experts_per_tok": 4} if quick else FULL
        started = time.perf_counter()
        written = write_random_checkpoint(config, directory, max_shard_bytes=SHARD, force=True)
        self.checkpoint_bytes = written.data_bytes
        print(f"made a checkpoint of {self.checkpoint_bytes / GB:.2f} GB in {time.perf_counter() - started:.0f} s")
        # What experts may take, and what the whole process may.
        self.limit = GB if quick else 3 * GB
        self.budgets = [60 * 10**6, 120 * 10**6] if quick else [1 * GB, 1_800_000_000]
        self.asked: dict[str, Any] = {
            "directory": str(directory), "threads": threads, "cache_bytes": 64 << 20, "chunk": 2048, "quantize": None,
            "memory": None, "limit": None, "read_ahead": True, "disk_seconds": 0.0, "answers": 3 if quick else 5,
            "prompt": 300 if quick else 512, "tokens": 40 if quick else 100,
        }  # fmt: skip

    def engine(self, **asked: Any) -> dict[str, Any]:
        command = [sys.executable, WORKER, json.dumps(self.asked | asked)]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"the engine ended with {run.returncode}: {run.stderr[-2000:]}")
        found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
        return found

    # -- 6 GB in 3 GB --------------------------------------------------------------------------------------------------

    def serving(self) -> None:
        whole = self.engine()
        expected = [answer["tokens"] for answer in whole["answers"]]
        self.report.samples["all in memory"] = whole
        decode = rates(whole)
        print(f"all in memory: {median(decode):.1f} tokens/s, at most {whole['ended']['VmHWM'] / GB:.2f} GB resident")
        held = whole["loaded"]["VmHWM"] / self.checkpoint_bytes
        self.report.bar("peak while all is loaded, of the checkpoint's bytes", held, "<=", 3.0 if self.quick else 1.1)
        disk_seconds = 1.0 if self.quick else 4.0
        for i, budget in enumerate(self.budgets):
            found = self.engine(memory=budget, limit=self.limit, disk_seconds=disk_seconds)
            name = f"{budget / GB:g} GB for experts"
            self.report.samples[name] = found
            same = sum(a["tokens"] == b for a, b in zip(found["answers"], expected, strict=True))
            per_token = [needed_bytes(answer) for answer in found["answers"]]
            disk, seen = found["disk"][0], rates(found)
            bounds = [min(disk / max(size, 1), median(decode)) for size in per_token]
            reached = [a / b for a, b in zip(seen, bounds, strict=True)]
            print(
                f"{name}{', packed first' if i == 0 else ''}: loaded in {found['load_seconds']:.1f} s; "
                f"{median(seen):.1f} tokens/s of {median(bounds):.1f} that the disk allows "
                f"({disk / 1e6:,.0f} MB/s, {median(per_token) / 1e6:.1f} MB needed for a token)"
            )
            prompts = [self.asked["prompt"] / a["ttft"] for a in found["answers"]]
            print(f"  prompts: {median(prompts):,.0f} tokens/s; at most {found['ended']['VmHWM'] / GB:.2f} GB resident")
            self.report.bar(f"{name}: answers equal to those of all in memory", same / len(expected), "==", 1)
            self.report.bar(f"{name}: most resident, GB", found["ended"]["VmHWM"] / GB, "<=", self.limit / GB)
            self.report.bar(f"{name}: decoding, of the disk's bound", median(reached), ">=", 0.3 if self.quick else 0.6)
        if not self.quick:
            self.report.bar("checkpoint, GB", self.checkpoint_bytes / GB, ">=", 6)

    def read_ahead(self) -> None:
        """With and without reading for the next layer while one is computed, in pairs of engines."""
        found: dict[str, list[dict[str, Any]]] = {"with": [], "without": []}
        for _ in range(1 if self.quick else 4):
            for name in found:
                engine = self.engine(memory=self.budgets[-1], read_ahead=name == "with", prompt=1024, answers=3)
                found[name] += list(engine["answers"][1:])
        self.report.samples["reading ahead"] = found
        for what, seconds in (("prompts", "ttft"), ("decoding", "decode_seconds")):
            times = {name: [answer[seconds] for answer in answers] for name, answers in found.items()}
            ratio = median(b / a for a, b in zip(*times.values(), strict=True))
            extra = sum(a["decode"]["wasted"] for a in found["with"]) / sum(a["decode"]["reads"] for a in found["with"])
            print(f"{what}: reading ahead makes it {ratio:.2f} times as fast; {extra:.0%} of reads are in vain")
            self.report.bar(f"{what} with reading ahead, of the speed without", ratio, ">=", 0.7 if self.quick else 1.0)

    # -- start ---------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """`freehold serve --timings`: a first start, which packs, a second one, and one with all in memory."""
        shutil.rmtree(self.directory / ".freehold", ignore_errors=True)
        memory = ["--expert-memory", str(self.budgets[-1])]
        found = {}
        for name, options in (("first", memory), ("second", memory), ("all in memory", [])):
            found[name] = timings(self.directory, options)
            print(
                f"{name} start: {found[name]['seconds']:.1f} s, at most {found[name]['resident'] / GB:.2f} GB resident"
            )
            for part, seconds in found[name]["parts"].items():
                print(f"    {part:28} {seconds:7.2f} s")
        self.report.samples["starts"] = found
        self.report.bar(
            "the second start, of the first", found["second"]["seconds"] / found["first"]["seconds"], "<", 1
        )
        for name in ("first", "second"):
            resident = found[name]["resident"] / GB
            self.report.bar(f"most resident in the {name} start, GB", resident, "<=", self.limit / GB)

    # -- policies ------------------------------------------------------------------------------------------------------

    def policies(self) -> None:
        tokens = 150 if self.quick else 1500
        traces = [
            made_trace(tokens=tokens, skew=0.7),
            made_trace(tokens=tokens, skew=1.2),
            made_trace(tokens=tokens, skew=1.2, prompt=512, every=250),
            recorded_trace(self.directory, 100 if self.quick else 500, 512),
        ][2 if self.quick else 0 :]
        print("experts found in memory while decoding, with room for a quarter of them:")
        rates: dict[str, dict[str, float]] = {}
        for trace in traces:
            of = rates[trace.name] = {policy.name: hit_rate(policy, trace, 0.25) for policy in POLICIES}
            print(f"  {trace.name:32}", ", ".join(f"{name} {rate:.1%}" for name, rate in of.items()))
        self.report.samples["hit rates"] = rates
        worst = min(of["fading counts"] - of["least recently used"] for of in rates.values())
        self.report.bar("hit rate above that of least recently used, least", worst, ">=", 0)
        guess = router_ahead(self.directory, 60 if self.quick else 200, 0.25)
        self.report.samples["guesses of the next layer's router"] = asdict(guess)
        print(
            f"the next layer's router, given this layer's input, names {guess.recall:.0%} of those it will choose, "
            f"{guess.missing:.0%} of the missing ones; of the missing ones that it names, {guess.useful:.0%} are chosen"
        )


def needed_bytes(answer: dict[str, Any]) -> float:
    """Bytes that were read for a token and used, while decoding."""
    of = answer["decode"]
    return of["read_bytes"] * (1 - of["wasted"] / max(of["reads"], 1)) / (len(answer["tokens"]) - 1)


def rates(found: dict[str, Any]) -> list[float]:
    """Tokens a second of each answer after its first token."""
    return [(len(answer["tokens"]) - 1) / answer["decode_seconds"] for answer in found["answers"]]


def timings(directory: Path, options: list[str]) -> dict[str, Any]:
    """What `freehold serve --timings` prints."""
    command = [FREEHOLD, "serve", str(directory), "--port", "0", "--timings", "--cache-bytes", "64MiB", *options]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    parts, total, resident = {}, 0.0, 0.0
    try:
        assert server.stdout is not None
        for line in server.stdout:
            if match := re.match(r"start: ([\d.]+) s to the first token, at most ([\d,]+) MB", line):
                total, resident = float(match[1]), float(match[2].replace(",", "")) * 1e6
            elif match := re.match(r"  (\S.*?) {2,}([\d.]+) s$", line):
                parts[match[1]] = float(match[2])
            elif line.startswith("ready:"):
                break
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()
    if not parts:
        raise RuntimeError("the server did not start")
    return {"seconds": total, "resident": resident, "parts": parts}


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--directory", type=Path, help="where to work; default: the system's for temporary files")
    args = parser.parse_args()
    report = Report("paging", args.quick)
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        bench = Bench(report, Path(directory) / "model", quick=args.quick, threads=args.threads)
        bench.policies()
        bench.serving()
        bench.read_ahead()
        bench.start()
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
