"""The file of packed experts: what is written is read, an interrupted one goes on, a damaged one is noticed."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path
from typing import Any

import pytest

from freehold.errors import CheckpointError, DiskFull
from freehold.model.expert_file import PAGE, ExpertFile, Layout, MatrixBytes, source_files

LAYOUT = Layout(
    (
        (MatrixBytes(4, 100, 8), MatrixBytes(3, 50, 4)),
        (MatrixBytes(4, 3000, 0), MatrixBytes(3, 1000, 0)),  # another form, of more than one page
    ),
    experts=3,
)
PIECES = [
    (layer, expert, matrix, first)
    for layer in range(2) for expert in range(3) for matrix, first in ((0, 0), (0, 2), (1, 0))
]  # fmt: skip


def opened(directory: Path, **depends_on: Any) -> ExpertFile:
    return ExpertFile(directory, LAYOUT, "int4", depends_on)


def content(layer: int, expert: int, matrix: int, first: int) -> tuple[bytes, bytes]:
    form = LAYOUT.layers[layer][matrix]
    panels = form.panels if matrix else form.panels // 2
    fill = bytes([1 + layer * 50 + expert * 10 + matrix * 3 + first])
    return fill * (panels * form.codes), b"s" * (panels * form.scales)


def write(file: ExpertFile, *piece: int) -> None:
    codes, scales = content(*piece)
    file.write(*piece, memoryview(codes), memoryview(scales))


def record(file: ExpertFile, layer: int, expert: int) -> bytes:
    buffer = mmap.mmap(-1, LAYOUT.record_bytes(layer))
    file.read(layer, expert, memoryview(buffer))
    return buffer[:]


@pytest.fixture
def complete(tmp_path: Path) -> ExpertFile:
    file = opened(tmp_path)
    for piece in reversed(PIECES):
        write(file, *piece)
    file.finish()
    return file


def test_pieces_come_back_where_the_layout_says(complete: ExpertFile) -> None:
    assert [LAYOUT.record_bytes(layer) for layer in (0, 1)] == [PAGE, 4 * PAGE]
    for layer, expert, matrix, first in PIECES:
        form, at = LAYOUT.layers[layer][matrix], LAYOUT.matrix_at(layer, matrix)
        codes, scales = content(layer, expert, matrix, first)
        found = record(complete, layer, expert)
        assert found[at + first * form.codes :][: len(codes)] == codes
        assert found[at + form.scales_at + first * form.scales :][: len(scales)] == scales
    complete.verify()


def test_writing_goes_on_where_it_stopped(tmp_path: Path) -> None:
    file = opened(tmp_path)
    for piece in PIECES[:7]:
        write(file, *piece)
    file._commit()
    write(file, *PIECES[7])  # not committed: lost with the process, so it is not taken as written
    assert file.has(*PIECES[7])
    with pytest.raises(CheckpointError, match="10 pieces are missing"):
        file.finish()
    file._sums[:] = 0
    file.close()

    again = opened(tmp_path)
    assert [again.has(*piece) for piece in PIECES] == [True] * 8 + [False] * 10
    for piece in PIECES[8:]:
        write(again, *piece)
    again.finish()
    again.verify()
    again.close()
    third = opened(tmp_path)
    assert third.complete
    third.verify()
    third.close()


def test_what_was_not_committed_is_written_again(tmp_path: Path) -> None:
    file = opened(tmp_path)
    for piece in PIECES:
        write(file, *piece)
    file.close()  # as a killed process leaves it: data perhaps, but no table
    again = opened(tmp_path)
    assert not any(again.has(*piece) for piece in PIECES)
    again.close()


def test_a_damaged_record_is_found_when_it_is_asked_for(complete: ExpertFile) -> None:
    with complete.path.open("r+b") as file:
        file.seek(-PAGE, os.SEEK_END)  # in the last expert's last matrix
        file.write(b"\xff")
    complete.close()
    again = opened(complete.path.parent)
    with pytest.raises(CheckpointError, match="expert 2 of its layer 1 is damaged; delete the file"):
        again.verify()
    again.close()


def test_a_file_that_became_shorter_is_an_error(complete: ExpertFile) -> None:
    os.truncate(complete.path, complete.num_bytes - 2 * PAGE)
    with pytest.raises(CheckpointError, match="ends within expert 2 of its layer 1"):
        record(complete, 1, 2)
    assert record(complete, 0, 0)
    complete.close()


def test_a_file_that_was_cut_off_begins_anew(complete: ExpertFile) -> None:
    complete.close()
    os.truncate(complete.path, complete.num_bytes - PAGE)
    again = opened(complete.path.parent)
    assert not any(again.has(*piece) for piece in PIECES)
    again.close()


def test_a_change_of_anything_it_depends_on_is_another_file(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"one")
    names = set()
    first = source_files([weights])
    os.utime(weights, ns=(5, 5))
    for depends_on in ({}, {"files": first}, {"files": source_files([weights])}, {"packing": "x"}):
        file = opened(tmp_path, **depends_on)
        names.add(file.path.name)
        file.close()
    other = ExpertFile(tmp_path, Layout(LAYOUT.layers, 4), "int4", {})
    names.add(other.path.name)
    other.close()
    assert len(names) == 5


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    file = opened(tmp_path)
    with pytest.raises(CheckpointError, match="another process is writing it"):
        opened(tmp_path)
    file.close()
    file = opened(tmp_path)
    for piece in PIECES:
        write(file, *piece)
    file.finish()
    others = [opened(tmp_path), opened(tmp_path)]  # to read, any number
    for each in (file, *others):
        assert record(each, 1, 2)
        each.close()


def test_no_room_and_no_permission_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(DiskFull, match="--expert-dir"):
            opened(tmp_path / "full")
    assert list((tmp_path / "full").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="name another directory with --expert-dir"):
        opened(tmp_path / "file" / "below")


def test_a_complete_file_on_a_read_only_disk_is_read(complete: ExpertFile, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, open_file = complete.path.parent, os.open
    complete.close()

    def read_only(path: Any, flags: int, *mode: int) -> int:
        if flags & (os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, "Read-only file system")
        return open_file(path, flags, *mode)

    monkeypatch.setattr(os, "open", read_only)
    file = opened(directory)
    assert record(file, 1, 2)[:10] == content(1, 2, 0, 0)[0][:10]
    file.close()
    with pytest.raises(CheckpointError, match=r"cannot be made \(Read-only file system\).*--expert-dir"):
        opened(directory, another="checkpoint")
    with complete.path.open("r+b") as table:
        table.write(bytes(4))  # a piece that is not written
    with pytest.raises(CheckpointError, match=r"cannot be made \(Read-only file system\)"):
        opened(directory)
    os.truncate(complete.path, PAGE)
    with pytest.raises(CheckpointError, match=r"cannot be made \(Read-only file system\)"):
        opened(directory)
