"""A run's directory: where it lies, whether its run is finished, and the lock that admits one process at a time."""

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
from src.errors import Collapsed, Diverged, RunFailed, UsageError
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
HOLDER = ".holder"  # a file beside the lock that names the process which holds it
LOCK_TIMEOUT_S = 10.0  # enough for a process that was told to stop to save and release its directory


def path_of(cfg: schema.Config) -> Path:
    """Choose the run's directory: ``output_dir``, or ``multirun/NAME-HASH``, the same for the same configuration.

    With ``resume=never``, if the directory exists already, it is the first free one of ``NAME-HASH.2``, ``.3``, ...;
    so it is if the run there has other defaults of a class from outside (`identity.has_other_defaults`).

    Raises:
        UsageError: the name leads out of ``multirun/``, or ``output_dir`` is a file.
    """
    name = f"{identity.run_name(cfg)}-{identity.config_hash(cfg)}"
    directory = Path(cfg.output_dir) if cfg.output_dir else ROOT / name
    parent = directory.parent.resolve()  # the run itself may be a link to another disk
    if not cfg.output_dir and ROOT.resolve() not in (parent, *parent.parents):
        raise UsageError(f"{name}: names no folder inside {ROOT}/; choose names without '..', or set output_dir")
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"output_dir={directory}: is a file; name a folder")
    number, chosen = 1, directory
    while chosen.exists() and (cfg.resume == "never" or (not cfg.output_dir and _has_other_defaults(chosen, cfg))):
        number += 1
        chosen = directory.with_name(f"{directory.name}.{number}")
    return chosen


def _has_other_defaults(directory: Path, cfg: schema.Config) -> bool:
    if not (cfg.method._target_ or cfg.support._target_):  # no record need be read for each job of a sweep
        return False
    with suppress(UsageError):  # a damaged record, which the run itself reports
        record = Record.find(directory, hash_rows=False)
        return record is not None and identity.has_other_defaults(record.params, cfg)
    return False


def how_to_continue(cfg: schema.Config | None, directory: Path) -> str:
    """Say in words how a run that has been stopped is continued."""
    if cfg is not None and cfg.resume == "never":
        return f"output_dir={directory} resume=auto continues"
    return "the same command continues"


def is_finished(directory: Path, cfg: schema.Config) -> bool:
    """Whether the directory holds the finished run of this configuration.

    Raises:
        UsageError: the directory holds a run of another configuration, or a damaged record.
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


@cache  # a sweep asks several times and about many runs, but one warning is enough
def _warn_of_other_code(module: str) -> None:
    logger.warning(
        "%s has changed since runs with it finished: resume=never trains them anew, and a setting that its class "
        "takes, such as version=2, makes other runs of them",
        module,
    )


def changed_protocol(cfg: schema.Config, record: Record) -> dict[str, str]:
    """The evaluation settings in which a config differs from a run's last session, each with a text that says how.

    These settings are not part of a run's identity, so changing them does not start a new run. A record keeps the
    params of the first session, as MLflow does; a tag with the name of a param holds its present value.
    """
    before, now = identity.with_neutral(record.params) | record.tags, identity.flat(cfg)
    besides = {"evaluation.teacher", "evaluation.bank"} & before.keys()
    asked = sorted({key for key in before | now if identity.is_protocol(key)} | besides)
    found = {key: (before.get(key, "null"), str(now.get(key, "null"))) for key in asked}
    return {key: f"{key} was {was} and is {now}" for key, (was, now) in found.items() if was != now}


def warn_of_other_protocol(finished: Iterable[tuple[schema.Config, Record]]) -> None:
    """Log one warning about those finished runs whose evaluation had other settings than their configs have now."""
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
    """Refuse to continue a run that has diverged or, with ``on_collapse=stop``, has collapsed.

    Raises:
        Diverged: the run diverged; the message is that of the session in which it did.
        Collapsed: the run collapsed, and the config has ``on_collapse=stop``.
    """
    if TAG_DIVERGED in record.tags:
        raise Diverged(record.tags.get(TAG_ERROR, "diverged before; resume=never tries again"))
    if TAG_COLLAPSED in record.tags and cfg.on_collapse == "stop":
        raise Collapsed(f"collapsed {record.tags[TAG_COLLAPSED]}; on_collapse=warn trains on")


def is_hopeless(record: Record, cfg: schema.Config) -> bool:
    """Whether `refuse_hopeless` refuses to continue the run."""
    try:
        refuse_hopeless(record, cfg)
    except RunFailed:
        return True
    return False


def refuse_foreign(directory: Path) -> None:
    """Refuse a folder in which a run would overwrite the files of another program.

    A folder with a record is a run's, because a run writes the record before its results. A folder that has lost its
    record is recognised by an undamaged checkpoint.

    Raises:
        UsageError: the folder has files that no run's start leaves, but neither a record nor an undamaged checkpoint.
    """
    if not directory.is_dir() or os.path.lexists(directory / RECORD):
        return
    from src.runs import checkpoint  # late, because it imports torch, which takes seconds

    if any(map(checkpoint.is_whole, checkpoints_by_step(directory / CHECKPOINTS).values())):
        return
    if others := sorted(path.name for path in directory.iterdir() if not _is_of_a_start(path)):
        raise UsageError(
            f"output_dir={directory}: holds {others[0]!r} but no {RECORD}, so it is not a run's; name a new folder"
        )


def _is_of_a_start(path: Path) -> bool:
    """Whether the file may come from a run that was killed before it had written its record."""
    return path.name in (".lock", HOLDER, f"{RECORD}.tmp") or (path.name == METRICS and not path.stat().st_size)


def is_held(directory: Path) -> bool:
    """Whether another process holds the run's lock, or this process may not write to the run's folder."""
    try:
        with FileLock(directory / ".lock", timeout=0):
            return False
    except OSError:  # includes `Timeout`
        return True


@contextmanager
def exclusive(directory: Path, patience: float = 0.0) -> Iterator[None]:
    """Create the directory and hold its lock, which the system releases when the process ends, however it ends.

    Args:
        directory: a run's or a sweep's folder.
        patience: seconds to wait for a process that is about to release the lock.

    Raises:
        UsageError: another process holds the lock, the directory cannot be created, or it is another program's.
        CannotWrite: inside the block, the disk was full, read-only or broken.
    """
    refuse_foreign(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory / ".lock")
        lock.acquire(timeout=patience)
        with suppress(OSError):  # on a full disk, a write that matters more raises the error
            (directory / HOLDER).write_text(_this_process())
    except Timeout as error:
        holder = _holder(directory)
        # On a file system without locks, the lock file of a process that was killed on another machine remains.
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
            if _holder(directory) == _this_process():  # else another process's folder has replaced this one
                (directory / HOLDER).unlink()
        lock.release()


def _this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _holder(directory: Path) -> str:
    try:
        return (directory / HOLDER).read_text() or "another process"
    except OSError:  # the process has the lock but has not written its name yet
        return "another process"
