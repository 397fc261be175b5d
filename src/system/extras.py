"""Packages that only some commands need, which are an extra of this project."""

from __future__ import annotations

import importlib
from types import ModuleType

from src.errors import UsageError


def require(package: str, extra: str, setting: str) -> ModuleType:
    """The package as a module.

    Raises:
        UsageError: it is not installed; the line names the setting that needs it, and the extra that brings it.
    """
    try:
        return importlib.import_module(package)
    except ImportError:
        remedy = f"pip install --constraint constraints.txt '.[{extra}]'"
        raise UsageError(f"{setting}: needs {package}: {remedy}") from None
