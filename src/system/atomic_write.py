"""Atomic writes: a file is complete or absent, at whatever moment a kill or a power cut comes."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from src.errors import CannotWrite


def write_whole(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file under a temporary name, and rename it when it is complete and synced to the disk.

    Raises:
        OSError: writing failed, for example because the disk is full; an earlier file at ``path`` is untouched.
    """
    with whole(path) as file:
        for part in parts:
            file.write(part)


@contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file for writing piece by piece; it is renamed to ``path`` if the block ends without exception.

    Raises:
        OSError: as in `write_whole`.
    """
    aside = path.with_name(f"{path.name}.tmp")
    aside.unlink(missing_ok=True)  # if it is a link, writing to it would overwrite the file that it points to
    try:
        with aside.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException as error:
        if isinstance(error, OSError):
            error.filename = str(path)  # instead of the temporary file's name, or of none if the disk is full
        aside.unlink(missing_ok=True)  # gives back its room on a full disk
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Sync a folder, so that a new name in it is on the disk too; some network file systems do not support this."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


def cannot_write(folder: Path, error: OSError) -> CannotWrite:
    """Make the one-line error for a run that cannot write to its folder."""
    where = error.filename or folder
    return CannotWrite(f"{where}: {error.strerror or error}; mend that, and the same command continues")
