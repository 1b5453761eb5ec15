"""Server-sent events as bytes: whole events out of pieces of any size, and the data of an event."""

from __future__ import annotations

MAX_EVENT_BYTES = 8 << 20  # an event that is longer is no event of a model's stream

DONE = b"[DONE]"


class NotAStream(Exception):
    """What came is no stream of events."""


class Splitter:
    """Cuts what arrives at the ends of events, so that nothing else is ever put into the middle of one."""

    __slots__ = ("_rest", "_searched")

    def __init__(self) -> None:
        self._rest = bytearray()
        self._searched = 0  # so many bytes of it have no end of an event among them

    def feed(self, data: bytes) -> bytes:
        """The whole events that are there now, with their ends (`\\n\\n`); b"" if there are none.

        Raises NotAStream: an event is longer than any should be.
        """
        if not self._rest and data.endswith(b"\n\n") and b"\r" not in data:
            return data  # by far the most: an upstream writes whole events
        has_returns = b"\r" in data or self._rest.endswith(b"\r")
        self._rest += data
        if has_returns:
            held = self._rest.endswith(b"\r")  # its "\n" may be on its way
            self._rest = self._rest.replace(b"\r\n", b"\n")
            self._rest = self._rest[:-1].replace(b"\r", b"\n") + b"\r" if held else self._rest.replace(b"\r", b"\n")
            self._searched = 0
        end = self._rest.rfind(b"\n\n", max(0, self._searched - 1))
        if end < 0:
            self._searched = len(self._rest)
            if self._searched > MAX_EVENT_BYTES:
                raise NotAStream(f"{self._searched} bytes without the end of an event")
            return b""
        whole = bytes(self._rest[: end + 2])
        del self._rest[: end + 2]
        self._searched = len(self._rest)
        return whole

    @property
    def rest(self) -> bytes:
        """What is left when the stream has ended: part of an event."""
        return bytes(self._rest)


def data_of(event: bytes) -> bytes:
    """The data of one event (without its end); b"" for a comment, or an event without data."""
    if event.startswith(b"data: ") and b"\n" not in event:
        return event[6:]
    lines = [line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines)
