"""From the bytes of a request to its facts. The body is read only where a fact lies: everything else goes on unseen.

Raises InvalidRequest for what is no request: no JSON object, JSON nested beyond reason, no model, or a field that is
needed here and has the wrong type. What else may be wrong with it, the upstream says.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any, Final

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from freehold.errors import InvalidRequest
from freehold.gateway.call import Caller, Effort, Endpoint, Request
from freehold.gateway.identity import Hasher

MAX_LABEL = 256  # characters of a name that a header or metadata gives; it goes into the ledger

Fields = dict[str, Raw]
_fields = msgspec.json.Decoder(Fields)
_list = msgspec.json.Decoder(list[Raw])


class _Metadata(Struct):
    """The fields of `metadata` that are read; Anthropic has `user_id` there."""

    prompt_name: str | UnsetType = UNSET
    prompt_version: str | int | float | UnsetType = UNSET
    conversation_id: str | UnsetType = UNSET
    user_id: str | UnsetType | None = UNSET


class _StreamOptions(Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class _HasEffort(Struct):
    effort: str | None = None


class _Thinking(Struct):
    type: str = ""


class _Facts(Struct):
    """The top-level fields of all endpoints that are read. `Any` and Raw: looked at by hand, or only hashed."""

    model: str
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None
    n: int | None = None
    best_of: int | None = None
    reasoning_effort: str | None = None
    reasoning: _HasEffort | None = None
    output_config: _HasEffort | None = None
    thinking: _Thinking | None = None
    metadata: _Metadata | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    conversation: Any = None
    messages: list[Raw] | UnsetType = UNSET
    input: Raw | UnsetType = UNSET
    prompt: Raw | UnsetType = UNSET


_facts = msgspec.json.Decoder(_Facts)


class _Role(Struct):
    role: str = ""


_role = msgspec.json.Decoder(_Role)

_EFFORTS: Final[Mapping[str, Effort]] = {
    "none": "none",
    "minimal": "low",
    "low": "low",
    "medium": "medium",
    "high": "high",
    "xhigh": "max",
    "max": "max",
}


class RequestReader:
    """Reads requests. hasher: for users and conversations."""

    def __init__(self, hasher: Hasher) -> None:
        self._hash = hasher

    def read(
        self, endpoint: Endpoint, headers: Mapping[str, str], body: bytes, caller: Caller, request_id: str
    ) -> Request:
        """headers: lower-case names, without credentials. Raises InvalidRequest."""
        facts = _decode(body)
        metadata = facts.metadata or _NO_METADATA
        user = headers.get("x-user-id") or facts.user or facts.safety_identifier or metadata.user_id or ""
        user_hash = self._hash("user", caller.team or caller.key_id, user) if user else ""
        conversation = self._conversation(facts, headers, caller, user)
        return Request(
            request_id=request_id,
            at=time.time(),
            endpoint=endpoint,
            caller=caller,
            alias=facts.model,
            body=body,
            headers=headers,
            stream=bool(facts.stream) and endpoint != "embeddings",
            include_usage=facts.stream_options is not None and bool(facts.stream_options.include_usage),
            continuous_usage=facts.stream_options is not None and bool(facts.stream_options.continuous_usage_stats),
            max_tokens=_max_tokens(facts, endpoint),
            choices=_choices(facts, endpoint),
            effort=_effort(facts),
            prompt_name=_label(headers, "x-prompt-name", metadata.prompt_name),
            prompt_version=_label(headers, "x-prompt-version", metadata.prompt_version),
            task=_label(headers, "x-task", UNSET),
            data_class=_label(headers, "x-data-class", UNSET) or caller.data_class,
            unit=conversation or user_hash or self._hash("key", caller.key_id),
            conversation=conversation,
            user=user_hash,
        )

    def _conversation(self, facts: _Facts, headers: Mapping[str, str], caller: Caller, user: str) -> str:
        """Of the conversation's id where there is one; else of how it opens, which later turns repeat."""
        owner = caller.team or caller.key_id
        named = headers.get("x-conversation-id") or _named_conversation(facts)
        if named:
            return self._hash("conversation", owner, named)
        opening = _opening(facts)
        return self._hash("opening", owner, user, *opening) if opening else ""


_NO_METADATA = _Metadata()


def _decode(body: bytes) -> _Facts:
    try:
        facts = _facts.decode(body)
    except msgspec.ValidationError as error:
        raise InvalidRequest(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None
    if not facts.model:
        raise InvalidRequest("`model` is empty", param="model")
    return facts


def _max_tokens(facts: _Facts, endpoint: Endpoint) -> int | None:
    """By the names that this API knows: a limit under another one is passed over by the upstream."""
    match endpoint:
        case "chat":
            given: tuple[int | None, ...] = (facts.max_completion_tokens, facts.max_tokens)
        case "responses":
            given = (facts.max_output_tokens,)
        case _:
            given = (facts.max_tokens,)
    found = [count for count in given if count is not None]
    if any(count < 0 for count in found):
        raise InvalidRequest("a limit of tokens cannot be negative", param="max_tokens")
    return max(found, default=None)  # which of two the upstream obeys is its own affair: the larger is the safe one


def _choices(facts: _Facts, endpoint: Endpoint) -> int:
    """How many answers are generated. A completion may have many prompts, and more tries than it returns."""
    if endpoint != "completions":
        return max(1, facts.n or 1)
    prompts = 1
    if facts.prompt is not UNSET and bytes(facts.prompt).startswith(b"["):
        # Of texts or of lists of tokens; a list of tokens itself is one prompt.
        prompts = sum(bytes(each)[:1] in b'"[' for each in _list.decode(facts.prompt))
    return max(1, facts.n or 1, facts.best_of or 1) * max(1, prompts)


def _effort(facts: _Facts) -> Effort:
    asked = facts.reasoning_effort
    for nested in (facts.reasoning, facts.output_config):
        asked = asked or (nested.effort if nested is not None else None)
    if asked is None and facts.thinking is not None and facts.thinking.type == "disabled":
        asked = "none"
    return _EFFORTS.get(asked or "", "")


def _named_conversation(facts: _Facts) -> str:
    if facts.metadata is not None and facts.metadata.conversation_id:
        return facts.metadata.conversation_id
    if facts.prompt_cache_key:
        return facts.prompt_cache_key
    match facts.conversation:
        case str(name) | {"id": str(name)}:
            return name
    return ""


def _opening(facts: _Facts) -> list[bytes]:
    """The messages up to and with the user's first, or the whole of an input that is no list of messages."""
    if facts.messages is not UNSET:
        opening: list[bytes] = []
        for message in facts.messages:
            opening.append(bytes(message))
            try:
                if _role.decode(message).role == "user":
                    break
            except msgspec.DecodeError:
                break  # the upstream says what is wrong with it
        return opening
    for text in (facts.input, facts.prompt):
        if text is not UNSET:
            return [bytes(text)]
    return []


def _label(headers: Mapping[str, str], header: str, other: str | float | UnsetType) -> str:
    value = headers.get(header)
    if value is None:
        value = "" if other is UNSET else str(other)
    if len(value) > MAX_LABEL or not value.isprintable():
        raise InvalidRequest(f"{header} must be at most {MAX_LABEL} printable characters", param=header)
    return value


def patch(body: bytes, changes: Mapping[str, Any]) -> bytes:
    """The JSON object with some of its top-level fields replaced, added, or (None) left out; every other byte of a
    value is as it was."""
    fields: dict[str, Any] = dict(_fields.decode(body))
    for name, value in changes.items():
        if value is None:
            fields.pop(name, None)
        else:
            fields[name] = value
    return msgspec.json.encode(fields)


def raw_fields(body: bytes) -> Fields:
    """The top-level fields of a body that `RequestReader.read` has accepted, each as its bytes."""
    return _fields.decode(body)


def for_alias(request: Request, alias: str) -> Request:
    """The same request, as if another model had been asked for."""
    return dataclasses.replace(request, alias=alias)
