"""``metrics.jsonl``: a row for each logged step of a run, in JSON."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict  # typing's own is refused by pydantic before Python 3.12

from src.config.schema import Natural
from src.errors import UsageError
from src.system.redact import one_line
from src.system.regular_file import open_regular


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
        file.truncate(end)
        file.seek(max(end - 1, 0))
        if file.read() not in (b"", b"\n"):
            file.write(b"\n")
    return rows


def read_rows(path: Path, start: int = 0) -> tuple[list[LoggedStep], int]:
    """The complete rows from byte ``start``, their metrics as numbers, and the byte after the last of them.

    The last row may lack its newline.
    """
    try:
        with open_regular(path) as file:
            file.seek(start)
            data = file.read()
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}): put the run's rows back") from None
    complete = data[: data.rfind(b"\n") + 1]
    if _is_row(data[len(complete) :]):
        complete = data
    try:
        rows = [_ROW.validate_json(line) for line in complete.removesuffix(b"\n").split(b"\n") if complete]
    except ValidationError as error:
        raise UsageError(f"{path} holds a damaged row ({reason(error)}): remove it and all rows after it") from None
    return rows, start + len(complete)


def _is_row(text: bytes) -> bool:
    try:
        _ROW.validate_json(text)
    except ValidationError:
        return False
    return True


def begins_with(path: Path, size: int, digest: str) -> bool:
    """Whether rows' first ``size`` bytes have the SHA-256 ``digest``; no file counts as an empty one."""
    if not path.exists():
        return size == 0
    try:
        with open_regular(path) as file:
            rows = file.read(size)
    except OSError:
        return False
    if len(rows) == size - 1:  # the last row lacks nothing but its newline
        rows += b"\n"
    return hashlib.sha256(rows).hexdigest() == digest


def encode(metrics: Mapping[str, float]) -> dict[str, float | str]:
    """JSON has no NaN and no infinity: they are written as text, which ``float`` reads back."""
    return {key: value if math.isfinite(value) else str(value) for key, value in metrics.items()}


def reason(error: Exception) -> str:
    """What is wrong in a file, and where in it."""
    if not isinstance(error, ValidationError):
        return one_line(error)
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    return one_line(ValueError(": ".join(filter(None, [".".join(map(str, first["loc"])), first["msg"]]))))
