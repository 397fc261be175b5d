"""Delivery to MLflow of runs that have ended: at the end of a sweep, when a command is typed again, and by hand.

A run delivers itself while it trains (`src.runs.tracker`). What an outage or a kill has left undone is done here, from
the run's files, by a process that holds its folder.
"""

from __future__ import annotations

import argparse
import logging
import shlex
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from src.config.schema import Tracking
from src.errors import UsageError
from src.runs import directory as run_directory
from src.runs import mlflow_store
from src.runs.mlflow_store import Delivered
from src.runs.query import named_run
from src.runs.record import TAG_CHARTS, Record, records_below
from src.runs.tracker import Tracker, parent_tags
from src.system.deadline import Overdue, within
from src.system.redact import one_line

DELIVERY_TIMEOUT_S = 600.0  # for each step of a delivery, in the command that does nothing else
MAX_REFUSALS = 3  # in a row, after which the store is taken to refuse every run

logger = logging.getLogger(__name__)


def catch_up(directory: Path, tracking: Tracking) -> None:
    """Deliver a run that has ended to the experiment in which it is requested; a failing store is only noted.

    For the process that holds the directory.
    """
    try:
        if _deliver_held(directory, tracking).stays_deleted:
            logger.warning("%s", _deleted([directory]))
    except UsageError as error:
        logger.warning("%s", error)


def deliver(directory: Path, requested: Tracking | None = None, again: bool = False) -> Delivered:
    """Deliver a run that has ended, and that no process works on, from its files.

    Args:
        directory: the run's.
        requested: the experiment that the user names now; None: all in which the run was requested before.
        again: whether to deliver all of it, also what is deleted in MLflow.

    Raises:
        UsageError: the folder holds no run, a process works on it, or the store does not take it.
    """
    with run_directory.exclusive(directory):
        return _deliver_held(directory, requested, again)


def _deliver_held(directory: Path, requested: Tracking | None, again: bool = False) -> Delivered:
    """`deliver`, for the process that holds the directory."""
    record = Record.load(directory, hash_rows=again)
    if record.status == "RUNNING":  # a SIGKILL, say, has ended its process
        record.close("KILLED", "its process is gone; the same command continues")
    if requested:
        record.request(requested)
    record.entry.for_mlflow |= again
    delivered, noted = Delivered([], False), None
    try:
        wanted = [requested.name == "mlflow"] if requested else [each.for_mlflow for each in record.copies.values()]
        if not any(wanted):
            return delivered
        experiment = requested.experiment if requested else ""
        # Short where a run or a sweep waits for it.
        seconds = mlflow_store.STORE_TIMEOUT_S if requested else DELIVERY_TIMEOUT_S
        for so_far in mlflow_store.told_in_steps(
            directory, seconds, lambda client: mlflow_store.deliver(client, record, experiment, again)
        ):
            delivered = so_far
            if (rows := [each.rows for each in record.copies.values()]) != noted:
                noted = rows
                record.save(directory)  # so that the next delivery goes on from here, whatever ends this one
        return delivered
    finally:
        record.save(directory)


def _deleted(directories: Sequence[Path]) -> str:
    """What brings back runs that are deleted in MLflow's pages, or that went with the store that had them."""
    what = "this run" if len(directories) == 1 else f"{len(directories)} runs"
    folders = shlex.join(map(str, directories))
    return (
        f"MLflow no longer has {what} (deleted, or another store); deliver again with: python -m src.tracking {folders}"
    )


def attach_children(parent: Tracker, children: Sequence[Path]) -> None:
    """Put runs that have ended under a sweep's, and deliver what MLflow lacks of them; a failing store is only noted.

    A run of several sweeps in an experiment is shown under the last of them; its tags ``sweep.ID`` name all. One that
    another process works on is left to that process.
    """
    parent.flush()  # which may be the first to reach MLflow
    tags = parent_tags(str(parent.directory))
    for directory in children:
        with suppress(UsageError), run_directory.exclusive(directory):
            record = Record.load(directory, hash_rows=False)
            record.request(parent.tracking).tags |= tags
            record.save(directory)
    deleted = list[Path]()

    def attach(directory: Path) -> None:
        if deliver(directory, parent.tracking).stays_deleted:
            deleted.append(directory)

    refused: Sequence[Exception] = []
    try:
        if within(mlflow_store.STORE_TIMEOUT_S, parent.client):
            refused = _try_each(children, attach)
    except (UsageError, Overdue) as error:
        refused = [error]
    if deleted:
        logger.warning("%s", _deleted(deleted))
    for each in refused:
        logger.warning("MLflow could not be told which runs belong to %s: %s", parent.directory, one_line(each))


def _try_each(directories: Iterable[Path], send: Callable[[Path], None]) -> list[UsageError]:
    """Deliver runs that no process works on.

    Returns:
        Why the store does not take some of them. After `MAX_REFUSALS` in a row the others are not tried.
    """
    refused, in_a_row = list[UsageError](), 0
    for directory in directories:
        if run_directory.is_held(directory):
            continue
        try:
            send(directory)
            in_a_row = 0
        except UsageError as error:
            refused.append(error)
            in_a_row += 1
        if in_a_row == MAX_REFUSALS:
            break
    return refused


def main(publish_again: Callable[[Path], None], arguments: Iterable[str] | None = None) -> None:
    """Deliver the runs that are named, else what MLflow lacks of any below ``multirun/``.

    Those that are deleted in MLflow are delivered again if they are named, and otherwise listed.

    Raises:
        UsageError: MLflow does not take one of them. The others have been delivered, unless it is the store that fails.
    """
    parser = argparse.ArgumentParser(
        prog="python -m src.tracking",
        description="Deliver to MLflow what it lacks of the runs in multirun/, or the whole of those that are named.",
    )
    parser.add_argument("run", nargs="*", help="a run's name in multirun/, its folder or its id; also of a deleted run")
    named = [named_run(each) for each in parser.parse_args(arguments).run]
    for directory in named:
        print(f"{directory}: delivered as run {', '.join(deliver(directory, again=True).run_ids)}", flush=True)
        publish_again(directory)
    if not named:
        _deliver_all(publish_again)


def _deliver_all(publish_again: Callable[[Path], None]) -> None:
    """What MLflow lacks of any run below ``multirun/``.

    Raises:
        UsageError: as `main`.
    """
    deleted, sent = list[Path](), list[Path]()
    records = dict(sorted(records_below(run_directory.ROOT), key=lambda each: each[1].start_time))

    def send(directory: Path) -> None:
        run_ids, stays_deleted = deliver(directory)
        if stays_deleted:
            deleted.append(directory)
        if run_ids:
            sent.append(directory)
            print(f"{directory}: delivered as run {', '.join(run_ids)}", flush=True)
        if not stays_deleted and (run_ids or TAG_CHARTS not in records[directory].tags):
            publish_again(directory)

    refused = _try_each(records, send)
    if deleted:
        print(_deleted(deleted), flush=True)
    if not (sent or deleted or refused):
        print("nothing waits to be delivered")
    for each in refused[1:]:
        logger.warning("%s", each)
    if refused:
        raise refused[0]
