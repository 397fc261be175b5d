"""Removal of secrets from what is logged, because everybody who sees the results can read params, tags and messages.

Messages lose every secret value that the environment holds (`redact`). Settings lose only what looks like a secret by
its name or form (`hide_in_settings`): a password that happens to be ``cifar100`` must not rewrite a data set's name.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any
from urllib.parse import quote, quote_plus, unquote

HIDDEN = "***"
SHORTEST = 6  # characters; shorter values, such as "true", occur everywhere and are not searched for in texts
LONGEST_USER_INFO = 300  # characters up to which a URI's user and password may contain blanks

_WORDS = {"password", "passwd", "passphrase", "pass", "pwd", "pw", "secret", "secrets", "token", "pat", "apikey"}
_WORDS |= {"credential", "credentials", "auth", "dsn", "jwt"}
_PAIRS = {("api", "key"), ("access", "key"), ("account", "key"), ("private", "key"), ("secret", "key")}
_PAIRS |= {("shared", "key"), ("signing", "key"), ("encryption", "key"), ("connection", "string"), ("conn", "str")}
_PAIRS |= {("database", "url"), ("database", "uri"), ("db", "url"), ("db", "uri"), ("webhook", "url")}
# Last words of names that say where a secret is or describe it, and so do not name the secret itself.
_PLACES = {"file", "path", "dir", "folder", "home", "sock", "length", "timeout", "limit", "expiry"}
_NOT_SECRET = {"PWD", "OLDPWD"}  # the shell's present and previous working directory
_PARAMETER = re.compile(
    r"""(?ix)
    (?P<key> password | passwd | passphrase | secret | token | api[_-]?key | access[_-]?key(?:[_-]?id)?
      | account[_-]?key | private[_-]?key | secret[_-]?key | shared[_-]?key | signature | credentials?
      | (?<![a-z])(?:pass|pwd|pw|pat|sig|auth|jwt) | (?-i:(?<=[a-z])(?:Pass|Pwd|Sig)) )
    (?P<is> ["']? [ ]{0,4} (?: = | : | %3D | %3A ) [ ]{0,4} )
    (?P<value> "(?:[^"\\]|\\.)+" | '(?:[^'\\]|\\.)+' | [^\s&;,)\]}"'][^\s&;,)\]}"']* (?:['"][^\s&;,)\]}"']+)* )
    """
)
_SCHEME = re.compile(r"(?i)\b(bearer|authorization[\"']?\s?[:=]\s?[\"']?(?:basic|token|digest)) {1,4}[^\s,;\"']+")
_NUMBER = re.compile(r"[-+]?[\d_.,]+(e[-+]?\d+)?", re.IGNORECASE)
_WITH_NUMBERS = re.compile(r"(?i)(pass|pwd|pw|passw(or)?d|secret)$")  # keys whose secret value may be a number


def redact(text: str) -> str:
    """Hide in a message the secrets of the environment, and whatever looks like a secret by its form."""
    for secret in _known():
        text = text.replace(secret, HIDDEN)
    return _hide(text)


def hide_in_settings(settings: Any, key: str = "") -> Any:
    """Hide in settings, nested or flat, what looks like a secret by its form or its key; numbers stay as they are."""
    if isinstance(settings, Mapping):
        return {name: hide_in_settings(value, str(name)) for name, value in settings.items()}
    if isinstance(settings, list):
        return [hide_in_settings(value, key) for value in settings]
    if not isinstance(settings, str) or _NUMBER.fullmatch(settings):
        return settings
    return HIDDEN if settings and names_a_secret(key.rpartition(".")[2]) else _hide(settings)


def names_a_secret(name: str) -> bool:
    """Whether the name of a variable or a setting says that it is secret: ``HF_TOKEN``, but not ``MAX_TOKENS``."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower().replace("-", "_").split("_")
    if words[-1] in _PLACES:
        return False
    return bool(_WORDS & set(words)) or any(pair in _PAIRS for pair in pairwise(words))


def named_secret_in(text: str) -> str | None:
    """The name of an environment variable whose secret value the text contains; None if it contains none."""
    for name, value in _secret_variables():
        is_word = value.isalpha() or _NUMBER.fullmatch(value)
        if value in text and len(value) >= (2 * SHORTEST if is_word else SHORTEST):
            return name
    return None


def one_line(error: BaseException) -> str:
    """The first telling line of an exception's message, without secrets, cut to 300 characters."""
    lines = redact(str(error)).strip().splitlines()
    said = [line for line in lines if not line.startswith("(raised as a result of")]  # SQLAlchemy puts it first
    return (said or lines or [type(error).__name__])[0][:300]


def redact_output() -> None:
    """Redact, from now on, all log records after they are formatted, and the tracebacks of uncaught exceptions."""
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_Redacted(handler.formatter))
    sys.excepthook = lambda *error: print(redact("".join(traceback.format_exception(*error))), end="", file=sys.stderr)


class _Redacted(logging.Formatter):
    def __init__(self, inner: logging.Formatter | None) -> None:
        super().__init__()
        self.inner = inner or logging.Formatter()

    def format(self, record: logging.LogRecord) -> str:
        return redact(self.inner.format(record))


def _secret_variables() -> Iterator[tuple[str, str]]:
    for name, value in os.environ.items():
        if name not in _NOT_SECRET and (names_a_secret(name) or name.upper().endswith("_KEY")):
            yield name, value


def _known() -> list[str]:
    """The secrets of the environment in every spelling in which a library may print them, the longest first."""
    found: set[str] = set()
    for _, value in _secret_variables():
        found |= {value, " ".join(value.split()), *value.splitlines()}
    for value in os.environ.values():
        if re.match(r"[\w+.-]+://", value):
            found |= {part for text in {value, unquote(value)} for part in _secrets_of_uri(text)}
    spellings = {
        said
        for each in found
        if not _NUMBER.fullmatch(each)
        for said in _spellings(each)
        if len(said) >= SHORTEST or "@" in said
    }
    return sorted(spellings, key=len, reverse=True)


def _spellings(secret: str) -> set[str]:
    """A secret as it is, quoted for a URI, and escaped for a shell, for Python and for JSON."""
    quoted = {unquote(secret), quote(secret), quote(secret, ""), quote_plus(secret)}
    return {secret, secret.replace("'", "'\"'\"'"), repr(secret)[1:-1], json.dumps(secret)[1:-1]} | quoted


def _secrets_of_uri(uri: str) -> Iterator[str]:
    """Yield the password and the secret parameters of a URI, whose special characters need not be quoted.

    If the password contains an unquoted ``@``, ``/`` or ``:``, a library takes the part after it for the host and may
    print that part, so the parts are yielded too.
    """
    yield from (match["value"].strip("\"'") for match in _PARAMETER.finditer(uri))
    for parameter in uri.partition("?")[2].split("&"):
        key, _, value = parameter.partition("=")
        if names_a_secret(key):
            yield value
    info, at, host = uri.partition("://")[2].rpartition("@")
    user, _, password = info.partition(":")
    if at and not re.search("[/?]", user):
        yield password or user
        for end in re.finditer(r"[@/:?#]", password):
            yield password[: end.start()]
            yield password[end.end() :] + at + re.split("[/:?]", host)[0]


def _hide(text: str) -> str:
    first, *rest = text.split("://")
    text = "://".join([first, *map(_without_user, rest)])
    text = _SCHEME.sub(rf"\g<1> {HIDDEN}", text)
    return _PARAMETER.sub(_without_value, text)


def _without_user(after: str) -> str:
    """Hide user and password in the text after a ``://``; a password may contain quotes, blanks, slashes and ``@``."""
    line = after[: after.index("\n")] if "\n" in after else after
    user = re.match(r"[^\s/@:'\"]*", line)
    assert user
    if line[user.end() : user.end() + 1] not in ("@", ":") or re.match(r":\d*(\s|$)", line[user.end() :]):
        return after
    end = line.rfind("@", 0, _first_blank(line, 0))
    if end < 0 and (at := line.find("@", 0, LONGEST_USER_INFO)) >= 0:
        end = line.rfind("@", 0, _first_blank(line, at))
    return after if end < 0 else f"{HIDDEN}{after[end:]}"


def _first_blank(line: str, start: int) -> int:
    found = re.compile(r"\s").search(line, start)
    return found.start() if found else len(line)


def _without_value(match: re.Match[str]) -> str:
    value = match["value"]
    if _NUMBER.fullmatch(value) and not _WITH_NUMBERS.search(match["key"]):
        return match[0]
    quoted = value[0] if value[0] in "\"'" else ""
    return f"{match['key']}{match['is']}{quoted}{HIDDEN}{quoted}"
