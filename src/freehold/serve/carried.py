"""Reasoning text inside the opaque fields that clients hand back without reading.

Two APIs have such a field: `signature` of an Anthropic thinking block and `encrypted_content` of an OpenAI
reasoning item. Clients that do not keep the visible reasoning (Messages with `thinking.display: "omitted"`;
Responses with `include: ["reasoning.encrypted_content"]`, whose clients often drop the text) return only that
field. Since the server keeps no state, the text travels in it: compressed and base64, **not encrypted**, and the
prefix says so. Fields that other providers wrote are not ours to read and are dropped by the callers, with a warning.
"""

from __future__ import annotations

import base64
import binascii
import zlib

from freehold.errors import InvalidRequest

PREFIX = "freehold.plain.1:"

# A million tokens of reasoning is some 4 MB; a longer text is not one that this server wrote.
MAX_BYTES = 16 * 2**20


def pack(text: str) -> str:
    """The text as an ASCII string that `unpack` turns back; no secrecy."""
    return PREFIX + base64.urlsafe_b64encode(zlib.compress(text.encode("utf-8"), 6)).decode("ascii")


def unpack(opaque: str, *, param: str) -> str | None:
    """The text that `pack` was given, or None if the string is not one of ours.

    Raises:
        InvalidRequest: it has our prefix but was changed, cut short, or holds more than `MAX_BYTES`.
    """
    if not opaque.startswith(PREFIX):
        return None
    try:
        raw = base64.b64decode(opaque[len(PREFIX) :], altchars=b"-_", validate=True)
        inflate = zlib.decompressobj()
        data = inflate.decompress(raw, MAX_BYTES)
        if not inflate.eof:
            raise ValueError("truncated or too long")
        return data.decode("utf-8")
    except (binascii.Error, zlib.error, ValueError) as error:  # UnicodeDecodeError is a ValueError
        raise InvalidRequest(f"{param} was altered ({error}); send it back exactly as received", param=param) from error
