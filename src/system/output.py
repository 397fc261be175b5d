"""Standard output: whether it is a terminal, and what becomes of it when it takes no more.

After ``command | head -1``, or on a disk that is full, what is printed further is dropped.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from typing import Any
from unicodedata import category

from src.errors import CannotWrite

_lost = 0


def lost_output() -> int:
    """The exit status of a process whose output is lost: as of SIGPIPE where its reader has gone; 0 while none is."""
    return _lost


def printable(text: str) -> str:
    """Text of others with each character that a terminal would obey, or that no file can hold, replaced."""
    return "".join("\N{REPLACEMENT CHARACTER}" if category(each) in ("Cc", "Cf", "Cs") else each for each in text)


def in_terminal() -> bool:
    """Whether a person watches standard output, in a terminal where a line can be drawn again."""
    return sys.stdout is not None and sys.stdout.isatty() and os.environ.get("TERM") not in (None, "dumb")


def outlive_output() -> None:
    """Let the process print on when its output takes no more, for instance because its reader has gone away.

    A character that the output's encoding lacks is printed as ``?``.

    Elsewhere SIGPIPE would end the process. Python ignores that signal, because a broken connection to a server raises
    it too, and makes an exception of it wherever a library happens to print.
    """
    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name)
        if stream is not None:  # it is where the descriptor was closed from the start
            stream.flush()
            raw = io.BufferedWriter(_Output(stream.fileno(), "w", closefd=False))
            errors = "replace" if stream.errors == "strict" else stream.errors
            text = io.TextIOWrapper(raw, stream.encoding, errors, line_buffering=stream.line_buffering)
            setattr(sys, name, text)


class _Output(io.FileIO):
    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            global _lost
            _lost = _lost or (128 + signal.SIGPIPE if isinstance(error, BrokenPipeError) else CannotWrite.status)
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            if not isinstance(error, BrokenPipeError):
                print(f"error: the output cannot be written: {error.strerror}", file=sys.stderr, flush=True)
            return len(data)
