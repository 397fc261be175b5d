"""Errors for users: one line without a traceback, and an exit status that tells the kind of error."""

from __future__ import annotations


class UsageError(ValueError):
    """A user's mistake. Its message is one line that names the key, the value and the remedy.

    The command line prints the line, without a traceback, and exits with status 2.
    """


class RunFailed(Exception):  # noqa: N818
    """A run or a command cannot continue, though the user made no mistake. A run's last good checkpoint stays.

    The command line prints the message, one line, and exits with `status`.
    """

    status = 1


class Diverged(RunFailed):
    """The loss, the gradient, the weights or the features are not finite."""

    status = 65  # sysexits.h's EX_DATAERR: the same command ends in the same way


class Collapsed(RunFailed):
    """The features or embeddings of different images have become alike, and ``on_collapse=stop``."""

    status = 65  # EX_DATAERR, as for `Diverged`


class RankLost(RunFailed):
    """Another process of a run on several devices has ended."""

    status = 69  # sysexits.h's EX_UNAVAILABLE: the same command resumes the run


class CannotWrite(RunFailed):
    """The disk is full, read-only or broken."""

    status = 74  # sysexits.h's EX_IOERR: the same command resumes the run when the disk can be written again
