"""What the HTTP layer knows about the one model it serves. Built once at start; routes only read it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from freehold.errors import NotFound

if TYPE_CHECKING:
    from freehold.engine.async_engine import AsyncEngine
    from freehold.serve.service import ChatService, CompletionService

MAX_BODY_BYTES = 32 * 1024 * 1024  # a million tokens of prompt, as text or as ids, with room to spare


@dataclass(frozen=True, slots=True)
class ServerState:
    """What `app.build_app` and every `routes(state)` take.

    model_names: the name to report first, then aliases; any of them is accepted as `model`.
    api_keys: empty means that no key is asked for (then the server must be bound to loopback).
    loopback: bound to a loopback address; together with no keys it turns on the check of the Host header.
    """

    chat: ChatService
    completion: CompletionService
    model_names: tuple[str, ...]
    api_keys: tuple[str, ...] = ()
    loopback: bool = True
    max_body_bytes: int = MAX_BODY_BYTES
    started: int = field(default_factory=lambda: int(time.time()))  # unix seconds; `created` of the model object

    @property
    def engine(self) -> AsyncEngine:
        return self.chat.engine

    @property
    def model_name(self) -> str:
        return self.model_names[0]

    def resolve_model(self, name: str | None) -> str:
        """The name to answer with: the one that was asked for, or ours when none was. Raises NotFound."""
        if name is None:
            return self.model_name
        if name not in self.model_names:
            served = ", ".join(self.model_names)
            raise NotFound(f"model {name!r} is not served here; this server has: {served}", param="model")
        return name
