"""What the tests of the `openai` SDK ask with, and how they read a stream."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from openai.types.chat import ChatCompletionChunk

MODEL = "sim"


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def function(name: str, **properties: Any) -> Any:
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": f"{name}.", "parameters": schema}}


def collect(chunks: Iterable[ChatCompletionChunk], index: int = 0) -> dict[str, Any]:
    """What a client puts together from a stream."""
    message: dict[str, Any] = {"content": "", "reasoning": "", "calls": {}, "finish": None, "roles": 0}
    for chunk in chunks:
        for choice in chunk.choices:
            if choice.index != index:
                continue
            delta, extra = choice.delta, choice.delta.model_extra or {}
            message["roles"] += delta.role is not None
            message["content"] += delta.content or ""
            message["reasoning"] += extra.get("reasoning_content", "")
            assert extra.get("reasoning_content") == extra.get("reasoning")
            for part in delta.tool_calls or ():
                assert part.function is not None
                if part.id is not None:
                    message["calls"][part.index] = {"id": part.id, "name": part.function.name, "arguments": ""}
                message["calls"][part.index]["arguments"] += part.function.arguments or ""
            assert message["finish"] is None, "nothing comes after the finish reason"
            message["finish"] = choice.finish_reason
    return message
