"""Checkpoints that survive a kill at any moment, detect any damage, and execute no code when they are read.

A checkpoint is the output of `torch.save`, followed by its SHA-256, because torch is built without the check of the
CRCs in its own files. The file appears under its name only when it is complete and on the disk.

Tensors are written to the file and read from it directly. A copy in memory would double the memory that a large support
set needs, and no other thread can run while the copy is made, so the other ranks would take this rank for lost.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NotRequired

import torch
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor, nn
from typing_extensions import TypedDict  # pydantic refuses typing's own before Python 3.12

from src.errors import UsageError
from src.runs.metrics_file import begins_with, reason
from src.runs.record import DIGEST_BYTES, checkpoints_by_step
from src.system.atomic_write import whole
from src.system.redact import one_line
from src.system.regular_file import open_regular

FORMAT = 3  # version of the state's keys; raise it when their meaning changes
BLOCK_BYTES = 2**20  # read and hashed at once

logger = logging.getLogger(__name__)


class Head(TypedDict):
    """The keys that `load` checks: the step and, in a run's checkpoint, the bytes of its rows and their SHA-256."""

    step: Annotated[int, Field(ge=0, lt=2**63)]
    rows: NotRequired[tuple[int, str]]


_HEAD = TypeAdapter(Head)


class DamagedCheckpointError(UsageError):
    """The file is cut short, altered, or was never a checkpoint."""


def save(directory: Path, step: int, state: Mapping[str, Any], keep: int = 2) -> Path:
    """Write ``directory/step-<step>.pt`` and keep only the newest ``keep`` checkpoints up to this step.

    Checkpoints of later steps are set aside: a run that saves step 90 was not continued from step 100.

    Args:
        directory: the folder of the checkpoints, to which one process writes at a time; created if absent.
        step: optimizer steps so far.
        state: tensors and plain values, in dicts, lists and tuples. ``format`` and ``step`` are added.
        keep: how many checkpoints to keep, at least 1.

    Raises:
        TypeError: the state holds something that `load` would refuse; nothing has been written then.
    """
    state = {**state, "format": FORMAT, "step": step}
    _check_plain(state, "state")

    directory.mkdir(exist_ok=True)  # not its parents: where the run was moved away, no part of it may appear here again
    for left_by_a_killed_writer in directory.glob("step-*.tmp"):
        left_by_a_killed_writer.unlink()
    path = directory / f"step-{step:08d}.pt"
    with whole(path) as file:
        digested = _Digested(file)
        try:
            torch.save(state, digested)  # type: ignore[arg-type]  # torch only writes to it and flushes it
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # on a full disk, torch then complains of its incomplete archive
                raise error.__context__ from None
            raise
        file.write(digested.sha256.digest())

    up_to_here = [saved for other, saved in checkpoints_by_step(directory).items() if other <= step]
    for saved in up_to_here[:-keep]:
        saved.unlink()
    set_aside_after(directory, step)
    return path


class _Digested(io.RawIOBase):
    """A writer that passes the output of `torch.save` on to a file, and computes its SHA-256."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        return self.file.write(data)


def set_aside_after(directory: Path, step: int) -> None:
    """Rename the checkpoints of later steps, which are damaged or which the run did not continue from.

    Under its new name, ending in ``.damaged``, a file no longer counts as a checkpoint.
    """
    for path in (path for other, path in checkpoints_by_step(directory).items() if other > step):
        aside = path.with_name(f"{path.name}.damaged")
        logger.warning("%s is set aside as %s", path, aside.name)
        path.rename(aside)


def is_whole(path: Path) -> bool:
    """Whether a file is a checkpoint as `save` wrote it, complete and unaltered."""
    try:
        with open_regular(path) as file:
            return _ends_with_digest(file)
    except OSError:
        return False


def _ends_with_digest(file: BinaryIO) -> bool:
    """Whether a file's last 32 bytes are the SHA-256 of all the bytes before them."""
    left, sha256 = max(file.seek(0, os.SEEK_END) - DIGEST_BYTES, 0), hashlib.sha256()
    file.seek(0)
    while left and (block := file.read(min(left, BLOCK_BYTES))):
        sha256.update(block)
        left -= len(block)
    return file.read(DIGEST_BYTES + 1) == sha256.digest()


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint, with all tensors on the CPU.

    Raises:
        DamagedCheckpointError: the file is not as `save` wrote it.
        UsageError: the file is missing, has another format, or holds more than tensors and plain values.
    """
    try:
        with open_regular(path) as file:
            state = _checked(file, path)
    except OSError as error:
        if path.exists() and not path.is_file():
            raise DamagedCheckpointError(f"{path} is not a regular file: choose another one") from None
        raise UsageError(f"checkpoint {path} cannot be read: {error.strerror}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise UsageError(
            f"{path} has checkpoint format {found}, this version reads {FORMAT}: train again, or use its version"
        )
    try:
        _HEAD.validate_python(state, strict=True)
    except ValidationError as error:
        raise UsageError(f"{path} is not the checkpoint of a run ({reason(error)}): choose another one") from None
    return state


def _checked(file: BinaryIO, path: Path) -> Any:
    """Read the content of an undamaged file, which need not be a run's state.

    The file is read twice: once for its digest, and once into tensors.
    """
    if not _ends_with_digest(file):
        raise DamagedCheckpointError(f"{path} is damaged, or not a checkpoint of this project: choose another one")
    file.seek(0)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception:  # which exception the restricted unpickler raises depends on the file's content
        raise UsageError(
            f"{path} holds more than tensors and plain values, so it is not read: it may be hostile"
        ) from None


def load_latest(directory: Path, rows: Path | None = None) -> tuple[Path, dict[str, Any]] | None:
    """Load the newest usable checkpoint; newer ones that are damaged or lack their rows are skipped with a warning.

    Args:
        directory: the folder of the checkpoints.
        rows: the run's ``metrics.jsonl``. The rows that it held when a checkpoint was saved must still be there,
            because a run that continues from the checkpoint does not compute them again.

    Returns:
        The checkpoint's path and its state; None if there is no usable checkpoint.

    Raises:
        UsageError: the newest undamaged checkpoint cannot be used, for instance because it has another format; or there
            are undamaged checkpoints, but the rows of each are lost or changed.
    """
    without_rows = None
    for path in reversed(checkpoints_by_step(directory).values()):
        try:
            state = load(path)
        except DamagedCheckpointError as error:
            logger.warning("%s; trying the one before", error)
            continue
        if rows is None or "rows" not in state or begins_with(rows, *state["rows"]):
            return path, state
        without_rows = without_rows or path
        logger.warning("%s: rows from before %s are lost or changed; trying the checkpoint before", rows, path.name)
    if without_rows:
        raise UsageError(
            f"{rows}: rows from before {without_rows.name} are lost or changed: put the whole file back, or remove "
            f"{directory.parent}, and the same command trains another run from the start"
        )
    return None


def restore(
    module: nn.Module,
    state_dict: Mapping[str, Tensor],
    path: Path,
    remedy: str = "Give the config that it was trained with",
) -> None:
    """Load a state dict into a module that must have exactly its keys and shapes.

    Args:
        module: left unchanged if a key or a shape differs.
        state_dict: the state that was saved.
        path: the file that it was read from, for the message.
        remedy: the end of the message.

    Raises:
        UsageError: keys are missing or unexpected, or a tensor has another shape.
    """
    differences = _differences(module, state_dict)
    if any(differences.values()):
        found = "; ".join(f"{len(keys)} {kind}: {_first(keys)}" for kind, keys in differences.items() if keys)
        raise UsageError(f"{path} is of another method or shape: {found}. {remedy}")
    module.load_state_dict(dict(state_dict))


@contextmanager
def understood(path: Path) -> Iterator[None]:
    """Inside this block, turn the errors that the content of an undamaged file causes into a `UsageError` naming it."""
    try:
        yield
    except (UsageError, torch.OutOfMemoryError):
        raise
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(f"{path} is not the checkpoint of a run ({one_line(error)}): choose another one") from None


def part_of(weights: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Extract from a method's state dict the state dict of one of its parts, such as ``encoder``."""
    prefix = f"{name}."
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def fits(module: nn.Module, state_dict: Mapping[str, Any]) -> bool:
    """Whether a state dict has exactly the module's keys and shapes, and in each extra state all keys of the module's.

    An extra state is what a module's ``get_extra_state`` returns; only those that are dicts are compared.
    """
    known = {key: value for key, value in module.state_dict().items() if isinstance(value, dict)}
    if any(_differences(module, state_dict).values()):
        return False
    return all(value.keys() <= state_dict[key].keys() for key, value in known.items())


def _differences(module: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, list[str]]:
    own = module.state_dict()
    return {
        "missing": [key for key in own if key not in state_dict],
        "unexpected": [key for key in state_dict if key not in own],
        "of another shape": [
            f"{key} {_shape(state_dict[key])} for {_shape(own[key])}"
            for key in own
            if key in state_dict and _shape(state_dict[key]) != _shape(own[key])
        ],
    }


def _shape(value: object) -> tuple[int, ...] | None:
    """A tensor's shape; None for a module's extra state, which is not a tensor."""
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _first(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")


def _check_plain(value: object, where: str) -> None:
    """Raise a `TypeError` for anything but tensors and plain values, and name its place in the state.

    Types are compared exactly: a subclass, such as NumPy's float64 or an enum, is pickled as a class, and `load`
    refuses it.
    """
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():  # type: ignore[attr-defined]
            _check_plain(key, f"a key of {where}")
            _check_plain(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):  # type: ignore[arg-type]
            _check_plain(item, f"{where}[{index}]")
    elif not isinstance(value, Tensor) and type(value) not in (int, float, bool, str, bytes, type(None)):
        raise TypeError(f"{where} is a {type(value).__name__}; a checkpoint takes tensors and plain values")
