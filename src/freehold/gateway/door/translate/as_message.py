"""A chat completion told as a message: whole, and chunk by chunk."""

from __future__ import annotations

from typing import Any

from freehold.gateway.door.translate.words import TO_STOP_REASON, decode, encode
from freehold.gateway.http.sse import DONE, data_of


def whole_as_message(body: bytes) -> bytes:
    """Raises ValueError: it is no chat completion."""
    answer = decode(body)
    choice = (answer.get("choices") or [{}])[0]
    said = choice.get("message") or {}
    content: list[dict[str, Any]] = []
    if reasoning := said.get("reasoning_content") or said.get("reasoning"):
        content.append({"type": "thinking", "thinking": reasoning, "signature": ""})
    if text := said.get("content") or said.get("refusal"):
        content.append({"type": "text", "text": text})
    for call in said.get("tool_calls") or ():
        function = call["function"]
        given = decode((function.get("arguments") or "{}").encode())
        content.append({"type": "tool_use", "id": call["id"], "name": function["name"], "input": given})
    message = _head(answer) | {"content": content, **_stop(choice), "usage": _usage(answer.get("usage"))}
    return encode(message)


class AsMessageStream:
    """Blocks follow one another: a delta of another kind, or of another call, ends the one before."""

    def __init__(self) -> None:
        self._out: list[bytes] = []
        self._started = False
        self._finished = False
        self._index = -1
        self._open: tuple[str, int] | None = None  # kind, and the call's index
        self._stop: dict[str, Any] = {"stop_reason": "end_turn", "stop_sequence": None}
        self._usage: Any = None

    def feed(self, events: bytes) -> bytes:
        """Raises ValueError: not chunks of a chat."""
        for event in events.split(b"\n\n"):
            data = data_of(event)
            if data == DONE:
                self._finish()
            elif data:
                self._chunk(decode(data))
        return self._take()

    def end(self) -> bytes:
        self._finish()
        return self._take()

    def _take(self) -> bytes:
        out = b"".join(self._out)
        self._out.clear()
        return out

    def _say(self, kind: str, **fields: Any) -> None:
        self._out.append(b"event: %b\ndata: %b\n\n" % (kind.encode(), encode({"type": kind, **fields})))

    def _chunk(self, chunk: dict[str, Any]) -> None:
        if error := chunk.get("error"):
            words = error.get("message") if isinstance(error, dict) else error
            self._say("error", error={"type": "api_error", "message": str(words)})
            self._finished = True
            return
        if not self._started:
            self._started = True
            start = _head(chunk) | {"content": [], "stop_reason": None, "stop_sequence": None}
            self._say("message_start", message=start | {"usage": _usage(chunk.get("usage"))})
        self._usage = chunk.get("usage") or self._usage
        for choice in (chunk.get("choices") or ())[:1]:
            self._delta(choice.get("delta") or {})
            if choice.get("finish_reason"):
                self._stop = _stop(choice)

    def _delta(self, delta: dict[str, Any]) -> None:
        if reasoning := delta.get("reasoning_content") or delta.get("reasoning"):
            self._block(("thinking", 0), {"type": "thinking", "thinking": "", "signature": ""})
            self._say_delta({"type": "thinking_delta", "thinking": reasoning})
        if text := delta.get("content") or delta.get("refusal"):
            self._block(("text", 0), {"type": "text", "text": ""})
            self._say_delta({"type": "text_delta", "text": text})
        for position, call in enumerate(delta.get("tool_calls") or ()):
            function = call.get("function") or {}
            key = ("tool", call.get("index", position))
            start: dict[str, Any] = {
                "type": "tool_use",
                "id": call.get("id") or "",
                "name": function.get("name") or "",
                "input": {},
            }
            self._block(key, start)
            if function.get("arguments"):
                self._say_delta({"type": "input_json_delta", "partial_json": function["arguments"]})

    def _say_delta(self, delta: dict[str, Any]) -> None:
        self._say("content_block_delta", index=self._index, delta=delta)

    def _block(self, key: tuple[str, int], start: dict[str, Any]) -> None:
        if self._open != key:
            self._close()
            self._open = key
            self._index += 1
            self._say("content_block_start", index=self._index, content_block=start)

    def _close(self) -> None:
        if self._open is not None:
            self._say("content_block_stop", index=self._index)
            self._open = None

    def _finish(self) -> None:
        if self._finished or not self._started:
            return
        self._finished = True
        self._close()
        self._say("message_delta", delta=self._stop, usage=_usage(self._usage))
        self._say("message_stop")


def _head(answer: dict[str, Any]) -> dict[str, Any]:
    return {"id": answer.get("id", ""), "type": "message", "role": "assistant", "model": answer.get("model", "")}


def _stop(choice: dict[str, Any]) -> dict[str, Any]:
    """vLLM and SGLang say in `stop_reason` which of the stop strings it was."""
    matched = choice.get("stop_reason")
    if isinstance(matched, str) and choice.get("finish_reason") == "stop":
        return {"stop_reason": "stop_sequence", "stop_sequence": matched}
    return {"stop_reason": TO_STOP_REASON.get(choice.get("finish_reason") or "", "end_turn"), "stop_sequence": None}


def _usage(usage: dict[str, Any] | None) -> dict[str, Any]:
    usage = usage or {}
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return {
        "input_tokens": (usage.get("prompt_tokens") or 0) - cached,
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.get("completion_tokens") or 0,
    }
