"""The native library `_native.so`: finding it, checking that it fits, and the C signatures of `native/api.h`.

Why it cannot be used is kept as one sentence, because whoever runs the slow path should be told.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

VERSION = 5
"""Must equal kInterfaceVersion in native/api.h."""

ISAS = ("avx512bf16", "avx512", "avx2")
"""Instruction sets with kernels, best first."""

_PATH = Path(__file__).with_name("_native.so")

_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_TYPES: dict[str, Any] = {"p": _POINTER, "l": _LONG, "i": _INT, "f": _FLOAT}

# Arguments after the context: p pointer, l int64, i int, f float.
_SIGNATURES = {
    "product": "pli pll p p",
    "swiglu": "p pll p p p",
    "experts": "p pll p p l l l p p",
    "route": "p p p l p l l i f",
    "norm": "p pll l p p f",
    "rope": "p pll l l l l l p p i",
    "write": "plp p pl l l l p p f l l p p i l",
    "read": "p pl p l l l",
    "select": "pl pll pl l l l plp p l l l",
    "attend": "p pll l l pl l l p l l l f i",
    "absorb": "p pll l l l p",
    "unabsorb": "p p l l p",
    "layers": "p p l p",
    "clock": "p",
}

# The one call of every decode step that takes a microsecond keeps the interpreter lock: giving it up and asking for it
# back would cost more. All others let the event loop run meanwhile.
_SHORT = frozenset({"norm"})


class NativeUnavailable(Exception):
    """Why the native kernels cannot be used, in one sentence."""


@cache
def _libraries() -> tuple[ctypes.CDLL, ctypes.PyDLL]:
    if not _PATH.exists():
        raise NativeUnavailable(
            f"{_PATH.name} was not built: there was no C++ compiler when Freehold was installed (install g++ and run "
            "the installation again), or this is not an x86-64 machine"
        )
    try:
        libraries = ctypes.CDLL(str(_PATH)), ctypes.PyDLL(str(_PATH))
    except OSError as error:
        raise NativeUnavailable(f"{_PATH.name} cannot be loaded ({error})") from error
    version = libraries[0].fh_version() if hasattr(libraries[0], "fh_version") else "none"
    if version != VERSION:
        raise NativeUnavailable(f"{_PATH.name} was built from another version of Freehold ({version}, not {VERSION})")
    for library in libraries:
        library.fh_supports.argtypes = [ctypes.c_char_p]
        library.fh_create.argtypes, library.fh_create.restype = [_INT, ctypes.c_char_p], _POINTER
        library.fh_destroy.argtypes, library.fh_destroy.restype = [_POINTER], None
    return libraries


def supported_isas() -> tuple[str, ...]:
    """Instruction sets this machine runs, best first; raises NativeUnavailable without a library."""
    library, _ = _libraries()
    return tuple(isa for isa in ISAS if library.fh_supports(isa.encode()))


class Native:
    """A context of the library: one instruction set, one pool of threads, scratch memory.

    Every entry of `native/api.h` is a method of the same name without `fh_`; it takes addresses and integers, and
    returns 0, 1 when memory ran out, or 2 when a paged expert could not be read. Raises NativeUnavailable.
    """

    def __init__(self, threads: int, isa: str | None = None) -> None:
        supported = supported_isas()
        if not supported:
            raise NativeUnavailable("this processor has neither AVX-512 nor AVX2 with FMA")
        self.isa = isa if isa is not None else supported[0]
        library, holding = _libraries()
        context = library.fh_create(threads, self.isa.encode())
        if not context:
            raise NativeUnavailable(f"this processor does not support {self.isa}")
        self.context: int = context
        finalizer = weakref.finalize(self, library.fh_destroy, context)
        finalizer.atexit = False  # at exit the threads end with the process

        def bind(name: str) -> Callable[..., int]:
            # A function object of its own, because argtypes belong to the object.
            function = (holding if name in _SHORT else library)[f"fh_{name}"]
            function.argtypes = [_POINTER, *(_TYPES[c] for c in _SIGNATURES[name].replace(" ", ""))]
            function.restype = _INT
            return function

        self.product = bind("product")
        self.swiglu = bind("swiglu")
        self.experts = bind("experts")
        self.route = bind("route")
        self.norm = bind("norm")
        self.rope = bind("rope")
        self.write = bind("write")
        self.read = bind("read")
        self.select = bind("select")
        self.attend = bind("attend")
        self.absorb = bind("absorb")
        self.unabsorb = bind("unabsorb")
        self.layers = bind("layers")
        self.clock = bind("clock")


def signatures() -> Sequence[str]:
    """Names of the functions that are bound, for a test that they all exist."""
    return tuple(_SIGNATURES)
