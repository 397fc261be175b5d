"""Standard output: whether it is a terminal, and what becomes of it when its reader has gone away.

After ``command | head -1`` what is printed further is dropped.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Any

_lost_reader = False


def lost_reader() -> bool:
    """Whether something was printed that nobody reads any more."""
    return _lost_reader


def in_terminal() -> bool:
    """Whether a person watches standard output, in a terminal where a line can be drawn again."""
    return sys.stdout is not None and sys.stdout.isatty() and os.environ.get("TERM") not in (None, "dumb")


def outlive_readers() -> None:
    """Lets the process print on when the reader of its output has gone away.

    Elsewhere SIGPIPE would end the process. Python ignores that signal, because a broken connection to a server raises
    it too, and makes an exception of it wherever a library happens to print.
    """
    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name)
        if stream is not None:  # it is where the descriptor was closed from the start
            stream.flush()
            raw = io.BufferedWriter(_Output(stream.fileno(), "w", closefd=False))
            text = io.TextIOWrapper(raw, stream.encoding, stream.errors, line_buffering=stream.line_buffering)
            setattr(sys, name, text)


class _Output(io.FileIO):
    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            global _lost_reader
            _lost_reader = True
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return len(data)
