"""How long does a user wait? `freehold --help`, and a server on `small` from its imports to its first generation.

The server is a process of its own, as an operator starts it. It is ready when /ready answers 200, which it does only
after a generation has completed. Imports (torch above all) are timed apart, in another process, and subtracted.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from statistics import median

from _common import Report, arguments

from freehold.model.tiny import make_tiny

FREEHOLD = str(Path(sys.executable).with_name("freehold"))
IMPORTS = "import freehold.cli.serve, freehold.serve.server, freehold.engine.loading, llguidance"


def seconds_of(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def seconds_to_ready(directory: str) -> float:
    """From starting the process to the first 200 of /ready."""
    start = time.perf_counter()
    command = [FREEHOLD, "serve", directory, "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert server.stdout is not None
        for line in server.stdout:
            url = next((word for word in line.split() if word.startswith("http://127.0.0.1:")), None)
            if url is not None:
                break
        else:
            raise RuntimeError("the server ended without an address")
        root = "/".join(url.split("/")[:3])
        while True:
            try:
                with urllib.request.urlopen(root + "/ready", timeout=5) as answer:
                    if answer.status == 200:
                        return time.perf_counter() - start
            except urllib.error.HTTPError:
                time.sleep(0.02)
    finally:
        server.terminate()
        server.wait()


def main() -> int:
    args = arguments(__doc__).parse_args()
    report = Report("startup", args.quick)
    rounds = 3 if args.quick else 7
    seconds_of([FREEHOLD, "--help"])  # compiles the modules
    help_s = [seconds_of([FREEHOLD, "--help"]) for _ in range(rounds)]
    with tempfile.TemporaryDirectory() as directory:
        make_tiny(directory, "small")
        seconds_of([sys.executable, "-c", IMPORTS])
        imports_s = [seconds_of([sys.executable, "-c", IMPORTS]) for _ in range(rounds)]
        ready_s = [seconds_to_ready(directory) for _ in range(rounds)]
    report.samples |= {"help_s": help_s, "imports_s": imports_s, "ready_s": ready_s}
    print(f"imports: {median(imports_s):.2f} s; from command to ready: {median(ready_s):.2f} s")
    report.bar("freehold --help, seconds", median(help_s), "<", 0.3)
    report.bar("server on small ready after imports, seconds", median(ready_s) - median(imports_s), "<", 5)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
