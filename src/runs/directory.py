"""One run, one directory, one process at a time."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from filelock import FileLock, Timeout

from src.config import identity, schema
from src.config.outside import code_digests
from src.errors import Collapsed, Diverged, UsageError
from src.runs.record import (
    CHECKPOINTS,
    METRICS,
    RECORD,
    TAG_CODE,
    TAG_COLLAPSED,
    TAG_CONFIG_HASH,
    TAG_DIVERGED,
    TAG_ERROR,
    Record,
    checkpoints_by_step,
)
from src.system.atomic_write import cannot_write

logger = logging.getLogger(__name__)

ROOT = Path("multirun")
HOLDER = ".holder"  # a file beside the lock: which process it is
LOCK_TIMEOUT_S = 10.0  # in which a process that was told to stop has saved, and let its directory go


def path_of(cfg: schema.Config) -> Path:
    """Where the run lives: ``output_dir``, or ``multirun/NAME-HASH``, the same for the same configuration.

    With ``resume=never`` and something there already, the next free of ``NAME-HASH.2``, ``.3``, ...
    """
    name = f"{identity.run_name(cfg)}-{identity.config_hash(cfg)}"
    directory = Path(cfg.output_dir) if cfg.output_dir else ROOT / name
    parent = directory.parent.resolve()  # the run itself may be a link to another disk
    if not cfg.output_dir and ROOT.resolve() not in (parent, *parent.parents):
        raise UsageError(f"{name}: names no folder inside {ROOT}/; choose names without '..', or set output_dir")
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"output_dir={directory}: is a file; name a folder")
    if cfg.resume == "auto" or not directory.exists():
        return directory
    number = 2
    while directory.with_name(f"{directory.name}.{number}").exists():
        number += 1
    return directory.with_name(f"{directory.name}.{number}")


def how_to_continue(cfg: schema.Config | None, directory: Path) -> str:
    """What goes on with a run that has been stopped, in words."""
    if cfg is not None and cfg.resume == "never":
        return f"output_dir={directory} resume=auto continues"
    return "the same command continues"


def is_finished(directory: Path, cfg: schema.Config) -> bool:
    """Whether the directory holds this run's result.

    Raises:
        UsageError: it holds a run of another configuration.
    """
    record = Record.find(directory)
    if record is None:
        return False
    identity.check_same(record.params, cfg, directory, record.tags.get(TAG_CONFIG_HASH, ""))
    if record.status != "FINISHED":
        return False
    for module, digest in code_digests(cfg).items():
        if record.tags.get(f"{TAG_CODE}{module}", digest) != digest:
            _warn_of_other_code(module)
    return True


@cache  # a sweep asks several times, and of many runs
def _warn_of_other_code(module: str) -> None:
    logger.warning(
        "%s has changed since runs with it finished: resume=never trains them anew, and a setting that its class "
        "takes, such as version=2, makes other runs of them",
        module,
    )


def changed_protocol(cfg: schema.Config, record: Record) -> dict[str, str]:
    """The settings of the evaluation in which a config differs from a run's last session, each with how it differs.

    They are no part of a run's identity, so a change of them starts no new run. A record keeps the params of the first
    session, as MLflow does; a tag with the name of a param holds its present value.
    """
    before, now = identity.with_neutral(record.params) | record.tags, identity.flat(cfg)
    besides = {"evaluation.teacher", "evaluation.bank"} & before.keys()
    asked = sorted({key for key in before | now if identity.is_protocol(key)} | besides)
    found = {key: (before.get(key, "null"), str(now.get(key, "null"))) for key in asked}
    return {key: f"{key} was {was} and is {now}" for key, (was, now) in found.items() if was != now}


def warn_of_other_protocol(finished: Iterable[tuple[schema.Config, Record]]) -> None:
    """Say once of all of these runs, which are finished, how the evaluation of some was another."""
    changes = [found for cfg, record in finished if (found := changed_protocol(cfg, record))]
    if changes:
        logger.warning(
            "%d finished job%s evaluated otherwise (%s): reports pair runs of one evaluation only, so repeat the "
            "former settings here; python -m src.evaluate adds figures by others",
            len(changes),
            " was" if len(changes) == 1 else "s were",
            ", ".join(dict.fromkeys(text for found in changes for text in found.values())),
        )


def refuse_hopeless(record: Record, cfg: schema.Config) -> None:
    """Refuse to continue a run that has diverged, or that has collapsed and is to stop for it.

    Raises:
        Diverged: as it was said then.
        Collapsed: it has, and ``on_collapse=stop``.
    """
    if TAG_DIVERGED in record.tags:
        raise Diverged(record.tags.get(TAG_ERROR, "diverged before; resume=never tries again"))
    if TAG_COLLAPSED in record.tags and cfg.on_collapse == "stop":
        raise Collapsed(f"collapsed {record.tags[TAG_COLLAPSED]}; on_collapse=warn trains on")


def refuse_foreign(directory: Path) -> None:
    """Refuse a folder in which a run would overwrite the files of another program.

    A run's record is the first that it writes. One that has lost its record is known by a whole checkpoint.

    Raises:
        UsageError: the folder has files, and none is a record or a checkpoint.
    """
    if not directory.is_dir() or os.path.lexists(directory / RECORD):
        return
    from src.runs import checkpoint  # torch takes seconds

    if any(map(checkpoint.is_whole, checkpoints_by_step(directory / CHECKPOINTS).values())):
        return
    if others := sorted(path.name for path in directory.iterdir() if not _is_of_a_start(path)):
        raise UsageError(
            f"output_dir={directory}: holds {others[0]!r} but no {RECORD}, so it is not a run's; name a new folder"
        )


def _is_of_a_start(path: Path) -> bool:
    """Whether a run that was killed before it had its record may have left the file."""
    return path.name in (".lock", HOLDER, f"{RECORD}.tmp") or (path.name == METRICS and not path.stat().st_size)


def is_held(directory: Path) -> bool:
    """Whether a process works on the run, or nobody may write to its folder."""
    try:
        with FileLock(directory / ".lock", timeout=0):
            return False
    except OSError:  # of which `Timeout` is one
        return True


@contextmanager
def exclusive(directory: Path, patience: float = 0.0) -> Iterator[None]:
    """Make the directory and hold it against other processes; the lock goes with the process, however it ends.

    Args:
        directory: a run's or a sweep's.
        patience: seconds to wait for a process that is about to let it go.

    Raises:
        UsageError: another process keeps it, it cannot be made, or it is another program's.
        CannotWrite: what was done there met a disk that is full, read-only or broken.
    """
    refuse_foreign(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory / ".lock")
        lock.acquire(timeout=patience)
        with suppress(OSError):  # a full disk: what matters more will say so
            (directory / HOLDER).write_text(_this_process())
    except Timeout as error:
        holder = _holder(directory)
        # A file system without locks keeps the file of a process that was killed elsewhere.
        is_elsewhere = not holder.endswith((socket.gethostname(), "another process"))
        gone = f"; if it is gone there, remove {directory / '.lock'}" if is_elsewhere else ""
        raise UsageError(f"{directory}: {holder} is using it; wait for it, or stop it{gone}") from error
    except OSError as error:
        reason = f"cannot be written ({error.strerror})"
        if (directory / RECORD).exists():
            raise UsageError(f"{directory}: {reason}; copy it to a folder of yours") from error
        raise UsageError(f"output_dir={directory}: {reason}; set another") from error
    try:
        yield
    except OSError as error:
        raise cannot_write(directory, error) from error
    finally:
        with suppress(OSError):
            if _holder(directory) == _this_process():  # not another's, whose folder has taken the place of this one
                (directory / HOLDER).unlink()
        lock.release()


def _this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _holder(directory: Path) -> str:
    try:
        return (directory / HOLDER).read_text() or "another process"
    except OSError:  # it has only just begun
        return "another process"
