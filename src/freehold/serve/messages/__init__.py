"""POST /v1/messages and /v1/messages/count_tokens: the Anthropic Messages API.

`schema` is the wire format in, `translate` turns it into a `Turn`, `writer` turns the turn's events into the message
or its stream, `errors` has Anthropic's error shape. What no setting here can do is in `serve/fields.py`.
"""

from __future__ import annotations

from freehold.serve.messages.endpoint import OPERATIONS, routes

__all__ = ["OPERATIONS", "routes"]
