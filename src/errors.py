"""The one exception that means: the user asked for something that cannot be done."""


class UsageError(ValueError):
    """A user's mistake. Its message is one line that names the key, the value and the remedy.

    The command line prints the line, without a traceback, and exits with status 2.
    """
