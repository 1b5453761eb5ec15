"""New settings without a restart: read, check, prepare, and hand to every part, or keep all of the old ones.

Preparing may take minutes (an engine that is new in the settings must complete a generation first). The old settings
serve meanwhile, and a file that changes again ends it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from freehold.errors import ConfigError, FreeholdError
from freehold.gateway.config import Settings, read
from freehold.gateway.parts import Configured, Prepared
from freehold.gateway.policy import check_addresses

logger = logging.getLogger("freehold.gateway")

LOOK_SECONDS = 1.0  # how often the file is looked at

# What is taken once, at the start: the socket, the files and the keys that belong to them.
FIXED = ("host", "port", "data_dir", "admin_key_env", "admin_key_file")


class Reloader:
    """everyone: takes new settings in this order. notice: tells the operator."""

    def __init__(
        self, path: Path, settings: Settings, everyone: Sequence[Configured], notice: Callable[[str], None]
    ) -> None:
        self.settings = settings
        self._path = path
        self._everyone = everyone
        self._notice = notice
        self._seen = self._stamp()
        self._task: asyncio.Task[None] | None = None

    async def watch(self) -> None:
        """Reload whenever the file changes, until cancelled."""
        try:
            while True:
                await asyncio.sleep(LOOK_SECONDS)
                stamp = self._stamp()
                if stamp is not None and stamp != self._seen:
                    self.reload()
        finally:
            if self._task is not None:
                self._task.cancel()

    def reload(self) -> None:
        """Begin to take the file as it is now. The notice says when that is done, or why the old settings stay."""
        self._seen = self._stamp()
        if self._task is not None:
            self._task.cancel()
        self._task = asyncio.create_task(self._reload(), name="reload")

    @property
    def reloading(self) -> bool:
        """Whether settings are being prepared."""
        return self._task is not None and not self._task.done()

    async def _reload(self) -> None:
        try:
            settings = read(self._path)
            self._check_fixed(settings)
            await asyncio.to_thread(check_addresses, settings)
            for each in self._everyone:
                if isinstance(each, Prepared):
                    await each.prepare(settings)
            self._apply(settings)
        except FreeholdError as error:
            self._notice(f"kept the old settings: {error.message}")
            return
        self.settings = settings
        self._notice(f"new settings: {self._path}")

    def _check_fixed(self, settings: Settings) -> None:
        changed = [name for name in FIXED if getattr(settings.gateway, name) != getattr(self.settings.gateway, name)]
        changed = [f"gateway.{name}" for name in changed] + (["store"] if settings.store != self.settings.store else [])
        if not settings.keys and self.settings.keys:
            changed.append("keys (all are gone, and then anybody could ask)")
        if changed:
            raise ConfigError(f"{self._path}: {', '.join(changed)}: changes only with a restart")

    def _apply(self, settings: Settings) -> None:
        done: list[Configured] = []
        try:
            for each in self._everyone:
                each.configure(settings)
                done.append(each)
        except Exception as error:
            for each in done:
                each.configure(self.settings)
            if isinstance(error, ConfigError):
                raise
            logger.exception("a part could not take new settings")
            raise ConfigError(f"{self._path}: {type(error).__name__}") from None

    def _stamp(self) -> tuple[int, int, int] | None:
        """Of the file as it is now; None: it is not there (an editor may be about to put it back)."""
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino
