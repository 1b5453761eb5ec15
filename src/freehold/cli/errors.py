"""From an exception to one line on stderr and an exit code: what every command shares.

Exit codes: 0 done; those of `freehold.errors` (its docstring has the table); 2 also for a wrong command line; 130 on
Ctrl-C; 1 for anything unforeseen. `--debug` or FREEHOLD_DEBUG=1 adds the traceback.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable, Mapping

from freehold.errors import DiskFull, FreeholdError, MissingExtra

EXTRA_OF: Mapping[str, str] = {
    "torch": "engine",
    "safetensors": "engine",
    "llguidance": "engine",
    "transformers": "oracle",
    "matplotlib": "train",
    "asyncpg": "postgres",
    "duckdb": "parquet",
}
"""The extra of this package that brings a top-level module."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def run(command: Callable[[], None], *, debug: bool = False) -> int:
    """Call `command`; print what went wrong in one line; return the exit code. Raises nothing."""
    try:
        command()
        sys.stdout.flush()
    except SystemExit as exit_:  # typer leaves this way, after its own message for a wrong command line
        return _flush_at_exit(exit_)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return _quiet_broken_pipe()
    except Exception as error:
        if debug or os.environ.get("FREEHOLD_DEBUG", "") not in ("", "0"):
            traceback.print_exc()
        line, code = describe(error)
        print(f"error: {line}", file=sys.stderr)
        return code
    return 0


def describe(error: Exception) -> tuple[str, int]:
    """The one line that tells a person the cause and the cure, and the exit code."""
    error = missing_extra(error) or error
    if isinstance(error, FreeholdError):
        return _one_line(error.message), error.exit_code
    if isinstance(error, OSError) and error.strerror is not None:
        where = f": {os.fsdecode(error.filename)}" if isinstance(error.filename, str | bytes) else ""
        return f"{error.strerror}{where}", DiskFull.exit_code if error.errno in _FULL else 1
    text = _one_line(str(error))
    kind = type(error).__name__
    return f"unexpected {kind}{': ' if text else ''}{text} (a defect; FREEHOLD_DEBUG=1 shows the traceback)", 1


def missing_extra(error: Exception) -> MissingExtra | None:
    """The `MissingExtra` that a failed import means, or None if the error is something else."""
    if not isinstance(error, ModuleNotFoundError) or error.name is None:
        return None
    module = error.name.partition(".")[0]
    extra = EXTRA_OF.get(module)
    if extra is None:
        return None
    return MissingExtra(f"this needs {module}, which is not installed: pip install 'freehold[{extra}]'")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _flush_at_exit(exit_: SystemExit) -> int:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return _quiet_broken_pipe()
    return exit_.code if isinstance(exit_.code, int) else (0 if exit_.code is None else 1)


def _quiet_broken_pipe() -> int:
    # Python flushes stdout once more at exit: point it at nothing so that it cannot complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
