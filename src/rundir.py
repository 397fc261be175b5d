"""One run, one directory, one process at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from src import config
from src.errors import UsageError
from src.record import RECORD, Record

ROOT = Path("multirun")


def choose(cfg: config.Config) -> Path:
    """Where the run lives: ``output_dir``, or ``multirun/NAME-HASH``, the same for the same configuration.

    With ``resume=never`` and something there already, the next free of ``NAME-HASH.2``, ``.3``, ...
    """
    directory = Path(cfg.output_dir) if cfg.output_dir else ROOT / f"{config.run_name(cfg)}-{config.config_hash(cfg)}"
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"output_dir={directory}: is a file; name a folder")
    if cfg.resume == "auto" or not directory.exists():
        return directory
    number = 2
    while directory.with_name(f"{directory.name}.{number}").exists():
        number += 1
    return directory.with_name(f"{directory.name}.{number}")


def is_finished(directory: Path, cfg: config.Config) -> bool:
    """Whether the directory holds this run's result.

    Raises:
        UsageError: it holds a run of another configuration.
    """
    if not (directory / RECORD).exists():
        return False
    record = Record.load(directory)
    config.check_same(record.params, cfg, directory)
    return record.status == "FINISHED"


@contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Make the directory and hold it against other processes; the lock goes with the process, however it ends.

    Raises:
        UsageError: another process holds it, or it cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory / ".lock")
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UsageError(f"{directory}: another process is using it; wait for it, or set another output_dir") from error
    except OSError as error:
        raise UsageError(f"output_dir={directory}: cannot be written ({error.strerror}); set another") from error
    try:
        yield
    finally:
        lock.release()
