"""What is said of errors to people."""


class UsageError(ValueError):
    """A user's mistake. Its message is one line that names the key, the value and the remedy.

    The command line prints the line, without a traceback, and exits with status 2.
    """


def one_line(error: BaseException) -> str:
    """What an exception of a library says, in a line of reasonable length."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
