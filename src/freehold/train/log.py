"""The log of a run: a CSV line a step, in the file (a kill loses none) before the next step begins. Torch-free.

Columns: step (from 0), tokens (since the start), seconds (of computing, over all sittings), lr_factor, norm (of the
gradients, before clipping), loss, then the loss's parts by name.
"""

from __future__ import annotations

import csv
import errno
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from freehold.errors import CheckpointError, DiskFull
from freehold.model.checkpoint_files import write_text

LOG_NAME = "log.csv"
FIRST_COLUMNS = ("step", "tokens", "seconds", "lr_factor", "norm", "loss")


class Log:
    """Appends lines to `directory`/log.csv. Opening it drops the lines of `step` and later: they will come again."""

    def __init__(self, directory: Path, step: int) -> None:
        self._path = directory / LOG_NAME
        self._file: TextIO | None = None
        self._columns: tuple[str, ...] = ()
        if step and self._path.exists():
            lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines[1:] if line.endswith("\n") and int(line.partition(",")[0]) < step]
            write_text(self._path, "".join([*lines[:1], *kept]))
            self._columns = tuple(lines[0].strip().split(",")) if lines else ()
        else:
            self._path.unlink(missing_ok=True)

    def write(self, row: Mapping[str, float]) -> None:
        """row: a value for each of FIRST_COLUMNS; all others are parts. Raises DiskFull or CheckpointError."""
        if not self._columns:
            self._columns = (*FIRST_COLUMNS, *(name for name in row if name not in FIRST_COLUMNS))
            self._line(self._columns)
        if unknown := row.keys() - set(self._columns):
            raise ValueError(f"{min(unknown)!r} is no column of this log")
        self._line([_shown(row.get(name)) for name in self._columns])

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _line(self, values: tuple[str, ...] | list[str]) -> None:
        try:
            if self._file is None:
                self._file = self._path.open("a", encoding="utf-8")
            self._file.write(",".join(values) + "\n")
            self._file.flush()
        except OSError as error:
            kind = DiskFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else CheckpointError
            raise kind(f"{self._path}: cannot be written: {error.strerror or error}") from None


def read_log(directory: Path) -> dict[str, list[float]]:
    """Column → its values, nan where there is none. Raises CheckpointError if there is no log or no line in it."""
    path = directory / LOG_NAME
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
        columns = list(reader.fieldnames or ())
        if not rows or tuple(columns[: len(FIRST_COLUMNS)]) != FIRST_COLUMNS:
            raise CheckpointError(f"{path}: not the log of a training run, or nothing in it yet")
        return {name: [float(row[name] or "nan") for row in rows] for name in columns}
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None
    except (TypeError, ValueError):
        raise CheckpointError(f"{path}: has a line that is not numbers") from None


def _shown(value: float | None) -> str:
    if value is None or math.isnan(value):
        return ""
    return str(value) if isinstance(value, int) else f"{value:.9g}"
