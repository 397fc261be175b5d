"""What goes wrong, said to people: one line, no traceback, and an exit status that says which kind it was."""

from __future__ import annotations


class UsageError(ValueError):
    """A user's mistake. Its message is one line that names the key, the value and the remedy.

    The command line prints the line, without a traceback, and exits with status 2.
    """


class RunFailed(Exception):  # noqa: N818
    """A run that cannot go on, through no mistake in the command. Its last good checkpoint stays.

    The command line prints the message, one line, and exits with `status`.
    """

    status = 1


class Diverged(RunFailed):
    """The loss, the gradient or the weights are not finite."""

    status = 65  # sysexits.h's EX_DATAERR: the same command ends the same way


class Collapsed(RunFailed):
    """The features or embeddings of different images have become alike, and ``on_collapse=stop``."""

    status = 65  # as of `Diverged`: the same command ends the same way


class RankLost(RunFailed):
    """Of a run on several devices, another process has ended."""

    status = 69  # sysexits.h's EX_UNAVAILABLE: the same command continues


class CannotWrite(RunFailed):
    """The disk is full, read-only or broken."""

    status = 74  # sysexits.h's EX_IOERR: when there is room, the same command continues
