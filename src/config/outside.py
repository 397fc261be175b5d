"""Other people's parts: what a ``_target_`` in a config group names."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from src.errors import UsageError


def target(path: str, group: str) -> Any:
    """What a ``_target_`` names: a class or a function of somebody's package.

    Raises:
        UsageError: there is no such thing.
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        remedy = "write package.module.Name, and put the package's folder into PYTHONPATH"
        raise UsageError(f"{group}._target_={path}: cannot be imported ({error}); {remedy}") from None


def call(path: str, options: dict[str, Any], group: str) -> Any:
    """What a function or a class of somebody's package makes of the options that its config group gives.

    Raises:
        UsageError: it does not take them.
    """
    made_by = target(path, group)
    try:
        inspect.signature(made_by).bind(**options)
    except TypeError as error:
        raise UsageError(f"{group}.options={options}: {path} does not take them ({error})") from None
    return made_by(**options)
