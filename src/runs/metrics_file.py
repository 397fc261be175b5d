"""Reading and checking ``metrics.jsonl``, in which each line is one row: the metrics of a logged step in JSON."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic refuses typing's own before Python 3.12

from src.config.schema import Natural
from src.errors import UsageError
from src.system.redact import one_line
from src.system.regular_file import open_regular

BLOCK_BYTES = 200_000  # read at once: some 1,000 rows


class LoggedStep(TypedDict):
    """A row of ``metrics.jsonl``."""

    step: Natural
    time: Natural  # in milliseconds since the epoch
    metrics: dict[str, float]


_ROW = TypeAdapter(LoggedStep)


def cut_and_read(path: Path) -> list[LoggedStep]:
    """Remove a last row that a kill cut short, complete one that lacks only its newline, and return the rows.

    The file is created if it is absent.

    Raises:
        UsageError: another row is damaged, or the file is a link or not a regular file.
    """
    if path.is_symlink():
        raise UsageError(f"{path} is a link, and what it names would be written to: put the rows themselves there")
    path.touch()
    rows, end = read_rows(path)
    with path.open("r+b") as file:
        if end:
            file.seek(end - 1)
            file.write(b"\n")
        file.truncate(end)
    return rows


def read_rows(path: Path) -> tuple[list[LoggedStep], int]:
    """Read the complete rows; return them and how many bytes they have, with a newline after the last."""
    rows, size = list[LoggedStep](), 0
    for block, content in read_blocks(path):
        rows += block
        size += len(content)
    return rows, size


def read_blocks(path: Path, start: int = 0) -> Iterator[tuple[list[LoggedStep], bytes]]:
    """Read the complete rows from byte ``start`` on, a block at a time; yield the rows of a block and its bytes.

    If the last row lacks only its newline, the bytes have it. What is appended while this reads is left out.
    """
    with _opened(path) as file:
        left = os.fstat(file.fileno()).st_size - start
        file.seek(start)
        while left > 0 and (lines := file.readlines(min(left, BLOCK_BYTES))):
            left -= sum(map(len, lines))
            if not lines[-1].endswith(b"\n"):
                lines[-1:] = [lines[-1] + b"\n"] if _is_row(lines[-1]) else []
            if lines:
                yield [_ROW.validate_json(line) for line in lines], b"".join(lines)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with open_regular(path) as file:
            yield file
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}): put the run's rows back") from None
    except ValidationError as error:
        raise UsageError(f"{path} holds a damaged row ({reason(error)}): remove it and all rows after it") from None


def _is_row(text: bytes) -> bool:
    try:
        _ROW.validate_json(text)
    except ValidationError:
        return False
    return True


def digest_of(path: Path, size: int) -> hashlib._Hash:
    """The SHA-256 of a metrics file's first ``size`` bytes, or of all if there are fewer; a missing file is empty.

    Raises:
        UsageError: the file is not a regular file, or cannot be read.
    """
    digest, left = hashlib.sha256(), size
    if os.path.lexists(path):
        with _opened(path) as file:
            while block := file.read(min(left, BLOCK_BYTES)):
                digest.update(block)
                left -= len(block)
    if left == 1:  # the last row lacks only its newline
        digest.update(b"\n")
    return digest


def begins_with(path: Path, size: int, digest: str) -> bool:
    """Whether the first ``size`` bytes of a metrics file have the SHA-256 ``digest``, in hexadecimal."""
    try:
        return not size or digest_of(path, size).hexdigest() == digest
    except UsageError:
        return False


def encode(metrics: Mapping[str, float]) -> dict[str, float | str]:
    """Replace NaN and infinity, which JSON does not have, by text that ``float`` reads back."""
    return {key: value if math.isfinite(value) else str(value) for key, value in metrics.items()}


def reason(error: Exception) -> str:
    """Say in one line what is wrong in a file and, for a `ValidationError`, where in it."""
    if not isinstance(error, ValidationError):
        return one_line(error)
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    return one_line(ValueError(": ".join(filter(None, [".".join(map(str, first["loc"])), first["msg"]]))))
