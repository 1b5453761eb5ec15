"""Files of a checkpoint: written whole or not at all, and a SHA-256 manifest of them. Torch-free.

The manifest is `SHA256SUMS`, in the format of the `sha256sum` tool, so `sha256sum -c SHA256SUMS` checks it too.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from freehold.errors import CheckpointError, DiskFull

MANIFEST_NAME = "SHA256SUMS"
Progress = Callable[[int, int], None]  # (bytes done, bytes in all)
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")
_READ_BYTES = 1 << 20
_MAX_COPIED_BYTES = 256 << 20
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".tmp")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class HashingFile:
    """A file being written, with the SHA-256 of what went in."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._sha256.update(data)

    @property
    def digest(self) -> str:
        """Hex SHA-256 of everything written so far."""
        return self._sha256.hexdigest()


@contextmanager
def atomic_write(path: Path) -> Iterator[HashingFile]:
    """Write `path` under another name and rename it at the end; after an error nothing is left.

    Raises DiskFull when space or quota runs out, CheckpointError for another I/O error.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            yield HashingFile(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno in _FULL:
            raise DiskFull(f"{path}: no space left on the disk; free some, or choose another directory") from None
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a small file atomically."""
    with atomic_write(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object atomically, indented for reading."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def copy_small_files(source: Path, target: Path, leave: Collection[str]) -> None:
    """Copy tokenizer, template, generation defaults, licence: what lies beside the weights and is not large.

    leave: names of files not to copy.
    """
    for file in sorted(source.iterdir()):
        if file.name in leave or file.name.startswith(".") or file.suffix in _WEIGHT_SUFFIXES:
            continue
        if not file.is_file() or file.stat().st_size > _MAX_COPIED_BYTES:
            continue
        with atomic_write(target / file.name) as copy:
            copy.write(file.read_bytes())


def write_manifest(directory: Path, digests: Mapping[str, str]) -> None:
    """Write SHA256SUMS; digests maps file name to hex SHA-256."""
    write_text(directory / MANIFEST_NAME, "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items())))


def read_manifest(directory: Path) -> dict[str, str]:
    """File name -> hex SHA-256. Raises CheckpointError if there is no manifest or it is damaged."""
    path = directory / MANIFEST_NAME
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: no such file, so there is nothing to verify against "
            f"(`sha256sum *.safetensors > {MANIFEST_NAME}` in a directory you trust makes one)"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    digests: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        match = _LINE.fullmatch(line)
        if match is None or Path(match[2]).name != match[2]:
            raise CheckpointError(f"{path}: line {number} is not '<sha256>  <file beside it>'")
        digests[match[2]] = match[1]
    return digests


def verify_manifest(directory: Path, shards: Iterable[Path], progress: Progress | None = None) -> int:
    """Hash every file the manifest names and compare; every shard must be named. Returns the number of files.

    Raises CheckpointError naming the first file that is missing, unlisted or different.
    """
    digests = read_manifest(directory)
    for shard in shards:
        if shard.name not in digests:
            raise CheckpointError(f"{shard}: not listed in {MANIFEST_NAME}, so it cannot be verified")
    files = [directory / name for name in digests]
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file}: missing, but {MANIFEST_NAME} lists it")
    total, done = sum(file.stat().st_size for file in files), 0
    for file in files:
        sha256 = hashlib.sha256()
        with file.open("rb") as stream:
            while data := stream.read(_READ_BYTES):
                sha256.update(data)
                done += len(data)
                if progress is not None:
                    progress(done, total)
        if sha256.hexdigest() != digests[file.name]:
            raise CheckpointError(f"{file}: its SHA-256 is not that in {MANIFEST_NAME}; it was changed or damaged")
    return len(files)
