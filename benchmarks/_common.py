"""What every benchmark shares: bars, the machine's description, and the dated result file."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Bar:
    """A figure and the limit it must meet, with op one of >=, <=, ==, <, >."""

    name: str
    value: float
    op: str
    limit: float

    @property
    def passed(self) -> bool:
        return {
            ">=": self.value >= self.limit,
            "<=": self.value <= self.limit,
            "<": self.value < self.limit,
            ">": self.value > self.limit,
            "==": self.value == self.limit,
        }[self.op]


@dataclass
class Report:
    """Bars and raw samples of one run; `finish` prints the closing JSON line and gives the exit code."""

    name: str
    quick: bool
    bars: list[Bar] = field(default_factory=list)
    samples: dict[str, Any] = field(default_factory=dict)

    def bar(self, name: str, value: float, op: str, limit: float) -> None:
        self.bars.append(Bar(name, float(value), op, limit))
        print(f"  {'pass' if self.bars[-1].passed else 'FAIL'}  {name}: {value:.6g} {op} {limit:g}")

    def missing(self, what: str) -> None:
        """Something that a bar needs is not there: as good as a bar that was not met."""
        self.bars.append(Bar(what, 0.0, ">=", 1.0))
        print(f"  FAIL  {what}")

    def finish(self, *, write: bool | None = None) -> int:
        """Full runs are kept as `results/NAME-DATE.json`; quick ones only print."""
        line = {
            "bars": [asdict(bar) | {"pass": bar.passed} for bar in self.bars],
            "hardware": hardware(),
            "commit": commit(),
        }
        if write if write is not None else not self.quick:
            RESULTS.mkdir(parents=True, exist_ok=True)
            path = RESULTS / f"{self.name}-{datetime.datetime.now(datetime.UTC).date().isoformat()}.json"
            document = line | {"command": command(), "samples": self.samples}
            path.write_text(json.dumps(document, indent=1) + "\n")
            print(f"wrote {path.relative_to(ROOT)}")
        print(json.dumps(line))
        return 0 if self.bars and all(bar.passed for bar in self.bars) else 1


def command() -> str:
    """What was called, as it reads anywhere: the script from the root of the tree, and folders elsewhere as DIR."""
    script = Path(sys.argv[0]).resolve()
    known = str(script.relative_to(ROOT)) if script.is_relative_to(ROOT) else script.name
    return " ".join([known, *("DIR" if Path(each).is_absolute() else each for each in sys.argv[1:])])


def arguments(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a short run, nothing kept")
    return parser


def hardware() -> dict[str, Any]:
    model, flags = platform.processor(), ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
        if line.startswith("flags"):
            flags = line
    names = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16")
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "isa": [name for name in names if f" {name}" in flags],
        "python": platform.python_version(),
    }


def commit() -> str:
    """The commit, with "+" where tracked files differ from it."""
    run = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True)
    return run.stdout.strip() or "unknown"
