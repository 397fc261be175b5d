"""Checkpoints that survive a kill at any moment, notice any damage, and execute nothing when they are read.

A checkpoint is what `torch.save` writes, followed by the SHA-256 of it: torch is built not to look at the CRCs in its
own files. The file appears under its name only when it is complete and on the disk.

Tensors go straight to the file and come straight from it. A copy in memory would double what a large support set needs,
and be made in one go, in which no other thread runs: the other ranks of a run would take this one for lost.
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
from typing_extensions import TypedDict  # typing's own is refused by pydantic before Python 3.12

from src.errors import UsageError
from src.runs.metrics_file import begins_with, reason
from src.runs.record import DIGEST_BYTES, checkpoints_by_step
from src.system.atomic_write import whole
from src.system.redact import one_line
from src.system.regular_file import open_regular

FORMAT = 3  # of the keys of the state: to be raised when they change their meaning
BLOCK_BYTES = 2**20  # which are digested at once

logger = logging.getLogger(__name__)


class Head(TypedDict):
    """What every checkpoint says of itself, and what is known of the rows where it was a run's."""

    step: Annotated[int, Field(ge=0, lt=2**63)]
    rows: NotRequired[tuple[int, str]]


_HEAD = TypeAdapter(Head)


class DamagedCheckpointError(UsageError):
    """The file is cut short, altered, or was never a checkpoint."""


def save(directory: Path, step: int, state: Mapping[str, Any], keep: int = 2) -> Path:
    """Write ``directory/step-<step>.pt`` and leave the newest ``keep`` checkpoints up to this step.

    Those of later steps are set aside: a run that saves step 90 was not continued from step 100.

    Args:
        directory: written by one process at a time; created if absent.
        step: optimizer steps so far.
        state: tensors and plain values, in dicts, lists and tuples. ``format`` and ``step`` are added.
        keep: at least 1.

    Raises:
        TypeError: the state holds something that `load` would refuse; better to hear of it now.
    """
    state = {**state, "format": FORMAT, "step": step}
    _check_plain(state, "state")

    directory.mkdir(exist_ok=True)  # not its parents: whoever moved the run away would find a part of it here
    for left_by_a_killed_writer in directory.glob("step-*.tmp"):
        left_by_a_killed_writer.unlink()
    path = directory / f"step-{step:08d}.pt"
    with whole(path) as file:
        digested = _Digested(file)
        try:
            torch.save(state, digested)  # type: ignore[arg-type]  # it writes and flushes, no more
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # a full disk, after which torch misses what was not written
                raise error.__context__ from None
            raise
        file.write(digested.sha256.digest())

    up_to_here = [saved for other, saved in checkpoints_by_step(directory).items() if other <= step]
    for saved in up_to_here[:-keep]:
        saved.unlink()
    set_aside_after(directory, step)
    return path


class _Digested(io.RawIOBase):
    """Passes on to a file what `torch.save` writes, and computes its SHA-256."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        return self.file.write(data)


def set_aside_after(directory: Path, step: int) -> None:
    """Rename the checkpoints of later steps, which are damaged or of something else, so that none counts as good."""
    for path in (path for other, path in checkpoints_by_step(directory).items() if other > step):
        aside = path.with_name(f"{path.name}.damaged")
        logger.warning("%s is set aside as %s", path, aside.name)
        path.rename(aside)


def is_whole(path: Path) -> bool:
    """Whether a file is what `save` wrote, unaltered."""
    try:
        with open_regular(path) as file:
            return _ends_with_digest(file)
    except OSError:
        return False


def _ends_with_digest(file: BinaryIO) -> bool:
    """Whether a file's last bytes are the SHA-256 of those before."""
    left, sha256 = max(file.seek(0, os.SEEK_END) - DIGEST_BYTES, 0), hashlib.sha256()
    file.seek(0)
    while left and (block := file.read(min(left, BLOCK_BYTES))):
        sha256.update(block)
        left -= len(block)
    return file.read(DIGEST_BYTES + 1) == sha256.digest()


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint, all tensors on the CPU.

    Raises:
        DamagedCheckpointError: the file is not what `save` wrote.
        UsageError: it is missing, of another format, or holds more than tensors and plain values.
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
    """What a whole file holds, be it a run's state or not. It is read twice: for its digest, and into tensors."""
    if not _ends_with_digest(file):
        raise DamagedCheckpointError(f"{path} is damaged, or not a checkpoint of this project: choose another one")
    file.seek(0)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception:  # what the restricted unpickler raises depends on what it is fed
        raise UsageError(
            f"{path} holds more than tensors and plain values, so it is not read: it may be hostile"
        ) from None


def load_latest(directory: Path, rows: Path | None = None) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that can be used, and where it is, or None. Others are passed over, with a warning.

    Args:
        directory: with the checkpoints.
        rows: the run's ``metrics.jsonl``. What it held when a checkpoint was saved must still be there, because a run
            that goes on from the checkpoint does not compute it again.

    Raises:
        UsageError: the newest whole one cannot be used, say because it is of another format, or none has its rows.
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
        module: changed only if all fits.
        state_dict: of the module when it was saved.
        path: where it was read, for the message.
        remedy: the end of the message.

    Raises:
        UsageError: keys are missing, unexpected or of another shape.
    """
    differences = _differences(module, state_dict)
    if any(differences.values()):
        found = "; ".join(f"{len(keys)} {kind}: {_first(keys)}" for kind, keys in differences.items() if keys)
        raise UsageError(f"{path} is of another method or shape: {found}. {remedy}")
    module.load_state_dict(dict(state_dict))


@contextmanager
def understood(path: Path) -> Iterator[None]:
    """Whatever a whole checkpoint lacks that a run's has, as a `UsageError` that names the file."""
    try:
        yield
    except (UsageError, torch.OutOfMemoryError):
        raise
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(f"{path} is not the checkpoint of a run ({one_line(error)}): choose another one") from None


def part_of(weights: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Of a method's state dict that of one of its parts, ``encoder`` say."""
    prefix = f"{name}."
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def fits(module: nn.Module, state_dict: Mapping[str, Any]) -> bool:
    """Whether a state dict has exactly the module's keys and shapes, and in extra states what the module has there."""
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
    """None for a module's extra state, which is no tensor."""
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _first(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")


def _check_plain(value: object, where: str) -> None:
    """Exact types: a subclass, such as NumPy's float64 or an enum, is pickled as a class and refused by `load`."""
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():  # type: ignore[attr-defined]
            _check_plain(key, f"a key of {where}")
            _check_plain(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):  # type: ignore[arg-type]
            _check_plain(item, f"{where}[{index}]")
    elif not isinstance(value, Tensor) and type(value) not in (int, float, bool, str, bytes, type(None)):
        raise TypeError(f"{where} is a {type(value).__name__}; a checkpoint takes tensors and plain values")
