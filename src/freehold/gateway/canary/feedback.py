"""`POST /v1/feedback`: what people thought of an answer, as a note on its row.

    {"row_id": "01J...", "value": 0.0 to 1.0, "name": "feedback"}

`row_id` is in the answer's header `x-freehold-row`; `name` is "feedback" if it is left out, and a guardrail of that
name compares the arms by it. Each counts as one request of its key's rate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import msgspec

from freehold.errors import InvalidRequest
from freehold.gateway.parts import Answer, Asked, Routes
from freehold.ledger import Note

Text = Annotated[str, msgspec.Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._:-]+$")]


class Feedback(msgspec.Struct, forbid_unknown_fields=True):
    """The body of the request."""

    row_id: Text
    value: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
    name: Text = "feedback"


def read(body: bytes, at: float, source: str) -> Note:
    """The note in a body. source: who says so. Raises InvalidRequest that names what is wrong."""
    try:
        given = msgspec.json.decode(body, type=Feedback)
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"feedback: {error}") from None
    if given.name.startswith("judge."):
        raise InvalidRequest("feedback: names that begin with judge. are the judge's", param="name")
    return Note(row_id=given.row_id, at=at, name=given.name, value=given.value, source=source)


def routes(note: Callable[[Note], None], clock: Callable[[], float]) -> Routes:
    """The route, for the door. note: is given each note."""

    async def post(asked: Asked) -> Answer:
        caller = asked.caller.key_id if asked.caller is not None else ""
        note(read(asked.body, clock(), f"key:{caller}"))
        return Answer(b'{"ok":true}')

    return {"POST /v1/feedback": post}
