"""What the commands that open a gateway's database share: its settings, who acts, and moments on the command line."""

from __future__ import annotations

import asyncio
import getpass
import re
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from freehold.errors import InvalidRequest

if TYPE_CHECKING:
    from freehold.gateway.config import Settings
    from freehold.gateway.keeping.store import Store

T = TypeVar("T")

ConfigOption = Annotated[Path, typer.Option("--config", metavar="FILE", help="The gateway's settings.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
CONFIG = Path("gateway.toml")

_UNITS = {"m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}


def with_store(config: Path, work: Callable[[Store, Settings], Awaitable[T]]) -> T:
    """Open the database that the settings name, do the work, and close it. A gateway may run meanwhile."""
    from freehold.gateway.config import read
    from freehold.gateway.keeping.store import open_store

    settings = read(config)

    async def run() -> T:
        store = open_store(settings)
        await store.start()
        try:
            return await work(store, settings)
        finally:
            await store.stop()

    return asyncio.run(run())


def actor() -> str:
    """Who acts, for the audit log: the user of this process."""
    try:
        return f"command:{getpass.getuser()}"
    except (KeyError, OSError):  # a container whose user has no name
        return "command"


def moment(text: str | None, param: str, now: Callable[[], float] = time.time) -> float | None:
    """Epoch seconds of `30m`, `12h`, `7d`, `2w` (so long ago), or of a UTC date or time: 2026-11-01, 2026-11-01T12:00.

    Raises InvalidRequest.
    """
    if text is None:
        return None
    if found := re.fullmatch(r"(\d+)([mhdw])", text):
        return now() - int(found[1]) * _UNITS[found[2]]
    try:
        read = datetime.fromisoformat(text)
    except ValueError:
        raise InvalidRequest(f"{text!r} is neither like 12h or 7d nor a date like 2026-11-01", param=param) from None
    return (read if read.tzinfo else read.replace(tzinfo=UTC)).timestamp()


def utc(at: float | None) -> str:
    """A moment for people, in UTC."""
    return "" if at is None else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S")
