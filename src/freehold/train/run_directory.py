"""The directory of a run: held by one process at a time, and by one run only, whose settings it records. Torch-free."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from freehold.errors import CheckpointError, InvalidRequest
from freehold.model.checkpoint_files import write_json

RUN_NAME = "run.json"
_LOCK_NAME = ".lock"


def begin(directory: Path, settings: Mapping[str, Any], name: str = RUN_NAME) -> None:
    """Write a file with these settings, or check that the one there has them.

    Raises InvalidRequest naming the first that differs.
    """
    path = directory / name
    wanted = json.loads(json.dumps(settings))
    if not path.exists():
        write_json(path, wanted)
        return
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged: {error}") from None
    differs = first_difference(held, wanted)
    if differs is not None:
        raise InvalidRequest(
            f"{directory} has a run with other settings ({differs}): give those to continue it, or another directory"
        )


def first_difference(held: Any, wanted: Any, name: str = "") -> str | None:
    """Where two values of JSON differ first, in words; None if nowhere."""
    if isinstance(held, dict) and isinstance(wanted, dict):
        for key in sorted(held.keys() | wanted.keys()):
            at = f"{name}.{key}" if name else key
            if key not in held or key not in wanted:
                return f"{at} is {'only there' if key in held else 'not there'}"
            if (found := first_difference(held[key], wanted[key], at)) is not None:
                return found
        return None
    return None if held == wanted else f"{name}: {json.dumps(held)} there, {json.dumps(wanted)} here"


@contextmanager
def run_lock(directory: Path) -> Iterator[None]:
    """Makes the directory; raises InvalidRequest while another process trains in it."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / _LOCK_NAME).open("w")
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be used: {error.strerror or error}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InvalidRequest(f"{directory}: another process trains here") from None
        yield
