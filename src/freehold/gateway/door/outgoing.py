"""What is sent to an upstream: the client's own body with the few fields changed that must be.

The model gets the name it has there. A stream always reports its usage. A limit of output tokens stands in for one the
client did not give, if the alias names one or a budget has reserved no more. An arm or a route may replace the effort.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from freehold.gateway.call import Effort, Endpoint, Request
from freehold.gateway.door.request import Fields, raw_fields

PATHS: Final[Mapping[Endpoint, str]] = {
    "chat": "/chat/completions",
    "completions": "/completions",
    "responses": "/responses",
    "messages": "/messages",
    "embeddings": "/embeddings",
}

CONTINUOUS: Final = "continuous_usage_stats"

_object = msgspec.json.Decoder(dict[str, msgspec.Raw])


def body_for(
    request: Request,
    model_id: str,
    effort: Effort | None,
    limit: int | None,
    engine: str,
    *,
    continuous: bool = False,
) -> bytes:
    """The body for an upstream that speaks the request's own API.

    limit: output tokens, if the request has no limit of its own. engine: its kind, for spellings that differ.
    continuous: whether every chunk shall have the usage so far.
    """
    fields: dict[str, Any] = dict(raw_fields(request.body))
    fields["model"] = model_id
    if request.stream and request.endpoint in ("chat", "completions") and (continuous or not request.include_usage):
        more = {"include_usage": True} | ({CONTINUOUS: True} if continuous else {})
        fields["stream_options"] = _members(fields.get("stream_options")) | more
    if limit is not None and request.max_tokens is None:
        name = limit_field(request.endpoint, engine)
        if name is not None:
            fields[name] = limit
    if effort is not None:
        set_effort(fields, request.endpoint, effort)
    return msgspec.json.encode(fields)


def limit_field(endpoint: Endpoint, engine: str) -> str | None:
    """What the limit of output tokens is called. Engines know `max_tokens`; OpenAI's API wants the newer name."""
    match endpoint:
        case "chat":
            return "max_completion_tokens" if engine == "api" else "max_tokens"
        case "completions" | "messages":
            return "max_tokens"
        case "responses":
            return "max_output_tokens"
    return None


def set_effort(fields: dict[str, Any], endpoint: Endpoint, effort: Effort) -> None:
    """Replace the effort a request asks for, however it was spelled. "": what the model does by itself."""
    if endpoint == "responses":
        fields["reasoning"] = _without(fields.get("reasoning"), "effort") | ({"effort": effort} if effort else {})
    elif endpoint == "messages":
        fields.pop("thinking", None)
        config = _without(fields.pop("output_config", None), "effort")
        if effort == "none":
            fields["thinking"] = {"type": "disabled"}
        elif effort:
            config["effort"] = effort
        if config:
            fields["output_config"] = config
    else:
        fields.pop("reasoning_effort", None)
        if effort:
            fields["reasoning_effort"] = effort


def _members(value: msgspec.Raw | None) -> dict[str, Any]:
    if value is None or bytes(value) == b"null":
        return {}
    members: Fields = _object.decode(value)
    return dict(members)


def _without(value: msgspec.Raw | None, name: str) -> dict[str, Any]:
    members = _members(value)
    members.pop(name, None)
    return members
