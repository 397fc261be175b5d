"""``metrics.jsonl``: a row for each logged step of a run, in JSON."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict  # typing's own is refused by pydantic before Python 3.12

from src.config.schema import Natural
from src.errors import UsageError
from src.system.redact import one_line
from src.system.regular_file import open_regular

BLOCK_BYTES = 200_000  # that are read at once: some 1,000 rows


class LoggedStep(TypedDict):
    """A line of ``metrics.jsonl``."""

    step: Natural
    time: Natural
    metrics: dict[str, float]


_ROW = TypeAdapter(LoggedStep)


def cut_and_read(path: Path) -> list[LoggedStep]:
    """Remove a last row that a kill cut short, end one that lacks nothing but its newline, and return the rows.

    Raises:
        UsageError: another row is damaged, or the file is no regular one of this folder.
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
    """The complete rows, and how many bytes they are."""
    rows, size = list[LoggedStep](), 0
    for block, content in read_blocks(path):
        rows += block
        size += len(content)
    return rows, size


def read_blocks(path: Path, start: int = 0) -> Iterator[tuple[list[LoggedStep], bytes]]:
    """The complete rows from byte ``start``, a block at a time, their metrics as numbers, and the bytes of the block.

    The last row may lack its newline, which its bytes then have. What is written meanwhile is left for another time.
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
    """The SHA-256 of rows' first ``size`` bytes, or of as many as there are; no file counts as an empty one.

    Raises:
        UsageError: the file is no regular one, or cannot be read.
    """
    digest, left = hashlib.sha256(), size
    if os.path.lexists(path):
        with _opened(path) as file:
            while block := file.read(min(left, BLOCK_BYTES)):
                digest.update(block)
                left -= len(block)
    if left == 1:  # the last row lacks nothing but its newline
        digest.update(b"\n")
    return digest


def begins_with(path: Path, size: int, digest: str) -> bool:
    """Whether rows' first ``size`` bytes have the SHA-256 ``digest``."""
    try:
        return not size or digest_of(path, size).hexdigest() == digest
    except UsageError:
        return False


def encode(metrics: Mapping[str, float]) -> dict[str, float | str]:
    """JSON has no NaN and no infinity: they are written as text, which ``float`` reads back."""
    return {key: value if math.isfinite(value) else str(value) for key, value in metrics.items()}


def reason(error: Exception) -> str:
    """What is wrong in a file, and where in it."""
    if not isinstance(error, ValidationError):
        return one_line(error)
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    return one_line(ValueError(": ".join(filter(None, [".".join(map(str, first["loc"])), first["msg"]]))))
