"""Files that are whole or not there, whatever moment a kill or a power cut comes at."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from src.errors import CannotWrite


def write_whole(path: Path, *parts: bytes | memoryview) -> None:
    """Write the file aside and rename it when it is complete and on the disk.

    Raises:
        OSError: there is no room; what was there before is untouched.
    """
    with whole(path) as file:
        for part in parts:
            file.write(part)


@contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """The same for a file that is written bit by bit: it takes its name at the end, and not after an exception.

    Raises:
        OSError: as `write_whole`.
    """
    aside = path.with_name(f"{path.name}.tmp")
    aside.unlink(missing_ok=True)  # it may be a link, and what that names would be overwritten
    try:
        with aside.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException as error:
        if isinstance(error, OSError):
            error.filename = str(path)  # that of the one aside, or none where the disk is full
        aside.unlink(missing_ok=True)  # what there is of it may be the room that is lacking
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Put a new name on the disk, which syncing the file alone does not; some network file systems have no way to."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


def cannot_write(folder: Path, error: OSError) -> CannotWrite:
    """The line for an error that a disk gave while a run wrote to its folder."""
    where = error.filename or folder
    return CannotWrite(f"{where}: {error.strerror or error}; mend that, and the same command continues")
