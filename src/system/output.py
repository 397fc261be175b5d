"""Standard output: whether it is a terminal, and how a process survives the loss of it.

After its reader has gone (``command | head -1``), or on a full disk, everything printed later is dropped.
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
    """The exit status after the loss of output: SIGPIPE's if the reader has gone, else `CannotWrite`'s; 0: no loss."""
    return _lost


def printable(text: str) -> str:
    """Replace each character of a foreign text that a terminal would interpret or that cannot be encoded in a file."""
    return "".join("\N{REPLACEMENT CHARACTER}" if category(each) in ("Cc", "Cf", "Cs") else each for each in text)


def in_terminal() -> bool:
    """Whether standard output is a terminal that can redraw a line, for example for a progress bar."""
    return sys.stdout is not None and sys.stdout.isatty() and os.environ.get("TERM") not in (None, "dumb")


def outlive_output() -> None:
    """Keep the process alive when its output can no longer be written, for instance because the reader has gone.

    In a C program SIGPIPE would end the process. Python ignores that signal, because a broken connection to a server
    raises it too, and instead raises an exception wherever a library happens to print.

    A character that the output's encoding lacks is printed as ``?``.
    """
    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name)
        if stream is not None:  # None if the descriptor was closed before the process started
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
