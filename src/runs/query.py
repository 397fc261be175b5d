"""Reading runs as records (src/runs/record.py), from their files or from MLflow."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from src.errors import UsageError
from src.runs import mlflow_store
from src.runs.directory import ROOT
from src.runs.record import RECORD, TAG_OUTPUT_DIR, TAG_SWEEP_ID, ExperimentEntry, Record, records_below

_found: dict[str, Path] = {}  # the folder of each run id found so far: each job of a sweep may ask for the same run


def read_runs(experiment: str, backend: str, root: Path = ROOT) -> list[Record]:
    """List an experiment's runs, oldest first, from MLflow or from the ``run.json`` files under ``root``.

    Raises:
        UsageError: there is no such experiment; the message lists the existing ones.
    """
    runs = _runs_in_store(experiment) if backend == "mlflow" else _runs_under(root, experiment)
    return _each_once(run for run in runs if TAG_SWEEP_ID not in run.tags)


def _each_once(runs: Iterable[Record]) -> list[Record]:
    """The runs, oldest first; of a run that is there several times, as by a copy of its folder, its own folder's."""
    found = sorted(runs, key=lambda run: run.directory is not None and run.directory.name == run.name)
    return sorted({run.uuid: run for run in found}.values(), key=lambda run: run.start_time)


def read_sweep(sweep: str, backend: str, root: Path = ROOT) -> tuple[str, list[Record]]:
    """List a sweep's jobs, oldest first.

    Args:
        sweep: the sweep's id of eight hex digits, or the id of its run in MLflow.
        backend: ``mlflow``, or else the ``run.json`` files are read.
        root: where these files are.

    Returns:
        The sweep's name and id, joined by a hyphen, and the records of its jobs.

    Raises:
        UsageError: there is no such sweep; the message lists the existing ones.
    """
    if backend == "mlflow":
        names = [each.name for each in _all_pages(mlflow_store.existing().search_experiments)]
        runs = [run for name in names for run in _runs_in_store(name)]
    else:
        runs = list(_copies_below(root))
    sweeps = {run.tags[TAG_SWEEP_ID]: run for run in runs if TAG_SWEEP_ID in run.tags}
    for identity, run in sweeps.items():
        if sweep in (identity, run.run_id):
            jobs = [each for each in runs if f"sweep.{identity}" in each.tags]
            jobs.sort(key=lambda each: each.experiment == run.experiment)  # the copy in the sweep's experiment counts
            return f"{run.params.get('sweep', 'sweep')}-{identity}", _each_once(jobs)
    known = ", ".join(f"{identity} ({run.params.get('sweep', 'sweep')})" for identity, run in sweeps.items())
    raise UsageError(f"sweep={sweep}: there is no such sweep; choose from {known or 'none'}")


def _runs_under(root: Path, experiment: str) -> list[Record]:
    found = list(_copies_below(root))
    runs = [run for run in found if run.experiment == experiment]
    if not runs:
        raise _unknown(experiment, f"the run.json files under {root}/", {run.experiment for run in found})
    return runs


def _copies_below(root: Path) -> Iterator[Record]:
    """Copies of each record, one for each experiment in which the run was requested, with the run's tags there."""
    for _, record in records_below(root):
        for name, entry in record.copies.items():
            yield replace(record, experiment=name, tags=record.tags | entry.tags)


def _runs_in_store(experiment: str) -> list[Record]:
    client = mlflow_store.existing()
    found = mlflow_store.answer(lambda: client.get_experiment_by_name(experiment))
    if not found:
        raise _unknown(experiment, "MLflow", {other.name for other in _all_pages(client.search_experiments)})
    return [record_of(run, experiment) for run in _all_pages(partial(client.search_runs, [found.experiment_id]))]


def record_of(run: Any, experiment: str) -> Record:
    """What MLflow has of a run of the experiment, as a record."""
    return Record(
        run.data.tags.get("uuid", run.info.run_id),
        run.info.run_name,
        experiment,
        run.info.start_time,
        run.info.end_time,
        status=run.info.status,
        params=run.data.params,
        tags=run.data.tags,
        metrics=run.data.metrics,
        copies={experiment: ExperimentEntry(run.info.run_id, experiment_id=run.info.experiment_id)},
        directory=Path(run.data.tags[TAG_OUTPUT_DIR]) if TAG_OUTPUT_DIR in run.data.tags else None,
    )


def _all_pages(search: Callable[..., Any]) -> Iterator[Any]:
    """Everything that a search of MLflow's client finds, whose answers are pages."""
    page = mlflow_store.answer(search)
    yield from page
    tokens = {""}
    while (token := page.token or "") not in tokens:  # a server that repeats itself would never come to an end
        tokens.add(token)
        page = mlflow_store.answer(partial(search, page_token=token))
        yield from page


def _unknown(experiment: str, where: str, known: Iterable[str]) -> UsageError:
    return UsageError(f"experiment={experiment} is not in {where}: choose from {', '.join(sorted(known)) or 'none'}")


def named_run(run: str, key: str = "run") -> Path:
    """Find the folder of a run.

    Args:
        run: the folder's name in ``multirun``, its path, or the run's id.
        key: the setting that names the run, for the message.

    Raises:
        UsageError: there is no such run, or its folder is gone.
    """
    for folder in (ROOT / run, Path(run).expanduser()):
        if (folder / RECORD).is_file():
            return folder
    if re.fullmatch("[0-9a-f]{32}", run):
        return find_run_directory(run)
    files = {"init": ", or a .pt or .safetensors", "checkpoint": ", or a checkpoint's file"}.get(key, "")
    raise UsageError(
        f"{key}={run}: there is no such run; give the name of its folder in {ROOT}/, its path, or its id{files}"
    )


def find_run_directory(run_id: str) -> Path:
    """Find the output directory of a run, in the records below ``multirun`` or else by the run's tag in MLflow.

    Args:
        run_id: the run's own id, or one of its ids in MLflow.

    Raises:
        UsageError: no run has the id, or its folder is gone.
    """
    found = _found.get(run_id)
    if found is None or not _is_there(run_id, found):
        found = _found[run_id] = _search(run_id)
    return found


def _is_there(run_id: str, directory: Path) -> bool:
    """Whether the directory still holds the run."""
    with suppress(UsageError):
        record = Record.find(directory, hash_rows=False)
        return record is not None and run_id in _ids(record)
    return False


def _ids(record: Record) -> set[str]:
    """The run's own id, and its ids in MLflow."""
    return {record.uuid, *(entry.run_id for entry in record.copies.values())}


def _search(run_id: str) -> Path:
    for directory, record in records_below(ROOT):
        if run_id in _ids(record):
            return directory
    client = mlflow_store.existing()
    run = mlflow_store.answer(lambda: mlflow_store.known_run(client, run_id))
    if not run:
        raise UsageError(f"the run {run_id} is not in MLflow, nor under {ROOT}/")
    output_dir = run.data.tags.get(TAG_OUTPUT_DIR, "")
    if not output_dir or not Path(output_dir).is_dir():
        raise UsageError(f"the run {run_id} has no folder here (output_dir={output_dir!r}): give the path of one")
    return Path(output_dir)
