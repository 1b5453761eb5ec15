"""What the faulty upstream does instead of answering, one function a fault."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

from tests.faults import upstream_wire as wire
from tests.faults.upstream_wire import Said, head

if TYPE_CHECKING:
    from tests.faults.upstream import Call, Connection, Script

EVENTS = {"content-type": "text/event-stream; charset=utf-8", "transfer-encoding": "chunked"}


async def misbehave(to: Connection, script: Script, said: Said, call: Call, stream: bool) -> bool:
    """Returns False where the answer follows after all, only later or slower."""
    if script.fault == "slow_headers":
        await asyncio.sleep(script.seconds)
        return False
    if script.fault == "slow_chunks":
        return False
    at_once = {"status": _status, "close": _close, "not_http": _not_http, "redirect": _redirect, "switch": _switch}
    if script.fault in at_once:
        at_once[script.fault](to, script, call)
    elif script.fault in ("drip", "gigantic", "giant_header"):
        await _slow_or_large(to, script, stream)
    elif stream:
        await _in_stream(to, script, said, call)
    else:
        await _in_body(to, script, said, call)
    return True


def _status(to: Connection, script: Script, call: Call) -> None:
    error = {"message": f"the upstream says {script.status}", "type": "upstream_error", "code": None}
    body = script.body.encode() or wire.dumps({"error": error})
    if b"{authorization}" in body:
        body = body.replace(b"{authorization}", call.headers.get("authorization", "").encode())
    to.simple(script.status, body, script.headers)


def _close(to: Connection, script: Script, call: Call) -> None:
    to.transport.close()


def _not_http(to: Connection, script: Script, call: Call) -> None:
    to.transport.write(b"220 mail.example ESMTP\r\n\r\n")
    to.transport.close()


def _redirect(to: Connection, script: Script, call: Call) -> None:
    to.simple(307, b"", {"location": script.body})


def _switch(to: Connection, script: Script, call: Call) -> None:
    to.transport.write(head(101, {"upgrade": "websocket", "connection": "Upgrade"}) + b"\x81\x02hi")


async def _slow_or_large(to: Connection, script: Script, stream: bool) -> None:
    if script.fault == "drip":
        for byte in head(200, {"content-type": "application/json", "content-length": "2"}) + b"{}":
            to.transport.write(bytes((byte,)))
            await asyncio.sleep(script.seconds)
        return
    if script.fault == "giant_header":
        to.transport.write(head(200, {"x-large": "h" * script.size, "content-length": "2"}) + b"{}")
        return
    about = EVENTS if stream else {"content-type": "application/json", "content-length": str(script.size)}
    to.transport.write(head(200, about))
    block, left = b"x" * 65536, script.size
    while left > 0 and not to.transport.is_closing():
        part = block[:left]
        if stream:
            to.chunk(part)
        else:
            to.transport.write(part)
        left -= len(part)
        await to.may_write.wait()
        await asyncio.sleep(0)
    if stream and not to.transport.is_closing():
        to.transport.write(b"0\r\n\r\n")


async def _in_stream(to: Connection, script: Script, said: Said, call: Call) -> None:
    if script.fault == "reset" and not script.after:
        to.reset()
        return
    if script.fault == "garbage":
        to.transport.write(head(200, EVENTS))
        to.chunk(b"\x00\xff{{{ no events at all\n\n")
        to.transport.write(b"0\r\n\r\n")
        return
    await to.stream(script, said, call, stop_after=script.after)
    await asyncio.sleep(0.01)  # what was written goes out first
    if script.fault == "reset":
        to.reset()
    elif script.fault == "cut":
        to.transport.close()
    elif script.fault == "half_closed":
        to.transport.write_eof()
        await asyncio.sleep(script.seconds or 3600)
    elif script.fault == "stall":
        await asyncio.sleep(script.seconds)
        to.transport.close()
    elif script.fault == "eof":
        to.transport.write(b"0\r\n\r\n")
    elif script.fault == "error_event":
        to.chunk(wire.event({"error": {"message": "the engine died", "type": "server_error", "code": 500}}))
        to.transport.write(b"0\r\n\r\n")
    elif script.fault == "garbage_event":
        to.chunk(b'data: {"choices": [{"delta"\n\n')
        to.transport.write(b"0\r\n\r\n")


async def _in_body(to: Connection, script: Script, said: Said, call: Call) -> None:
    body = wire.body(said, call.endpoint)
    about = {"content-type": "application/json", "content-length": str(len(body))}
    if script.fault == "reset":
        if script.after:
            to.transport.write(head(200, about) + body[: len(body) // 2])
            await asyncio.sleep(0.01)
        to.reset()
    elif script.fault in ("garbage", "garbage_event"):
        to.simple(200, b'{"choices": [{"message": {"content": "half a')
    elif script.fault == "eof":
        to.simple(200, body[: len(body) // 2])
    elif script.fault == "error_event":
        to.simple(200, json.dumps({"error": {"message": "the engine died", "code": 500}}).encode())
    else:  # cut, half_closed, stall
        to.transport.write(head(200, about) + body[: len(body) // 2])
        await asyncio.sleep(0.01)
        if script.fault == "half_closed":
            to.transport.write_eof()
            await asyncio.sleep(script.seconds or 3600)
        elif script.fault == "stall":
            await asyncio.sleep(script.seconds)
        to.transport.close()
