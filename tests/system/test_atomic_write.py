import contextlib
import errno
import os
import stat

import pytest

from src.system import atomic_write


def test_a_file_is_replaced_whole(tmp_path):
    atomic_write.write_whole(tmp_path / "a", b"one", b"two")
    atomic_write.write_whole(tmp_path / "a", memoryview(b"three"))
    assert (tmp_path / "a").read_bytes() == b"three"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(("number", "is_refused"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_file_system_that_cannot_sync_a_folder_is_no_broken_disk(tmp_path, monkeypatch, number, is_refused):
    fsync = os.fsync

    def answer(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(atomic_write.os, "fsync", answer)
    with pytest.raises(OSError, match="Input/output") if is_refused else contextlib.nullcontext():
        atomic_write.write_whole(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"


def test_where_there_is_no_room_the_old_one_stays_and_nothing_else(tmp_path, monkeypatch):
    atomic_write.write_whole(tmp_path / "a", b"old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic_write.os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as error:
        atomic_write.write_whole(tmp_path / "a", b"new")
    assert error.value.filename == str(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_content_is_on_the_disk_before_the_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace

    def sync(descriptor):
        status = os.fstat(descriptor)
        events.append("folder" if stat.S_ISDIR(status.st_mode) else status.st_size)
        fsync(descriptor)

    monkeypatch.setattr(atomic_write.os, "fsync", sync)
    monkeypatch.setattr(atomic_write.os, "replace", lambda *names: events.append("name") or replace(*names))
    atomic_write.write_whole(tmp_path / "a", b"one", b"two")
    assert events == [6, "name", "folder"]


def test_the_line_names_the_file_or_else_the_folder(tmp_path):
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x/metrics.jsonl")
    assert str(atomic_write.cannot_write(tmp_path, error)).startswith("x/metrics.jsonl: No space left on device; ")
    assert str(atomic_write.cannot_write(tmp_path, OSError("broken"))).startswith(f"{tmp_path}: broken; ")


def test_what_a_link_names_is_not_written_to(tmp_path):
    (tmp_path / "notes").write_text("theirs")
    for name in ("a", "a.tmp"):
        (tmp_path / name).symlink_to("notes")
    atomic_write.write_whole(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert (tmp_path / "notes").read_text() == "theirs"


def test_a_file_that_is_begun_and_not_ended_is_not_there(tmp_path):
    (tmp_path / "a").write_text("old")

    def interrupted():
        with atomic_write.whole(tmp_path / "a") as file:
            file.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (tmp_path / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
