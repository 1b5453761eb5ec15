"""Decodes requests of types that nobody has used yet, from many threads at once. A program: it must not crash."""

from __future__ import annotations

import sys
import threading
from typing import Any

import msgspec

from freehold.serve.wire import decode

THREADS, TYPES = 8, 150


def new_type() -> type[Any]:
    """A request of structs within structs, unlike any before it."""
    inner: Any = str
    for depth in range(6):
        fields = [(f"f{i}", inner if i == 0 else int, 0) for i in range(4)]
        inner = msgspec.defstruct(f"Level{depth}", fields, forbid_unknown_fields=True)  # type: ignore[arg-type]
    return msgspec.defstruct("Request", [("body", inner | None, None)], forbid_unknown_fields=True)


def main() -> None:
    sys.setswitchinterval(1e-6)
    for _ in range(TYPES):
        type_, barrier = new_type(), threading.Barrier(THREADS)

        def read(type_: type[Any] = type_, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            decode({"body": {"f1": 1, "f2": 2}}, type_, "chat")

        threads = [threading.Thread(target=read) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    print("survived")


if __name__ == "__main__":
    main()
