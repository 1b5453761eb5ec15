"""Errors and warnings in the words of the API that was asked.

`ChatService` and the engine name fields as /v1/chat/completions has them. Another API wraps its calls in
`Dialect.errors` and its warnings in `Dialect.say`, so that a caller is told about fields that it can find.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from freehold.errors import FreeholdError


class Dialect:
    """names: what chat calls it → what this API calls it. Longer names win; no name is found inside a longer path."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self._names = dict(names)
        ordered = sorted(names, key=len, reverse=True)
        # A name that begins with "." stands at the end of a path; any other begins one.
        spelled = (re.escape(name) if name.startswith(".") else rf"(?<![\w.]){re.escape(name)}" for name in ordered)
        self._pattern = re.compile(rf"(?:{'|'.join(spelled)})(?!\w)")

    def say(self, text: str) -> str:
        """The text with this API's names."""
        return self._pattern.sub(lambda match: self._names[match[0]], text)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Errors raised on purpose inside get this API's names, in their `param` and in a message that has it."""
        try:
            yield
        except FreeholdError as error:
            error.message = self.say(error.message)
            if error.param is not None:
                error.param = self.say(error.param)
                if error.param not in error.message:  # not every API has a place for `param`
                    error.message = f"{error.param}: {error.message}"
            raise


RESPONSES = Dialect(
    {
        ".function.name": ".name",
        ".function.parameters": ".parameters",
        "max_tokens": "max_output_tokens",
        "messages": "input",
        "reasoning_effort": "reasoning.effort",
        "response_format": "text.format",
        "response_format.json_schema.schema": "text.format.schema",
        "tools.function.strict": "tools[].strict",
    }
)

MESSAGES = Dialect(
    {
        ".function.name": ".name",
        ".function.parameters": ".input_schema",
        "chat_template_kwargs.clear_thinking": "context_management.edits",
        "chat_template_kwargs.enable_thinking false": "thinking disabled",
        "reasoning_effort": "output_config.effort",
        "response_format": "output_config.format",
        "response_format.json_schema.schema": "output_config.format.schema",
        "tool_choice 'none' or 'required'": "tool_choice none or any",
        "tool_choice 'required' or a named tool": "tool_choice any or tool",
        "tools.function.strict": "tools[].strict",
    }
)
