"""Where a run's first weights come from: ``init=`` names a run, its folder, a checkpoint, or an encoder's file."""

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
    """Set ``cfg.origin`` to the digest of the weights that ``cfg.init`` names.

    The config's hash contains this digest instead of the path, so the same weights in another place are the same run.

    Returns:
        The file of the weights. None without ``cfg.init``, or if the file is gone but this run has begun already and
        therefore does not need it.

    Raises:
        UsageError: there are no such weights, or the run that they belong to has not finished.
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
    """The digest of the weights that this run began with, from its record; None if it has not begun."""
    for begun in (replace(cfg, origin=each) for each in _origins(Path(cfg.output_dir or ROOT).resolve(), cfg.init)):
        record = Record.find(path_of(begun), hash_rows=False)
        if record and (record.params.get("init"), record.params.get("origin")) == (cfg.init, begun.origin):
            return begun.origin
    return None


@cache  # each job of a sweep asks; meanwhile no run begins from weights that are gone, so the answer stays the same
def _origins(root: Path, init: str | None) -> list[str]:
    """The digests of the weights that runs below a folder with this ``init`` began with, each once."""
    begun = [record.params for _, record in records_below(root) if record.params.get("init") == init]
    return list(dict.fromkeys(params["origin"] for params in begun if "origin" in params))


def locate(init: str) -> Path:
    """Find the file that ``init`` names: a run's newest checkpoint, or the file itself.

    Raises:
        UsageError: as in `identify`.
    """
    path = Path(init).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        path = named_run(init, "init")
    record = Record.find(path, hash_rows=False)
    if record and record.status != "FINISHED":
        raise UsageError(f"init={init}: {record.unfinished('name one of its checkpoints instead')}")
    if checkpoint := newest_checkpoint(path / CHECKPOINTS):
        return checkpoint
    if (path / ENCODER).is_file():
        raise UsageError(f"init={init}: the run's checkpoints are gone; name {path / ENCODER}, its encoder alone")
    raise UsageError(f"init={init}: there is no checkpoint; give a run's folder, a .pt or a .safetensors")


def _identity(path: Path) -> str:
    """The first 16 hex digits of the SHA-256 of the file's content; a checkpoint has it at its end."""
    with path.open("rb") as file:
        if path.suffix == ".pt" and path.stat().st_size > DIGEST_BYTES:
            file.seek(-DIGEST_BYTES, 2)
            return file.read().hex()[:16]
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
