"""An upstream that fails as told, on real sockets: `python -m tests.faults.upstream [--port N]`. Standard library only.

It prints `http://127.0.0.1:PORT` and serves until it is terminated. `http://127.0.0.1:PORT/NAME/v1` is the base URL of
an OpenAI-compatible API that behaves as the script NAME says; a name without a script answers well. It counts what it
does, token by token, so that what a gateway recorded can be held against it:

    PUT  /control/scripts/NAME   a list of `Script`s; each request is hit by one of them, or by none
    GET  /control/totals         {NAME: {"requests", "whole", "prompt_tokens", "completion_tokens", ...}}
    GET  /control/calls          the last calls, as `Call`s
    GET  /control/sockets        {"open": connections, without the asking one}
    POST /control/reset          forgets counts and scripts

Prompt tokens are a quarter of the body's bytes; an answer has as many tokens as the script says, or `max_tokens` if
that is fewer.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import signal
import socket
import struct
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from tests.faults import upstream_wire as wire
from tests.faults.upstream_faults import misbehave
from tests.faults.upstream_wire import Said, head

# Valid HTTP, but the answer is none. The meter of a gateway has to see these.
CONTENT_FAULTS = ("empty", "looping", "tool_json", "thinking_cut", "refusal")
LOOPING_TOKENS = 256  # where the request sets no limit
FAULTS = (
    "",  # none
    "status",  # answers with `status`, and `body` if given; "{authorization}" in it becomes the header received
    "close",  # closes the connection without a byte
    "reset",  # resets it: before a byte, or in a stream after `after` tokens
    "cut",  # closes it after `after` tokens, in the middle of the chunked body
    "eof",  # ends the body properly after `after` tokens, but without a finish reason or `[DONE]`
    "error_event",  # after `after` tokens, an event with an error, and the end
    "slow_headers",  # nothing for `seconds`, then the answer
    "drip",  # the answer's head, one byte every `seconds`
    "stall",  # `after` tokens, then nothing for `seconds`
    "slow_chunks",  # `seconds` before every chunk
    "garbage",  # a body that is not JSON, or a stream of other things than events
    "garbage_event",  # after `after` tokens, an event whose data is not JSON
    "not_http",
    "half_closed",  # sends half of the body, shuts its side down, and goes on reading
    "gigantic",  # a body of `size` bytes; in a stream: one line of them
    "giant_header",  # a header of `size` bytes
    "redirect",  # 307 to `body`
    "switch",  # answers 101 and then speaks something else
    *CONTENT_FAULTS,
)


@dataclass(frozen=True)
class Script:
    """What happens to a share of the requests. first: only to so many at the beginning."""

    fault: str = ""
    share: float = 1.0
    first: int | None = None
    after: int = 0
    seconds: float = 0.0
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    body: str = ""
    size: int = 64 << 20
    tokens: int = 8
    reasoning: int = 0
    cached: int = 0
    reasoning_field: str = "reasoning_content"
    first_seconds: float = 0.0  # before the first byte of an answer
    chunk_seconds: float = 0.0  # between the tokens of a stream
    stamp: bool = False
    per_chunk: int = 1  # tokens in a chunk, as with speculative decoding
    usage: bool = True  # false: an engine that never says how many tokens

    def __post_init__(self) -> None:
        if self.fault not in FAULTS:
            raise ValueError(f"there is no fault {self.fault!r}")


@dataclass
class Call:
    """completion_tokens: of those generated, as many as were written to the connection. ended: "whole" if all was."""

    name: str
    endpoint: str
    call: str  # metadata.call of the request
    model: str
    prompt_tokens: int
    completion_tokens: int = 0
    fault: str = ""
    ended: str = "running"
    headers: dict[str, str] = field(default_factory=dict)


class Upstream:
    """The state that all connections share."""

    def __init__(self, keep_headers: bool = False, seed: int = 0) -> None:
        self.keep_headers = keep_headers
        self.seed = seed
        self.open: set[Connection] = set()
        self.numbers = itertools.count(1)
        self.reset()

    def reset(self) -> None:
        self.scripts: dict[str, list[Script]] = {}
        self.draws: dict[str, random.Random] = {}
        self.hits: Counter[tuple[str, int]] = Counter()
        self.totals: dict[str, Counter[str]] = {}
        self.calls: deque[Call] = deque(maxlen=200_000)

    def script(self, name: str) -> Script:
        """The one that hits this request. Shares add up; what is left of 1 is answered as the first one, faultless."""
        scripts = self.scripts.get(name)
        if not scripts:
            return Script()
        draw = self.draws.setdefault(name, random.Random(f"{self.seed} {name}")).random()
        for number, script in enumerate(scripts):
            draw -= script.share
            if draw < 0 and (script.first is None or self.hits[name, number] < script.first):
                self.hits[name, number] += 1
                return script
        plain = asdict(scripts[0]) | {"fault": "", "seconds": 0.0}
        return Script(**plain)

    def end(self, call: Call, how: str) -> None:
        if call.ended != "running":
            return
        call.ended = how
        totals = self.totals.setdefault(call.name, Counter())
        totals["requests"] += 1
        totals[how] += 1
        totals["prompt_tokens"] += call.prompt_tokens if how == "whole" else 0
        totals["completion_tokens"] += call.completion_tokens if how == "whole" else 0
        totals["aborted_tokens"] += call.completion_tokens if how != "whole" else 0
        if call.fault:
            totals[f"fault {call.fault}"] += 1

    def control(self, method: str, path: str, body: bytes, asking: Connection) -> Any:
        match method, path.split("/")[2:]:
            case "PUT", ["scripts", name]:
                self.scripts[name] = [Script(**one) for one in json.loads(body)]
                self.hits.clear()
                return {}
            case "POST", ["reset"]:
                self.reset()
                return {}
            case "GET", ["totals"]:
                return self.totals
            case "GET", ["calls"]:
                return [asdict(call) for call in self.calls]
            case "GET", ["sockets"]:
                return {"open": len(self.open) - (asking in self.open)}
        raise KeyError(path)


ENDPOINTS = {
    "chat/completions": "chat",
    "completions": "completions",
    "responses": "responses",
    "messages": "messages",
    "embeddings": "embeddings",
}


class Connection(asyncio.Protocol):
    """One client's connection; its requests are answered one after another."""

    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream
        self.buffer = bytearray()
        self.transport: asyncio.Transport
        self.task: asyncio.Task[None] | None = None
        self.call: Call | None = None
        self.may_write = asyncio.Event()
        self.may_write.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.upstream.open.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.upstream.open.discard(self)
        self.may_write.set()
        if self.task is not None:
            self.task.cancel()
        if self.call is not None:
            self.upstream.end(self.call, "aborted")

    def pause_writing(self) -> None:
        self.may_write.clear()

    def resume_writing(self) -> None:
        self.may_write.set()

    def eof_received(self) -> bool:
        return False

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if self.task is None:
            self.next()

    def next(self) -> None:
        """Answers the next request of the buffer, if it is whole."""
        request = self.take()
        if request is None:
            return
        method, path, headers, body = request
        if path.startswith("/control/"):
            self.control(method, path, body)
            return
        name, _, rest = path.removeprefix("/").partition("/")
        endpoint = ENDPOINTS.get(rest.removeprefix("v1/"))
        if method == "GET" and (path == "/health" or rest in ("health", "v1/health", "v1/models")):
            self.simple(200, wire.dumps({"object": "list", "data": [{"id": name, "object": "model"}]}))
        elif endpoint is None:
            self.simple(404, wire.dumps({"error": {"message": f"nothing at {path}"}}))
        else:
            self.begin(name, endpoint, headers, body)

    def take(self) -> tuple[str, str, dict[str, str], bytes] | None:
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return None
        first, *lines = self.buffer[:end].decode("latin-1").split("\r\n")
        method, path, _ = first.split(" ", 2)
        headers = {key.lower(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        start = end + 4
        if headers.get("transfer-encoding") == "chunked":
            body = bytearray()
            while True:
                line = self.buffer.find(b"\r\n", start)
                if line < 0:
                    return None
                size = int(self.buffer[start:line].split(b";")[0], 16)
                start = line + 2 + size + 2
                if len(self.buffer) < start:
                    return None
                body += self.buffer[line + 2 : start - 2]
                if not size:
                    break
        else:
            size = int(headers.get("content-length", "0"))
            if len(self.buffer) < start + size:
                return None
            body = self.buffer[start : start + size]
            start += size
        del self.buffer[:start]
        return method, path, headers, bytes(body)

    def simple(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        about = {"content-type": "application/json", "content-length": str(len(body))}
        self.transport.write(head(status, about | (headers or {})) + body)

    def control(self, method: str, path: str, body: bytes) -> None:
        try:
            self.simple(200, wire.dumps(self.upstream.control(method, path, body, self)))
        except (KeyError, ValueError, TypeError) as error:
            self.simple(404, wire.dumps({"error": repr(error)}))

    def begin(self, name: str, endpoint: str, headers: dict[str, str], body: bytes) -> None:
        script = self.upstream.script(name)
        try:
            asked = json.loads(body)
        except (ValueError, RecursionError):
            self.simple(400, wire.dumps({"error": {"message": "not JSON"}}))
            return
        limit = asked.get("max_completion_tokens") or asked.get("max_tokens") or asked.get("max_output_tokens")
        tokens = 0 if endpoint == "embeddings" else min(script.tokens, limit or script.tokens)
        if script.fault == "empty":
            tokens = 0
        elif script.fault == "looping":  # it does not end by itself
            tokens = limit or max(tokens, LOOPING_TOKENS)
        reasoning = tokens if script.fault == "thinking_cut" else min(script.reasoning, tokens)
        options = asked.get("stream_options") or {}
        usage = bool(options.get("include_usage")) and script.usage
        said = Said(
            id=f"up-{next(self.upstream.numbers)}",
            model=str(asked.get("model")),
            prompt_tokens=max(1, len(body) // 4),
            tokens=tokens,
            reasoning=reasoning,
            cached=script.cached,
            reasoning_field=script.reasoning_field,
            stamp=script.stamp,
            kind=script.fault if script.fault in CONTENT_FAULTS else "",
            include_usage=usage,
            continuous=usage and bool(options.get("continuous_usage_stats")),
            per_chunk=script.per_chunk,
        )
        label = str((asked.get("metadata") or {}).get("call", ""))
        call = Call(name, endpoint, label, said.model, said.prompt_tokens, fault=script.fault)
        if self.upstream.keep_headers:
            call.headers = headers
        self.call = call
        self.upstream.calls.append(call)
        plain = not script.fault or script.fault in CONTENT_FAULTS
        if plain and not asked.get("stream") and not script.first_seconds:
            self.whole(said, call)  # the hot path of a benchmark: no task
            return
        self.task = asyncio.get_running_loop().create_task(self.answer(script, said, call, bool(asked.get("stream"))))
        self.task.add_done_callback(self.answered)

    def whole(self, said: Said, call: Call) -> None:
        self.simple(200, wire.body(said, call.endpoint))
        call.completion_tokens = said.tokens
        self.upstream.end(call, "whole")

    def answered(self, task: asyncio.Task[None]) -> None:
        if self.call is not None:
            self.upstream.end(self.call, "fault")
        self.task = self.call = None
        if not task.cancelled() and (error := task.exception()):
            raise error
        if not self.transport.is_closing():
            self.next()

    async def answer(self, script: Script, said: Said, call: Call, stream: bool) -> None:
        if script.first_seconds:
            await asyncio.sleep(script.first_seconds)
        if script.fault and script.fault not in CONTENT_FAULTS and await misbehave(self, script, said, call, stream):
            return
        if not stream:
            self.whole(said, call)
            return
        await self.stream(script, said, call)

    async def stream(self, script: Script, said: Said, call: Call, stop_after: int | None = None) -> None:
        """The whole stream, or its first `stop_after` tokens."""
        about = {"content-type": "text/event-stream; charset=utf-8", "transfer-encoding": "chunked"}
        self.transport.write(head(200, about))
        if stop_after == 0:
            return
        for data, tokens in wire.events(said, call.endpoint):
            if self.transport.is_closing():
                self.upstream.end(call, "aborted")
                return
            self.chunk(data)
            call.completion_tokens += tokens
            if stop_after is not None and call.completion_tokens >= stop_after:
                return
            if not self.may_write.is_set():
                await self.may_write.wait()
            pause = script.seconds if script.fault == "slow_chunks" else script.chunk_seconds
            if tokens and pause:
                await asyncio.sleep(pause)
        self.transport.write(b"0\r\n\r\n")
        self.upstream.end(call, "whole")

    def chunk(self, data: bytes) -> None:
        self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    def reset(self) -> None:
        """Closes with a reset instead of an end."""
        sock = self.transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()


@contextlib.contextmanager
def refused() -> Iterator[str]:
    """An address that refuses connections: bound, so that nobody else gets it, but not listening."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"


@contextlib.contextmanager
def unreachable() -> Iterator[str]:
    """An address at which connecting hangs: its queue of connections is full, and nobody takes them."""
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(socket.socket())
        sock.bind(("127.0.0.1", 0))
        sock.listen(0)
        for _ in range(4):
            other = stack.enter_context(socket.socket())
            other.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                other.connect(sock.getsockname())
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"


async def serve(port: int, keep_headers: bool, backlog: int = 4096) -> None:
    upstream = Upstream(keep_headers)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(upstream), "127.0.0.1", port, backlog=backlog)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await stop.wait()
    server.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--keep-headers", action="store_true", help="keep each call's headers")
    args = parser.parse_args()
    asyncio.run(serve(args.port, args.keep_headers))


if __name__ == "__main__":
    main()
