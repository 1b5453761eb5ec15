"""Errors and warnings name fields as the API that was asked has them."""

from __future__ import annotations

import pytest

from freehold.errors import InvalidRequest
from freehold.serve.dialect import MESSAGES, RESPONSES


@pytest.mark.parametrize(
    ("chat", "responses", "messages"),
    [
        ("reasoning_effort 'low' is", "reasoning.effort 'low' is", "output_config.effort 'low' is"),
        ("chat_template_kwargs.reasoning_effort", "chat_template_kwargs.reasoning_effort", None),
        ("tools[0].function.parameters", "tools[0].parameters", "tools[0].input_schema"),
        ("response_format.json_schema.schema: x", "text.format.schema: x", "output_config.format.schema: x"),
        ("response_format: x", "text.format: x", "output_config.format: x"),
        (
            "max_tokens (5), not max_tokens_x",
            "max_output_tokens (5), not max_tokens_x",
            "max_tokens (5), not max_tokens_x",
        ),
    ],
)
def test_names(chat: str, responses: str, messages: str | None) -> None:
    assert RESPONSES.say(chat) == responses
    assert messages is None or MESSAGES.say(chat) == messages


def test_an_error_keeps_its_class_and_gets_the_names() -> None:
    with pytest.raises(InvalidRequest) as caught, RESPONSES.errors():
        raise InvalidRequest("response_format is wrong", param="response_format")
    assert (caught.value.message, caught.value.param) == ("text.format is wrong", "text.format")


def test_a_message_without_the_field_gets_it() -> None:
    with pytest.raises(InvalidRequest) as caught, MESSAGES.errors():
        raise InvalidRequest("this schema cannot be enforced", param="response_format")
    assert caught.value.message == "output_config.format: this schema cannot be enforced"
