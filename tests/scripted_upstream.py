"""An upstream on a real socket that answers each request as a test tells it to."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

Reply: TypeAlias = Callable[["Asked"], Awaitable[None]]


class Asked:
    """One request: its head as text, its body, and the way back."""

    def __init__(self, head: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        self.head = head
        self.body = body
        self.writer = writer

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self, status: int, body: bytes, *, headers: str = "content-type: application/json\r\n") -> None:
        await self.send(f"HTTP/1.1 {status} X\r\n{headers}content-length: {len(body)}\r\n\r\n".encode() + body)

    async def begin_stream(self) -> None:
        head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        await self.send(head.encode())

    async def chunk(self, data: bytes) -> None:
        await self.send(b"%x\r\n%b\r\n" % (len(data), data))

    async def word(self, text: str, **more: Any) -> None:
        choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
        await self.event({"id": "c", "object": "chat.completion.chunk", "choices": [choice], **more})

    async def event(self, value: Any) -> None:
        await self.chunk(b"data: " + json.dumps(value).encode() + b"\n\n")

    async def end_stream(self, *, prompt: int = 5, completion: int = 2, reason: str = "stop") -> None:
        await self.event({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
        usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        await self.event({"choices": [], "usage": usage})
        await self.chunk(b"data: [DONE]\n\n")
        await self.send(b"0\r\n\r\n")


def completion(text: str = "fine", **message: Any) -> bytes:
    said = {"role": "assistant", "content": text, **message}
    usage = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
    return json.dumps({"choices": [{"index": 0, "message": said, "finish_reason": "stop"}], "usage": usage}).encode()


async def fine(asked: Asked) -> None:
    """Two words, streamed if asked so."""
    if asked.json.get("stream"):
        await asked.begin_stream()
        await asked.word("all")
        await asked.word(" well")
        await asked.end_stream()
    else:
        await asked.answer(200, completion("all well"))


class Scripted:
    """Serves in a thread of its own until `stop`. reply: for each request; change it as you like. asked: all so far."""

    def __init__(self, reply: Reply = fine) -> None:
        self.reply = reply
        self.asked: list[Asked] = []
        self.connections = 0
        self.left = 0  # connections that the other side closed while a reply was being made
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scripted-upstream")
        self._thread.start()
        self._ready.wait(10)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.sleep(0)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                length = int(head.lower().partition("content-length: ")[2].partition("\r\n")[0] or 0)
                asked = Asked(head, await reader.readexactly(length), writer)
                self.asked.append(asked)
                await self.reply(asked)
        except (asyncio.IncompleteReadError, ConnectionError):
            self.left += 1
        except asyncio.CancelledError:
            pass
        finally:
            writer.close()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
