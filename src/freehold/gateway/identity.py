"""Who is behind a request, without saying who: keyed hashes of users and conversations, and ids that sort by time.

The key of the hashes is a file of its own in the data directory. Without it a hash in the ledger leads back to nobody,
so that deleting the file erases every user and conversation from all rows at once.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections import deque
from pathlib import Path

from freehold.errors import ConfigError

KEY_FILE = "identity.key"
_KEY_BYTES = 32
_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"  # Crockford's base 32, as ULIDs have it
_PAIRS = [first + second for first in _ALPHABET for second in _ALPHABET]
_SHIFTS = range(120, -1, -10)
_DRAWN = 256  # random parts of ids at once: the kernel's answer costs more than an id
_random_parts: deque[bytes] = deque()
os.register_at_fork(after_in_child=_random_parts.clear)


class Hasher:
    """Keyed BLAKE2b: 128 bits in hex, the same for the same value and key on every machine."""

    def __init__(self, key: bytes) -> None:
        self._keyed = hashlib.blake2b(key=key, digest_size=16)

    def __call__(self, kind: str, *parts: str | bytes) -> str:
        """kind keeps a user's hash apart from that of a conversation of the same name."""
        digest = self._keyed.copy()
        digest.update(kind.encode())
        for part in parts:
            data = part.encode() if isinstance(part, str) else part
            digest.update(b"\0%d\0" % len(data))  # lengths, so that ("ab", "c") is not ("a", "bc")
            digest.update(data)
        return digest.hexdigest()


def read_or_make_key(data_dir: Path) -> bytes:
    """The key of the data directory; made, with mode 0600, where there is none. Raises ConfigError: unusable."""
    path = data_dir / KEY_FILE
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            key = path.read_bytes()
        else:
            key = secrets.token_bytes(_KEY_BYTES)
            with os.fdopen(handle, "wb") as file:
                file.write(key)
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    if len(key) != _KEY_BYTES:
        raise ConfigError(
            f"{path}: {len(key)} bytes, not {_KEY_BYTES}; it is damaged. Another key would give every user another hash"
        )
    return key


def new_id() -> str:
    """26 characters: 48 bits of milliseconds since the epoch and 80 random bits, a ULID. Sorts by time."""
    while True:
        try:
            part = _random_parts.pop()  # atomic: threads never get the same one
            break
        except IndexError:
            drawn = os.urandom(10 * _DRAWN)
            _random_parts.extend(drawn[at : at + 10] for at in range(0, len(drawn), 10))
    number = (time.time_ns() // 1_000_000) << 80 | int.from_bytes(part)
    return "".join([_PAIRS[number >> shift & 1023] for shift in _SHIFTS])
