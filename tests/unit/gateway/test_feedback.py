"""What people say of an answer."""

from __future__ import annotations

import pytest

from freehold.errors import InvalidRequest
from freehold.gateway.call import Caller
from freehold.gateway.canary.feedback import read, routes
from freehold.gateway.parts import Asked
from freehold.ledger import Note


async def test_it_becomes_a_note_of_the_callers_key() -> None:
    notes: list[Note] = []
    post = routes(notes.append, lambda: 7.0)["POST /v1/feedback"]
    body = b'{"row_id": "01J", "value": 0.5}'
    answer = await post(Asked("POST", "/v1/feedback", {}, {}, body, caller=Caller(key_id="team-a")))
    assert answer.status == 200
    assert notes == [Note(row_id="01J", at=7.0, name="feedback", value=0.5, source="key:team-a")]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "truncated"),
        (b"[1]", "object"),
        (b'{"row_id": "01J"}', "value"),
        (b'{"row_id": "01J", "value": 2}', "<= 1.0"),
        (b'{"row_id": "01J", "value": -1}', ">= 0.0"),
        (b'{"row_id": "", "value": 1}', "length"),
        (b'{"row_id": "../etc", "value": 1}', "regex"),
        (b'{"row_id": "01J", "value": 1, "text": "bad"}', "text"),
        (b'{"row_id": "01J", "value": 1, "name": "judge.quality"}', "judge"),
    ],
)
def test_what_is_no_feedback_is_refused(body: bytes, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        read(body, 0.0, "")
