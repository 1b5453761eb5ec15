"""Requests are decoded by any number of threads at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_types_that_many_threads_use_first_do_not_crash_the_process() -> None:
    program = Path(__file__).with_name("racing_decodes.py")
    found = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=120, check=False)
    assert (found.returncode, found.stdout) == (0, "survived\n"), found.stderr
