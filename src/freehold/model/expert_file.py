"""A file of packed routed experts: a record for each, laid out as the kernels want it, read straight into memory.

It is made once from a checkpoint (`packing` what, `paged` how) and named after all it depends on, so that another
checkpoint, another form of the weights or another layout of panels is another file. Writing can stop anywhere and go
on later: a piece counts as written once its checksum is in the table, and the table follows the data to the disk.

Layout: a table of CRC-32 of every piece (0: not written), then the records, each in whole pages so that they can be
read without the page cache. A piece is a gate, up or down matrix: its codes and their scales. Torch-free.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import mmap
import os
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from freehold.errors import CheckpointError, DiskFull
from freehold.model.checkpoint_files import Progress

PAGE = 4096
"""Alignment of direct reads: of offsets, sizes and addresses."""

_ALIGN = 64  # of matrices within a record
_COMMIT = 256 << 20  # bytes between two writes of the table
_PIECES = 3  # gate, up, down


@dataclass(frozen=True, slots=True)
class MatrixBytes:
    """A packed matrix: `panels` panels of so many bytes of codes, and of scales (0: it has none)."""

    panels: int
    codes: int
    scales: int

    @property
    def scales_at(self) -> int:
        """Where the scales begin, counted from the codes."""
        return _aligned(self.panels * self.codes)

    @property
    def size(self) -> int:
        return self.scales_at + _aligned(self.panels * self.scales)


@dataclass(frozen=True, slots=True)
class Layout:
    """Of each layer, how an expert's gate_up (the gate's panels first) and down matrices are held; experts a layer."""

    layers: tuple[tuple[MatrixBytes, MatrixBytes], ...]
    experts: int

    def record_bytes(self, layer: int) -> int:
        """One expert of a layer, in whole pages."""
        gate_up, down = self.layers[layer]
        return _pages(gate_up.size + down.size)

    @property
    def records(self) -> int:
        return len(self.layers) * self.experts

    @property
    def num_bytes(self) -> int:
        """All records."""
        return self.experts * sum(map(self.record_bytes, range(len(self.layers))))

    def matrix_at(self, layer: int, matrix: int) -> int:
        """Where matrix 0 (gate_up) or 1 (down) begins in a record."""
        return self.layers[layer][0].size if matrix else 0


class ExpertFile:
    """Opens or makes `directory/experts-LABEL-DIGEST.bin`. Raises CheckpointError, or DiskFull for want of space.

    depends_on: what the contents follow from, as JSON; its digest is in the name. `write` pieces until `complete`, then
    `finish`; only then `read`. Reads may come from several threads.
    """

    def __init__(self, directory: Path, layout: Layout, label: str, depends_on: Mapping[str, Any]) -> None:
        text = json.dumps([depends_on, [[(m.panels, m.codes, m.scales) for m in pair] for pair in layout.layers],
                           layout.experts], sort_keys=True)  # fmt: skip
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.layout = layout
        self.path = directory / f"experts-{label}-{digest}.bin"
        sizes = [layout.experts * layout.record_bytes(layer) for layer in range(len(layout.layers))]
        self._starts = list(accumulate(sizes, initial=_pages(4 * _PIECES * layout.records)))  # of each layer's records
        self.num_bytes = self._starts[-1]
        self._writer = self._reader = -1
        self._pending = 0
        self._writer, refused = self._open()
        locked = self._lock()
        if os.fstat(self._writer).st_size != self.num_bytes:
            if refused is not None:
                raise self._refusal(refused)
            if not locked:
                raise self._busy()
            self._make()
        table = os.pread(self._writer, 4 * _PIECES * layout.records, 0)
        self._sums = np.frombuffer(table, np.uint32).copy()
        self._new = np.zeros_like(self._sums)  # not yet in the file
        if self.complete:
            self.finish()
        elif refused is not None:
            raise self._refusal(refused)
        elif not locked:
            raise self._busy()

    def _open(self) -> tuple[int, str | None]:
        """A descriptor; and why it is only for reading, if it is: that does for a complete file."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), None
        except OSError as error:
            refused = error.strerror or str(error)
        try:
            return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC), refused
        except OSError:
            raise self._refusal(refused) from None

    def _refusal(self, reason: str) -> CheckpointError:
        self.close()
        return CheckpointError(
            f"{self.path}: the file of packed experts cannot be made ({reason}); name another directory with "
            "--expert-dir"
        )

    def _lock(self) -> bool:
        """Whether nobody else is writing, or looking. Held until `finish` or `close`."""
        try:
            fcntl.flock(self._writer, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def _busy(self) -> CheckpointError:
        self.close()
        return CheckpointError(f"{self.path}: another process is writing it; start again when it is ready")

    def _make(self) -> None:
        """All bytes 0, and the promise that there is room. A file of another size was cut off: it begins anew."""
        try:
            os.ftruncate(self._writer, 0)
            os.posix_fallocate(self._writer, 0, self.num_bytes)
        except OSError as error:
            self.close()
            self.path.unlink(missing_ok=True)
            if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
                raise DiskFull(
                    f"{self.path}: packed experts take {self.num_bytes:,} bytes, and the disk has no room for them; "
                    "free some, or name another directory with --expert-dir"
                ) from None
            raise CheckpointError(f"{self.path}: cannot be written: {error.strerror}") from None

    # -- writing -------------------------------------------------------------------------------------------------------

    def has(self, layer: int, expert: int, matrix: int, first: int) -> bool:
        """Whether the piece that begins at panel `first` of a matrix is written."""
        piece = self._piece(layer, expert, matrix, first)
        return bool(self._sums[piece] or self._new[piece])

    @property
    def complete(self) -> bool:
        return bool(np.all(self._sums | self._new))

    def write(self, layer: int, expert: int, matrix: int, first: int, codes: memoryview, scales: memoryview) -> None:
        """The piece that begins at panel `first` of a matrix, whole."""
        form = self.layout.layers[layer][matrix]
        at = self._record(layer, expert) + self.layout.matrix_at(layer, matrix)
        try:
            _write_all(self._writer, codes, at + first * form.codes)
            _write_all(self._writer, scales, at + form.scales_at + first * form.scales)
            self._new[self._piece(layer, expert, matrix, first)] = _checksum(codes, scales)
            self._pending += len(codes) + len(scales)
            if self._pending >= _COMMIT:
                self._commit()
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be written: {error.strerror}") from None

    def finish(self) -> None:
        """Get everything to the disk, and open the file for reading. Raises CheckpointError if pieces are missing."""
        self._commit()
        if not self.complete:
            raise CheckpointError(f"{self.path}: {int(np.sum(self._sums == 0)):,} pieces are missing")
        fcntl.flock(self._writer, fcntl.LOCK_UN)
        try:
            self._reader = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        except OSError:  # a file system without direct reads; these then go through the page cache
            self._reader = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)

    def _commit(self) -> None:
        if self._new.any():
            os.fdatasync(self._writer)
            self._sums |= self._new
            self._new[:] = 0
            _write_all(self._writer, memoryview(self._sums.tobytes()), 0)
            os.fdatasync(self._writer)
            with suppress(OSError):
                os.posix_fadvise(self._writer, 0, 0, os.POSIX_FADV_DONTNEED)
        self._pending = 0

    # -- reading -------------------------------------------------------------------------------------------------------

    def read(self, layer: int, expert: int, into: memoryview) -> None:
        """An expert's record → `into`, which begins at a page and has the record's bytes. Raises CheckpointError."""
        offset, done = self._record(layer, expert), 0
        try:
            while done < len(into):
                count = os.preadv(self._reader, [into[done:]], offset + done)
                if count <= 0 or (count % PAGE and done + count < len(into)):
                    raise CheckpointError(f"{self.path}: ends within expert {expert} of its layer {layer}")
                done += count
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror}") from None

    def verify(self, progress: Progress | None = None) -> None:
        """Read every record and compare its checksums. Raises CheckpointError."""
        sizes = [self.layout.record_bytes(layer) for layer in range(len(self.layout.layers))]
        room, done = memoryview(mmap.mmap(-1, max(sizes))), 0
        for record in range(self.layout.records):
            layer, expert = divmod(record, self.layout.experts)
            buffer = room[: sizes[layer]]
            self.read(layer, expert, buffer)
            gate_up, _ = self.layout.layers[layer]
            for matrix, first in ((0, 0), (0, gate_up.panels // 2), (1, 0)):
                form, at = self.layout.layers[layer][matrix], self.layout.matrix_at(layer, matrix)
                last = first + (form.panels if matrix else form.panels // 2)
                codes = buffer[at + first * form.codes : at + last * form.codes]
                scales = buffer[at + form.scales_at + first * form.scales : at + form.scales_at + last * form.scales]
                if _checksum(codes, scales) != self._sums[self._piece(layer, expert, matrix, first)]:
                    raise CheckpointError(
                        f"{self.path}: expert {expert} of its layer {layer} is damaged; delete the file, and it is "
                        "made again"
                    )
            done += sizes[layer]
            if progress is not None:
                progress(done, self.layout.num_bytes)

    def close(self) -> None:
        """Idempotent. What is written but not finished is kept as far as the table says."""
        for descriptor in (self._writer, self._reader):
            if descriptor >= 0:
                os.close(descriptor)
        self._writer = self._reader = -1

    def _record(self, layer: int, expert: int) -> int:
        return self._starts[layer] + expert * self.layout.record_bytes(layer)

    def _piece(self, layer: int, expert: int, matrix: int, first: int) -> int:
        return (layer * self.layout.experts + expert) * _PIECES + (2 if matrix else int(first > 0))


def _checksum(codes: memoryview, scales: memoryview) -> int:
    """Never 0, which means that there is none."""
    return zlib.crc32(scales, zlib.crc32(codes)) or 1


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def _pages(size: int) -> int:
    return -(-size // PAGE) * PAGE


def source_files(paths: Sequence[Path]) -> list[tuple[str, int, int]]:
    """What tells one state of a checkpoint's files from another: names, sizes, times of the last change."""
    found = [(path.name, path.stat()) for path in sorted(paths)]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]
