"""Delivery to MLflow of runs that have ended: at the end of a sweep, when a command is repeated, and by hand.

A run delivers its own metrics while it trains (`src.runs.tracker`). What MLflow lacks after an outage or a kill is
delivered here from the run's files, by a process that holds the lock of the run's folder.
"""

from __future__ import annotations

import argparse
import logging
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from src.config.schema import Tracking
from src.errors import UsageError
from src.runs import directory as run_directory
from src.runs import mlflow_store
from src.runs.mlflow_store import Delivered, StoreError
from src.runs.query import named_run
from src.runs.record import TAG_CHARTS, Record, records_below
from src.runs.tracker import Tracker, deleted_in_mlflow, parent_tags
from src.system.deadline import Overdue, within
from src.system.redact import one_line

DELIVERY_TIMEOUT_S = 600.0  # for each step of a delivery, if no run or sweep waits for it
MAX_FAILURES = 3  # after so many in a row, the store is assumed to fail for every run

logger = logging.getLogger(__name__)


def catch_up(directory: Path, tracking: Tracking) -> None:
    """Deliver a run that has ended to the requested experiment; if the store fails, only log a warning.

    The calling process must hold the lock of the directory.
    """
    try:
        if _deliver_held(directory, tracking).stays_deleted:
            logger.warning("%s", deleted_in_mlflow([directory]))
    except UsageError as error:
        logger.warning("%s", error)


def deliver(directory: Path, requested: Tracking | None = None, again: bool = False) -> Delivered:
    """Deliver a run that has ended from its files, while no other process works on it.

    Args:
        directory: the run's folder.
        requested: the experiment that the user requests now; None: all in which the run was requested before.
        again: whether to deliver everything once more, and to restore the run where it was deleted in MLflow.

    Raises:
        UsageError: the folder holds no run, another process works on the run, or the store refuses it.
    """
    with run_directory.exclusive(directory):
        return _deliver_held(directory, requested, again)


def _deliver_held(directory: Path, requested: Tracking | None, again: bool = False) -> Delivered:
    """Do what `deliver` does, in a process that holds the lock of the directory."""
    record = Record.load(directory, hash_rows=again)
    if record.status == "RUNNING":  # its process was ended without closing the run, for instance by SIGKILL
        record.close("KILLED", "its process is gone; the same command continues")
    if requested:
        record.request(requested)
    record.entry.for_mlflow |= again
    delivered, saved_rows = Delivered([], False), None
    try:
        wanted = [requested.name == "mlflow"] if requested else [each.for_mlflow for each in record.copies.values()]
        if not any(wanted):
            return delivered
        experiment = requested.experiment if requested else ""
        # The limit is short where a run or a sweep waits for the delivery.
        seconds = mlflow_store.STORE_TIMEOUT_S if requested else DELIVERY_TIMEOUT_S
        for so_far in mlflow_store.iterate_for_run(
            directory, seconds, lambda client: mlflow_store.deliver(client, record, experiment, again)
        ):
            delivered = so_far
            if (rows := [each.rows for each in record.copies.values()]) != saved_rows:
                saved_rows = rows
                record.save(directory)  # so that the next delivery continues from here, whatever ends this one
        return delivered
    finally:
        record.save(directory)


def attach_children(parent: Tracker, children: Sequence[Path]) -> None:
    """Nest runs that have ended under a sweep's run in MLflow, and deliver what MLflow lacks of them.

    If the store fails, only log a warning. A run that belongs to several sweeps of an experiment is shown under the
    last one; its tags ``sweep.ID`` name all of them. A run that another process works on is skipped.
    """
    parent.flush()  # creates the sweep's run in MLflow if there is none so far
    tags = parent_tags(str(parent.directory), parent.tracking.experiment)
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
            refused = _try_each(_not_held(children), attach)
    except (UsageError, Overdue) as error:
        refused = [error]
    if deleted:
        logger.warning("%s", deleted_in_mlflow(deleted))
    for each in refused:
        logger.warning("MLflow could not be told which runs belong to %s: %s", parent.directory, one_line(each))


def _not_held(directories: Iterable[Path]) -> Iterator[Path]:
    """Those that no process works on when their turn comes."""
    return (each for each in directories if not run_directory.is_held(each))


def _try_each(directories: Iterable[Path], send: Callable[[Path], None]) -> list[UsageError]:
    """Send each run; when the store itself has failed for `MAX_FAILURES` runs in a row, skip the others.

    Returns:
        The errors of the runs that were refused; an iterator that was passed in still has the runs that were skipped.
    """
    refused, in_a_row = list[UsageError](), 0
    for directory in directories:
        try:
            send(directory)
            in_a_row = 0
        except UsageError as error:
            refused.append(error)
            in_a_row += isinstance(error, StoreError)
        if in_a_row == MAX_FAILURES:
            break
    return refused


def main(publish_again: Callable[[Path], None], arguments: Iterable[str] | None = None) -> None:
    """Deliver the runs that are named or, if none is, what MLflow lacks of any run below ``multirun/``.

    A run that was deleted in MLflow is delivered again if it is named, and otherwise only listed.

    Args:
        publish_again: called with the folders of runs that MLflow has; it shows sweeps in MLflow's pages again.
        arguments: the command line; None: that of this process.

    Raises:
        UsageError: a name is not that of a run, and nothing has been delivered; or a run is refused, and the others
            have been delivered, unless the store itself fails.
    """
    parser = argparse.ArgumentParser(
        prog="python -m src.tracking",
        description="Deliver to MLflow what it lacks of the runs in multirun/, or the whole of those that are named.",
    )
    parser.add_argument("run", nargs="*", help="a run's name in multirun/, its folder or its id; also of a deleted run")
    named = [named_run(each) for each in parser.parse_args(arguments).run]
    waiting = iter(named)

    def send(directory: Path) -> None:
        print(f"{directory}: delivered as run {', '.join(deliver(directory, again=True).run_ids)}", flush=True)
        publish_again(directory)

    refused = _try_each(waiting, send) if named else _deliver_all(publish_again)
    for each in refused[1:]:
        logger.warning("%s", each)
    if untried := shlex.join(map(str, waiting)):
        logger.warning("the store has failed %d times in a row, so these were not tried: %s", MAX_FAILURES, untried)
    if refused:
        raise refused[0]


def _deliver_all(publish_again: Callable[[Path], None]) -> list[UsageError]:
    """Deliver what MLflow lacks of any run below ``multirun/``; return the errors of those that are refused."""
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

    refused = _try_each(_not_held(records), send)
    if deleted:
        print(deleted_in_mlflow(deleted), flush=True)
    if not (sent or deleted or refused):
        print("nothing waits to be delivered")
    return refused
