"""Keeping what some calls said, if the settings ask for it: a share of the calls, redacted before it is stored.

Off by default. The hook `gateway.redact` names a function `module:function` from text to text, which is given the
request's body and the answer. If it fails, the text is not kept: what may hold a secret is never stored unredacted.
"""

from __future__ import annotations

import importlib
import logging
import random
from collections.abc import Callable

from freehold.errors import ConfigError
from freehold.gateway.call import Decision, Request
from freehold.gateway.config import Settings
from freehold.gateway.keeping.records import Text
from freehold.gateway.keeping.store import Store
from freehold.ledger import Row

Redact = Callable[[str], str]
_log = logging.getLogger(__name__)


class TextKeeper:
    """A sampler that keeps texts in the store. chance: uniform in [0, 1)."""

    def __init__(self, settings: Settings, store: Store, chance: Callable[[], float] = random.random) -> None:
        self._store = store
        self._chance = chance
        self.configure(settings)

    def configure(self, settings: Settings) -> None:
        """Take the share and the hook of new settings. Raises ConfigError, and changes nothing, without the hook."""
        redact = _hook(settings.gateway.redact) if settings.gateway.redact else None
        self._redact = redact
        self._share = settings.gateway.sample_prompts

    def wants(self, request: Request, decision: Decision) -> bool:
        return self._share > 0 and self._chance() < self._share

    def take(self, request: Request, row: Row, answer: str) -> None:
        texts = [request.body.decode("utf-8", "replace"), answer]
        if self._redact is not None:
            try:
                texts = [self._redact(text) for text in texts]
                if not all(isinstance(text, str) for text in texts):
                    raise TypeError("it gave back something else than text")
            except Exception as error:
                # Not the error's own words: they may quote what was to be redacted.
                _log.warning("gateway.redact failed with %s: the text of a call is not kept", type(error).__name__)
                return
        self._store.keep(Text(row.row_id, row.at, texts[0], texts[1]))


def _hook(name: str) -> Redact:
    module, _, function = name.partition(":")
    try:
        hook: Redact = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"gateway.redact: {name!r} is not a function that can be imported: {error}") from None
    if not callable(hook):
        raise ConfigError(f"gateway.redact: {name!r} cannot be called")
    return hook
