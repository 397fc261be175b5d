"""No secret in what is logged: params, tags, messages and files may be read by everybody who sees the results."""

from __future__ import annotations

import os
import re

HIDDEN = "***"
SHORTEST = 6  # of an environment variable's value: shorter ones, such as "1", occur in any text

_USER_INFO = re.compile(r"(?<=://)[^\s/@'\"]*(?::[^\s@'\"]*)?@")  # of a URI; a password may hold an unquoted slash
_PARAMETER = re.compile(r"(?i)\b((?:[\w-]*(?:password|passwd|secret|token)|[\w-]*api[_-]?key)=)[^\s&;,'\"]+")
_NAMES_A_SECRET = re.compile(r"(?i)password|passwd|secret|token|credential|api_?key|access_?key")


def redact(text: str) -> str:
    """The text without user and password in a URI, without ``password=...``, and without any secret of the environment.

    A secret of the environment is the value of a variable whose name says so: ``MLFLOW_TRACKING_PASSWORD``,
    ``AWS_SECRET_ACCESS_KEY``, ``HF_TOKEN``.
    """
    for name, value in os.environ.items():
        if len(value) >= SHORTEST and value in text and _NAMES_A_SECRET.search(name):
            text = text.replace(value, HIDDEN)
    return _PARAMETER.sub(rf"\g<1>{HIDDEN}", _USER_INFO.sub(f"{HIDDEN}@", text))


def one_line(error: BaseException) -> str:
    """What an exception of a library says, without secrets, in a line of reasonable length."""
    return redact((str(error).strip().splitlines() or [type(error).__name__])[0])[:300]
