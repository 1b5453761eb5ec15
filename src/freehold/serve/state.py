"""What the HTTP layer knows about the one model it serves, and its adapters. Built once; routes only read it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from freehold.errors import ConfigError, InvalidRequest, NotFound
from freehold.serve.access import cache_salt

if TYPE_CHECKING:
    from starlette.requests import Request

    from freehold.engine.async_engine import AsyncEngine
    from freehold.serve.service import ChatService, CompletionService

MAX_BODY_BYTES = 32 * 1024 * 1024  # a million tokens of prompt, as text or as ids, with room to spare


# Keys of generation_config.json that say nothing about sampling, or that the engine has from config.json.
_NOT_SAMPLING = frozenset(
    "bos_token_id eos_token_id pad_token_id decoder_start_token_id max_length max_new_tokens transformers_version "
    "_from_model_config use_cache cache_implementation".split()
)


class SamplingDefaults(msgspec.Struct, frozen=True):
    """What a request gets that leaves a sampling field open."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def from_dir(cls, directory: Path) -> SamplingDefaults:
        """From the checkpoint's `generation_config.json`; the neutral ones if there is none. Raises ConfigError."""
        path = directory / "generation_config.json"
        if not path.exists():
            return cls()
        try:
            found = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
            greedy = found.pop("do_sample", True) is False
            given = {key: value for key, value in found.items() if key not in _NOT_SAMPLING and value is not None}
            for key in given.keys() - set(cls.__struct_fields__):
                raise ConfigError(f"{path}: {key} is not supported; remove it")
            defaults = msgspec.convert(given, cls)
        except ValueError as error:
            raise ConfigError(f"{path}: {error}") from None
        return msgspec.structs.replace(defaults, temperature=0.0) if greedy else defaults


@dataclass(frozen=True, slots=True)
class ServerState:
    """What `app.build_app` and every `routes(state)` take.

    model_names: the name to report first, then aliases; any of them is accepted as `model`, and so is the name of an
        adapter of the engine.
    api_keys: empty means that no key is asked for (then the server must be bound to loopback).
    salt_per_key: each API key has its own part of the prefix cache, whatever `cache_salt` its requests give.
    loopback: bound to a loopback address; together with no keys it turns on the check of the Host header.
    """

    chat: ChatService
    completion: CompletionService
    model_names: tuple[str, ...]
    sampling: SamplingDefaults = SamplingDefaults()  # noqa: RUF009  frozen
    api_keys: tuple[str, ...] = ()
    salt_per_key: bool = False
    loopback: bool = True
    max_body_bytes: int = MAX_BODY_BYTES
    started: int = field(default_factory=lambda: int(time.time()))  # unix seconds; `created` of the model object

    @property
    def engine(self) -> AsyncEngine:
        return self.chat.engine

    def __post_init__(self) -> None:
        for name in self.adapters:
            if name in self.model_names:
                raise InvalidRequest(f"--lora {name}: the model has this name; give the adapter another", param="lora")

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of those that requests may choose."""
        return self.engine.config.adapters

    @property
    def model_name(self) -> str:
        return self.model_names[0]

    def cache_salt(self, request: Request, given: str | None) -> str | None:
        """The prefix cache's salt of a request that gave this one."""
        return cache_salt(request, given, per_key=self.salt_per_key)

    def resolve_model(self, name: str | None) -> str:
        """The name to answer with: the one that was asked for, or ours when none was. Raises NotFound."""
        if name is None:
            return self.model_name
        if name not in self.model_names and name not in self.adapters:
            served = ", ".join((*self.model_names, *self.adapters))
            raise NotFound(f"model {name!r} is not served here; this server has: {served}", param="model")
        return name

    def adapter(self, name: str) -> str | None:
        """The adapter that answers to a resolved name; None: the model as it is."""
        return name if name in self.adapters else None
