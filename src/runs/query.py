"""Reading runs back, from their files or from MLflow."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from src.errors import UsageError
from src.runs import mlflow_store
from src.runs.record import Record, records_below
from src.system.redact import one_line


@dataclass(frozen=True)
class Run:
    """A run as it is listed: params as text, the last value of each metric, the start in seconds since the epoch."""

    run_id: str
    name: str
    status: str
    params: dict[str, str]
    metrics: dict[str, float]
    directory: str | None
    tags: dict[str, str]
    start_time: float


def read_runs(experiment: str, backend: str, root: Path = Path("multirun")) -> list[Run]:
    """Lists an experiment's runs, oldest first, from MLflow or from the ``run.json`` files under ``root``.

    Raises:
        UsageError: there is no such experiment; the message lists those that there are.
    """
    runs = _runs_in_store(experiment) if backend == "mlflow" else _runs_under(root, experiment)
    return sorted((run for run in runs if "sweep_id" not in run.tags), key=lambda run: run.start_time)


def read_sweep(sweep: str, backend: str, root: Path = Path("multirun")) -> tuple[str, list[Run]]:
    """Lists a sweep's jobs, oldest first.

    Args:
        sweep: its eight hex digits, or the id of its run in MLflow.

    Returns:
        The sweep's name with its digits, and the runs.

    Raises:
        UsageError: there is no such sweep; the message lists those that there are.
    """
    if backend == "mlflow":
        names = [experiment.name for experiment in mlflow_store.existing().search_experiments()]
        runs = [run for name in names for run in _runs_in_store(name)]
    else:
        runs = [_as_run(*found) for found in records_below(root)]
    sweeps = {run.tags["sweep_id"]: run for run in runs if "sweep_id" in run.tags}
    for identity, run in sweeps.items():
        if sweep in (identity, run.run_id):
            jobs = [each for each in runs if f"sweep.{identity}" in each.tags]
            return f"{run.params['sweep']}-{identity}", sorted(jobs, key=lambda each: each.start_time)
    known = ", ".join(f"{identity} ({run.params['sweep']})" for identity, run in sweeps.items())
    raise UsageError(f"sweep={sweep}: there is no such sweep; choose from {known or 'none'}")


def _runs_under(root: Path, experiment: str) -> list[Run]:
    found = list(records_below(root))
    runs = [_as_run(directory, record) for directory, record in found if record.experiment == experiment]
    if not runs:
        raise _unknown(experiment, f"the run.json files under {root}/", {record.experiment for _, record in found})
    return runs


def _as_run(directory: Path, r: Record) -> Run:  # not its output_dir: it may have been moved since
    return Run(r.run_id, r.name, r.status, r.params, r.metrics, str(directory.resolve()), r.tags, r.start_time / 1000)


def run_in(directory: Path) -> Run:
    """The run in an output directory.

    Raises:
        UsageError: there is none.
    """
    return _as_run(directory, Record.load(directory))


def _runs_in_store(experiment: str) -> list[Run]:
    client = mlflow_store.existing()
    try:
        found = client.get_experiment_by_name(experiment)
        names = {} if found else {other.name for other in client.search_experiments()}
        pages = [client.search_runs([found.experiment_id])] if found else []
        while pages and pages[-1].token:
            pages.append(client.search_runs([found.experiment_id], page_token=pages[-1].token))
    except Exception as error:
        raise UsageError(f"the MLflow store does not answer ({one_line(error)}): see MLFLOW_TRACKING_URI") from None
    if not found:
        raise _unknown(experiment, "MLflow", names)
    return [
        Run(
            run.info.run_id,
            run.info.run_name,
            run.info.status,
            run.data.params,
            run.data.metrics,
            run.data.tags.get("output_dir"),
            run.data.tags,
            run.info.start_time / 1000,
        )
        for page in pages
        for run in page
    ]


def _unknown(experiment: str, where: str, known: Iterable[str]) -> UsageError:
    return UsageError(f"experiment={experiment} is not in {where}: choose from {', '.join(sorted(known)) or 'none'}")


def find_run_directory(run_id: str, root: Path = Path("multirun")) -> Path:
    """The output directory of a run, by the ``run.json`` files under ``root``, else by the run's tag in MLflow.

    Raises:
        UsageError: no run has the id, or its folder is gone.
    """
    for directory, record in records_below(root):
        if run_id in (record.run_id, record.uuid):
            return directory
    client = mlflow_store.existing()
    try:
        tags = client.get_run(run_id).data.tags
    except Exception as error:
        raise UsageError(f"run_id={run_id} is not in MLflow ({one_line(error)}), nor under {root}/") from None
    directory = tags.get("output_dir", "")
    if not directory or not Path(directory).is_dir():
        raise UsageError(f"run_id={run_id} has no folder here (output_dir={directory!r}): pass checkpoint=PATH instead")
    return Path(directory)
