"""Every file below a folder, or the reason why not: nothing that cannot be read goes missing in silence."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from src.errors import UsageError


def files_below(folder: Path, seen: set[str]) -> Iterator[str]:
    """Paths of all files, in an order that does not depend on the file system; hidden ones are left out.

    Args:
        folder: links to folders are followed.
        seen: the real paths of all folders read so far, to which those of this call are added.

    Raises:
        UsageError: a folder cannot be read, or is met twice: a link leads round in a circle, or counts images double.
    """
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=_refuse):
        real = os.path.realpath(parent)
        if real in seen:
            raise UsageError(f"{parent}: links to {real}, which has been read already; remove the link")
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(parent, name) for name in sorted(names) if not name.startswith("."))


def _refuse(error: OSError) -> NoReturn:
    raise UsageError(f"{error.filename}: cannot be read ({error.strerror}); make it readable, or remove it") from error
