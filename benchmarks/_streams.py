"""A client of several SSE streams at once that costs next to nothing, as a process of its own. Standard library only.

Reads one line from stdin for each round, `{"host": …, "port": …, "path": …, "bodies": [JSON text, …]}`: sends all of
them at once, each over a connection of its own, and reads until every stream has said `data: [DONE]`. Answers with one
line: `{"seconds": from the first byte sent to the last one read, "events": [of each stream], "tokens": [as its usage
says], "texts": [of each]}`. Answers are parsed after the clock has stopped.
"""

from __future__ import annotations

import json
import re
import selectors
import socket
import sys
import time
from typing import Any

END = b"data: [DONE]"


def stream_all(job: dict[str, Any]) -> dict[str, Any]:
    ready = selectors.DefaultSelector()
    received: list[list[bytes]] = []
    for body in job["bodies"]:
        connection = socket.create_connection((job["host"], job["port"]))
        received.append([])
        ready.register(connection, selectors.EVENT_READ, (len(received) - 1, body.encode()))
    start = time.perf_counter()
    for key in list(ready.get_map().values()):
        _, body = key.data
        head = f"POST {job['path']} HTTP/1.1\r\nhost: {job['host']}\r\ncontent-type: application/json\r\n"
        key.fileobj.sendall(head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body)  # type: ignore[union-attr]
    while ready.get_map():
        for key, _ in ready.select():
            data = key.fileobj.recv(65536)  # type: ignore[union-attr]
            parts = received[key.data[0]]
            parts.append(data)
            if not data or END in data or END in b"".join(parts[-2:]):
                ready.unregister(key.fileobj)
                key.fileobj.close()  # type: ignore[union-attr]
    seconds = time.perf_counter() - start
    streams = [b"".join(parts) for parts in received]
    for stream in streams:
        if not stream.startswith(b"HTTP/1.1 200") or END not in stream:
            raise RuntimeError(f"the server answered {stream[:500]!r}")
    chunks = [
        [json.loads(event) for event in re.findall(rb"^data: (\{.*\})\r?$", stream, re.MULTILINE)] for stream in streams
    ]
    deltas = [[choice["delta"] for chunk in found for choice in chunk["choices"]] for found in chunks]
    texts = ["".join(d.get("reasoning_content") or d.get("content") or "" for d in found) for found in deltas]
    tokens = [found[-1]["usage"]["completion_tokens"] for found in chunks]
    return {"seconds": seconds, "events": [len(found) for found in chunks], "tokens": tokens, "texts": texts}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(stream_all(json.loads(line))), flush=True)
