"""Where a run's first weights come from: ``init=`` a run's name, its folder, a checkpoint, or an encoder's file."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import cache
from pathlib import Path

from src.config.schema import Config
from src.errors import UsageError
from src.runs.directory import ROOT, path_of
from src.runs.query import named_run
from src.runs.record import CHECKPOINTS, DIGEST_BYTES, ENCODER, Record, newest_checkpoint, records_below


def identify(cfg: Config) -> Path | None:
    """Fill in ``cfg.origin``, which weights ``cfg.init`` names, whatever the path: the config's hash contains it.

    Returns:
        The file of the weights; None without ``cfg.init``, or where it is gone and the run, which has begun already,
        needs it no more.

    Raises:
        UsageError: there are none, or their run has not finished.
    """
    if cfg.init is None:
        return None
    try:
        path = locate(cfg.init)
    except UsageError:
        cfg.origin = _recorded(cfg)
        if cfg.origin is None:
            raise
        return None
    cfg.origin = _identity(path)
    return path


def _recorded(cfg: Config) -> str | None:
    """Which weights this run began with, as its record says; None where it has not begun."""
    for begun in (replace(cfg, origin=each) for each in _origins(Path(cfg.output_dir or ROOT).resolve(), cfg.init)):
        record = Record.find(path_of(begun), hash_rows=False)
        if record and (record.params.get("init"), record.params.get("origin")) == (cfg.init, begun.origin):
            return begun.origin
    return None


@cache  # each job of a sweep asks, and none that needs its weights begins without them
def _origins(root: Path, init: str | None) -> list[str]:
    """Which weights runs below a folder began with that name the same ``init``."""
    begun = [record.params for _, record in records_below(root) if record.params.get("init") == init]
    return list(dict.fromkeys(params["origin"] for params in begun if "origin" in params))


def locate(init: str) -> Path:
    """The file that ``init`` names: a run's newest checkpoint, or the file itself.

    Raises:
        UsageError: as `identify`.
    """
    path = Path(init).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        path = named_run(init, "init")
    record = Record.find(path, hash_rows=False)
    if record and record.status != "FINISHED":
        raise UsageError(f"init={init}: the run is {record.status}, not FINISHED; name one of its checkpoints instead")
    if checkpoint := newest_checkpoint(path / CHECKPOINTS):
        return checkpoint
    if (path / ENCODER).is_file():
        raise UsageError(f"init={init}: the run's checkpoints are gone; name {path / ENCODER}, its encoder alone")
    raise UsageError(f"init={init}: there is no checkpoint; give a run's folder, a .pt or a .safetensors")


def _identity(path: Path) -> str:
    """The first 16 hex digits of the SHA-256 of what the file holds; a checkpoint states it at its end."""
    with path.open("rb") as file:
        if path.suffix == ".pt" and path.stat().st_size > DIGEST_BYTES:
            file.seek(-DIGEST_BYTES, 2)
            return file.read().hex()[:16]
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
