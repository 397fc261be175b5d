"""Optional packages, which only some commands need and which come with the project's extras."""

from __future__ import annotations

import importlib
from types import ModuleType

from src.errors import UsageError


def require(package: str, extra: str, setting: str) -> ModuleType:
    """Import an optional package.

    Raises:
        UsageError: it cannot be imported; the message names the setting that needs it and the extra that installs it.
    """
    try:
        return importlib.import_module(package)
    except ImportError:
        remedy = f"pip install --constraint constraints.txt '.[{extra}]'"
        raise UsageError(f"{setting}: needs {package}: {remedy}") from None
