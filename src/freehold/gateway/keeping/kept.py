"""What a gateway keeps: its database, and the parts that live on it. Opened before the others, closed after them."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from freehold.gateway.access.admission import Admission, open_admission
from freehold.gateway.access.keys import Keys
from freehold.gateway.config import Settings
from freehold.gateway.keeping.audit import SettingsLog
from freehold.gateway.keeping.erasure import IDENTITY
from freehold.gateway.keeping.store import Store, open_store
from freehold.gateway.keeping.texts import TextKeeper


@dataclass(frozen=True, slots=True)
class Kept:
    """All of it works already: the store is started, keys and budgets are read. identity: what pseudonyms are made
    with, the same for all gateways that share the database."""

    store: Store
    keys: Keys
    admission: Admission
    texts: TextKeeper
    log: SettingsLog
    identity: bytes


async def open_kept(settings: Settings) -> Kept:
    """Open the database of a gateway that serves. Raises ConfigError; then nothing is left open."""
    store = open_store(settings, serving=True)
    keys = Keys(settings)
    texts = TextKeeper(settings, store)
    await store.start()
    try:
        await keys.follow(store)
        admission = await open_admission(store, settings, time.time())
        log = SettingsLog(store)
        log.configure(settings)
        await log.finish()
        return Kept(store, keys, admission, texts, log, await store.secret(IDENTITY))
    except BaseException:
        await store.stop()
        raise


def has_keys(settings: Settings) -> bool:
    """Whether callers must show a key: one is in the settings, or was made by command. Raises ConfigError."""
    if settings.keys:
        return True

    async def look() -> bool:
        store = open_store(settings)
        await store.start()
        try:
            return bool(await store.keys())
        finally:
            await store.stop()

    return asyncio.run(look())
