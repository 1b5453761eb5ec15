"""Files are written whole or not at all; the manifest finds a changed byte."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

from freehold.errors import CheckpointError, DiskFull
from freehold.model.checkpoint_files import (
    MANIFEST_NAME,
    atomic_write,
    read_manifest,
    verify_manifest,
    write_manifest,
    write_text,
)


def test_a_file_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with atomic_write(path) as file:
        file.write(b"one")
        file.write(memoryview(b"two"))
        assert not path.exists()
    assert path.read_bytes() == b"onetwo"
    assert file.digest == hashlib.sha256(b"onetwo").hexdigest()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_write_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a"
    write_text(path, "old")

    def interrupted() -> None:
        with atomic_write(path) as file:
            file.write(b"new")
            raise error

    with pytest.raises(error):
        interrupted()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("size", [3, 1 << 20])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, size: int) -> None:
    (tmp_path / "a.tmp").symlink_to("/dev/full")  # every write to it fails with "no space left"
    with pytest.raises(DiskFull, match="a: no space left on the disk") as caught, atomic_write(tmp_path / "a") as file:
        file.write(bytes(size))
    assert "\n" not in caught.value.message
    assert list(tmp_path.iterdir()) == []


def test_another_failure_is_named_too(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be written: No such file"), atomic_write(tmp_path / "b" / "a"):
        pass


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    (tmp_path / "x.safetensors").write_bytes(b"x" * 3_000_000)
    (tmp_path / "y.safetensors").write_bytes(b"")
    files = sorted(tmp_path.iterdir())
    write_manifest(tmp_path, {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files})
    return tmp_path


def test_the_manifest_is_verified(manifest: Path) -> None:
    seen: list[tuple[int, int]] = []
    files = list(manifest.glob("*.safetensors"))
    assert verify_manifest(manifest, files, lambda done, total: seen.append((done, total))) == 2
    assert seen[-1] == (3_000_000, 3_000_000)
    assert seen == sorted(seen)


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs sha256sum")
def test_sha256sum_reads_it(manifest: Path) -> None:
    assert subprocess.run(["sha256sum", "-c", "--quiet", MANIFEST_NAME], cwd=manifest, check=False).returncode == 0


def test_one_changed_bit_is_found(manifest: Path) -> None:
    data = bytearray((manifest / "x.safetensors").read_bytes())
    data[1_234_567] ^= 1
    (manifest / "x.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: its SHA-256 is not that"):
        verify_manifest(manifest, manifest.glob("*.safetensors"))


def test_missing_and_unlisted_files_are_found(manifest: Path) -> None:
    with pytest.raises(CheckpointError, match=r"z\.safetensors: not listed"):
        verify_manifest(manifest, [manifest / "z.safetensors"])
    (manifest / "y.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"y\.safetensors: missing"):
        verify_manifest(manifest, [])


@pytest.mark.parametrize("line", ["abc  x", "0" * 64 + " x", "0" * 64 + "  ../x", "0" * 64 + "  /etc/passwd"])
def test_a_damaged_manifest_is_found(tmp_path: Path, line: str) -> None:
    with pytest.raises(CheckpointError, match="nothing to verify against"):
        read_manifest(tmp_path)
    (tmp_path / MANIFEST_NAME).write_text("0" * 64 + "  ok\n" + line + "\n")
    with pytest.raises(CheckpointError, match="line 2 is not"):
        read_manifest(tmp_path)
