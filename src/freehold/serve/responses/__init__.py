"""POST /v1/responses: the OpenAI Responses API, without its storage.

`schema` is the wire format in, `translate` turns it into a `Turn`, `writer` turns the turn's events into the response
or its stream. What no setting here can do is in `serve/fields.py`.
"""

from __future__ import annotations

from freehold.serve.responses.endpoint import OPERATIONS, routes

__all__ = ["OPERATIONS", "routes"]
