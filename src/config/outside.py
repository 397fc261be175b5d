"""Other people's parts: what a ``_target_`` in a config group names, and the types of its settings."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import traceback
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import field, make_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src.config.schema import Config
from src.errors import UsageError

T = TypeVar("T")
# Where the frames of a traceback lie that tell nobody where the fault is: in src, and in what imports and inspects.
_OURS = (str(Path(__file__).parent.parent), importlib.__file__, inspect.__file__, typing.__file__, "<frozen ")


@cache
def settings_class(path: str, group: str, base: type) -> type:
    """The dataclass ``base`` with the settings that a ``_target_`` takes after its first argument, typed as it says.

    Raises:
        UsageError: there is no such thing, or what it takes cannot be found out.
    """
    found = target(path, group)
    with blamed(path, group):
        _, *taken = inspect.signature(found).parameters.values()
        hints = get_type_hints(found.__init__ if inspect.isclass(found) else found, include_extras=True)
        own = [
            (each.name, hints.get(each.name, Any), _field(each.default))
            for each in taken
            if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)
        ]
        made = make_dataclass(found.__name__, own, bases=(base,), kw_only=True)
    try:
        OmegaConf.structured(made)
    except OmegaConfBaseException as error:
        raise UsageError(f"{group}._target_={path}: {str(error).splitlines()[0]}") from error
    return made


def _field(default: Any) -> Any:
    return field() if default is inspect.Parameter.empty else field(default_factory=lambda: default)


def settings(node: Any) -> dict[str, Any]:
    """The values of the settings that `settings_class` has added."""
    return {key: getattr(node, key) for key in type(node).__annotations__}


def make(path: str, group: str, kind: type[T], /, *arguments: Any, **options: Any) -> T:
    """What the class or the function that a ``_target_`` names makes of its arguments.

    Raises:
        UsageError: it cannot be imported, it fails, or what it makes is no ``kind``.
    """
    found = target(path, group)
    with blamed(path, group):
        made = found(*arguments, **options)
    if not isinstance(made, kind):
        raise UsageError(f"{group}._target_={path}: is a {_name(type(made))} when made, and must be a {_name(kind)}")
    return made


def code_digests(cfg: Config) -> dict[str, str]:
    """The modules that a config's targets are from: the first 16 hex digits of the SHA-256 of each one's file, by name.

    They are no part of a run's identity, or every edited comment would begin all runs anew. A data set's are left out:
    its fingerprint tells the images.
    """
    parts = {"method": cfg.method, "support": cfg.support, "backbone": cfg.backbone}
    return dict(_code(part._target_, group) for group, part in parts.items() if part._target_ is not None)


@cache  # what has been imported stays as it is when its file is edited
def _code(path: str, group: str) -> tuple[str, str]:
    found = target(path, group)
    try:
        content = Path(inspect.getsourcefile(found) or "").read_bytes()
    except (OSError, TypeError):  # it has no file
        content = b""
    return found.__module__, hashlib.sha256(content).hexdigest()[:16]


@contextmanager
def blamed(path: str, group: str) -> Iterator[None]:
    """Whatever other people's code raises, as a `UsageError` that says where."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        theirs = [each for each in frames if not each.filename.startswith(_OURS)]
        where = f"{theirs[0].filename}, line {theirs[0].lineno}: " if theirs else ""
        raise UsageError(f"{group}._target_={path}: {where}{type(error).__name__}: {error}") from error


def target(path: str, group: str) -> Any:
    """What a ``_target_`` names.

    Raises:
        UsageError: it cannot be imported.
    """
    module, _, name = str(path).rpartition(".")
    try:
        with blamed(path, group):
            return getattr(importlib.import_module(module), name)
    except UsageError as error:
        if isinstance(error.__cause__, ImportError | AttributeError | ValueError):
            raise UsageError(f"{error}; write package.module.Name, its folder in PYTHONPATH") from error
        raise


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
