"""How long does a plan take, and what does it need? Fresh processes of `freehold plan`, wall clock, start included.

    python benchmarks/plan_search.py            # and keep the result
    python benchmarks/plan_search.py --quick

A full search (every layout of both engines on 16 GPUs, with and without drafts, cost, sensitivity, launch) must take
less than 5 s on 2 cores, one plan for one node and one engine less than 1 s. Neither may load torch, or any package
that a plain `pip install freehold` does not bring: what is loaded is compared with the closure of its requirements.
"""

from __future__ import annotations

import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, packages_distributions, requires

from _common import Report, arguments

MODEL = "glm-5.2-fp8"
FULL = ["plan", "--model", MODEL, "--on", "16xh200", "--json"]
SINGLE = ["plan", "--model", MODEL, "--on", "8xh200", "--engine", "sglang", "--json"]

# Runs the command as its entry point does, and says on the last line which modules that loaded.
RUNNER = """
import json, sys
before = set(sys.modules)
from freehold.cli.main import main
code = main(sys.argv[1:])
print(json.dumps(sorted({name.partition(".")[0] for name in set(sys.modules) - before})))
sys.exit(code)
"""


def run(command: list[str]) -> tuple[float, float, list[str]]:
    """Wall seconds, processor seconds, and the top-level modules that the command loaded."""
    environment = os.environ | {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"}
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, *command], capture_output=True, text=True, env=environment, timeout=600
    )
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"freehold {' '.join(command)} failed:\n{done.stderr}")
    answer, _, modules = done.stdout.rstrip().rpartition("\n")
    json.loads(answer)  # a plan, not an excuse
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, processor, json.loads(modules)


def core_packages() -> set[str]:
    """Distributions that a plain installation brings: freehold's requirements without extras, and theirs."""
    found: set[str] = set()
    waiting = ["freehold"]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        try:
            wanted = requires(name) or []
        except PackageNotFoundError:  # for another platform or Python
            continue
        waiting += [
            _plain(re.split(r"[\s<>=!~;\[(]", line, maxsplit=1)[0]) for line in wanted if "extra ==" not in line
        ]
    return found


def foreign(modules: list[str]) -> list[str]:
    """Loaded modules of distributions that a plain installation does not have."""
    core, owners = core_packages(), packages_distributions()
    return [name for name in modules if name in owners and not {_plain(owner) for owner in owners[name]} & core]


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> int:
    options = arguments(__doc__).parse_args()
    report = Report("plan_search", options.quick)
    repeats = 3 if options.quick else 10
    for name, command, limit in (("full search, 16 GPUs", FULL, 5.0), ("single plan, 8 GPUs", SINGLE, 1.0)):
        runs = [run(command) for _ in range(repeats)]
        samples = [seconds for seconds, _, _ in runs]
        modules = runs[0][2]
        print(f"{name}: freehold {' '.join(command)}")
        processor = [seconds for _, seconds, _ in runs]
        print(f"  seconds: {', '.join(f'{seconds:.2f}' for seconds in samples)}")
        print(f"  of a processor: {', '.join(f'{seconds:.2f}' for seconds in processor)}")
        report.samples[name] = {"wall": samples, "processor": processor}
        report.bar(f"{name}: seconds, median of {repeats}", statistics.median(samples), "<", limit)
        report.bar(f"{name}: torch is loaded", float("torch" in modules), "==", 0)
        others = foreign(modules)
        if others:
            print(f"  not of a plain installation: {', '.join(others)}")
        report.bar(f"{name}: packages loaded that a plain installation lacks", len(others), "==", 0)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
