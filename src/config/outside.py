"""Parts from outside this project: the class or function that a ``_target_`` names, and the types of its settings."""

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
# Files whose traceback frames do not show where the fault is: this project's src, and what imports and inspects.
_OURS = (str(Path(__file__).parent.parent), importlib.__file__, inspect.__file__, typing.__file__, "<frozen ")


@cache
def settings_class(path: str, group: str, base: type) -> type:
    """Extend the dataclass ``base`` by all parameters of a ``_target_`` but the first, with their annotated types.

    Raises:
        UsageError: the target cannot be imported, or its signature cannot be read or has unsupported types.
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
    """The values of the settings that `settings_class` has added to a node."""
    return {key: getattr(node, key) for key in type(node).__annotations__}


def make(path: str, group: str, kind: type[T], /, *arguments: Any, **options: Any) -> T:
    """Call the class or function that a ``_target_`` names, and check the type of the result.

    Raises:
        UsageError: the target cannot be imported, the call fails, or the result is not an instance of ``kind``.
    """
    found = target(path, group)
    with blamed(path, group):
        made = found(*arguments, **options)
    if not isinstance(made, kind):
        raise UsageError(f"{group}._target_={path}: is a {_name(type(made))} when made, and must be a {_name(kind)}")
    return made


def code_digests(cfg: Config) -> dict[str, str]:
    """Digest the modules of a config's targets: the first 16 hex digits of each file's SHA-256, by module name.

    The digests are not part of a run's identity, because then every edited comment would restart all runs. The data
    set's target is left out, because its fingerprint identifies the images.
    """
    parts = {"method": cfg.method, "support": cfg.support, "backbone": cfg.backbone}
    return dict(_code(part._target_, group) for group, part in parts.items() if part._target_ is not None)


@cache  # an imported module does not change when its file is edited later
def _code(path: str, group: str) -> tuple[str, str]:
    found = target(path, group)
    try:
        content = Path(inspect.getsourcefile(found) or "").read_bytes()
    except (OSError, TypeError):  # it has no file
        content = b""
    return found.__module__, hashlib.sha256(content).hexdigest()[:16]


@contextmanager
def blamed(path: str, group: str) -> Iterator[None]:
    """Turn any error of code from outside this project into a `UsageError` that says where it was raised."""
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
    """Import the class or function that a ``_target_`` names.

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
