"""Campaign of faults that a long run meets: a full disk, a locked store, a tracking server that is away.

    python -m scripts.reliability.faults FOLDER

The full disk is a small tmpfs; without the permission to mount one, its tests are skipped.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from scripts.reliability.campaign import campaign, judged
from scripts.reliability.runs import (
    METHODS,
    SMALL,
    differences,
    lost_and_doubled,
    output,
    rows,
    start,
    statuses,
    stored,
    wait_for,
)
from scripts.reliability.servers import Server, histories

DISK_MB = 32  # the size of the disk that fills up
LOCKED_S, AWAY_S = 60, 120  # seconds for which the store is locked, and the server is away
KMCLR = [*SMALL, *METHODS["kmclr"], "output_dir=run"]


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk: Path, leave: int) -> Path:
    """Fill a disk until ``leave`` bytes are free; return the file that fills it."""
    ballast = disk / "ballast"
    with suppress(OSError), ballast.open("wb", buffering=0) as file:  # the run may take up room at the same time
        file.write(bytes(max(0, shutil.disk_usage(disk).free - leave)))
    return ballast


def run_on_a_full_disk(folder: Path, unbroken: Path, cache: str, leave: int) -> list[str]:
    """Fill the disk after the first checkpoint, then make room again and let the same command continue."""
    arguments, store = [*KMCLR, "epochs=8", cache], folder.with_name(f"{folder.name}-store")
    uri = f"sqlite:///{store}/mlflow.db"
    with small_disk(folder) as disk:
        process = start(disk, arguments, MLFLOW_TRACKING_URI=uri)
        assert wait_for(lambda: list(disk.glob("run/checkpoints/*.pt")), process)
        ballast = fill(disk, leave)
        status = process.wait(300)
        ballast.unlink()
        (told,) = statuses(store)
        lines = [line for line in output(disk).splitlines() if line.startswith("error") or "Traceback" in line]
        assert start(disk, arguments, MLFLOW_TRACKING_URI=uri).wait(300) == 0, output(disk)
        missing, extra = lost_and_doubled(rows(unbroken / "run"), rows(disk / "run"))
        bits = differences(disk / "run", unbroken / "run")
    return judged(
        f"disk full but for {leave} bytes: status {status}, MLflow told {told}, said {lines}; "
        f"continued: {missing} rows lost, {extra} doubled; different bits: {bits or 'none'}",
        status == 74 and len(lines) == 1 and missing == extra == 0 and not bits,
    )


def store_on_a_full_disk(folder: Path, unbroken: Path, cache: str) -> list[str]:
    """Fill the disk of the MLflow store; the run goes on, and src.tracking delivers it when there is room again."""
    with small_disk(folder / "disk") as disk:
        uri = f"sqlite:///{disk}/mlflow.db"
        process = start(folder, [*KMCLR, "epochs=8", cache], MLFLOW_TRACKING_URI=uri)
        assert wait_for(lambda: list(folder.glob("run/checkpoints/*.pt")), process)
        ballast = fill(disk, 0)
        status = process.wait(300)
        ballast.unlink()
        delivered = start(folder, ["run"], module="src.tracking", MLFLOW_TRACKING_URI=uri).wait(120)
        (history,) = stored(disk).values()
        missing, extra = lost_and_doubled(rows(unbroken / "run"), history)
    return judged(
        f"store's disk full: status {status}, delivery {delivered}, {missing} rows lost, {extra} doubled",
        status == delivered == missing == extra == 0,
    )


def locked_store(folder: Path, unbroken: Path, cache: str, *, from_the_start: bool) -> list[str]:
    """Hold the store's lock for `LOCKED_S` seconds, from the start of the run or from its first checkpoint on."""
    arguments = [*KMCLR, "epochs=8", cache]
    database = folder / "mlflow.db"
    folder.mkdir(parents=True)
    if from_the_start:
        shutil.copy(unbroken / "mlflow.db", database)
        with sqlite3.connect(database) as store:
            store.execute(
                "UPDATE tags SET value = value || ' (of the unbroken run)' WHERE key IN ('uuid', 'output_dir')"
            )
    else:
        process = start(folder, arguments)
        assert wait_for(lambda: list(folder.glob("run/checkpoints/*.pt")), process)
    holder = sqlite3.connect(database, timeout=60)
    holder.execute("BEGIN EXCLUSIVE")
    if from_the_start:
        process = start(folder, arguments)
    time.sleep(LOCKED_S)
    ended_before = process.poll() is not None
    holder.rollback()
    holder.close()
    status = process.wait(300)
    delivered = start(folder, ["run"] if ended_before else [], module="src.tracking").wait(120)
    history = stored(folder)[str(folder / "run")]
    missing, extra = lost_and_doubled(rows(unbroken / "run"), history)
    when = "from the start" if from_the_start else "during the run"
    return judged(
        f"store locked for {LOCKED_S} s {when}: status {status}, ended before: {ended_before}, "
        f"delivery {delivered}, {missing} rows lost, {extra} doubled",
        status == delivered == missing == extra == 0,
    )


def server_away(folder: Path, cache: str, epochs: int) -> list[str]:
    """Stop the tracking server during the run, and start it again after `AWAY_S` seconds."""
    with Server(folder / "server") as server:
        process = start(folder, [*KMCLR, f"epochs={epochs}", cache], MLFLOW_TRACKING_URI=server.uri)
        assert wait_for(lambda: list(folder.glob("run/checkpoints/*.pt")), process)
        server.stop()
        time.sleep(AWAY_S)
        ended_before = process.poll() is not None
        server.start()
        status = process.wait(600)
        command = ["run"] if ended_before else []
        delivered = start(folder, command, module="src.tracking", MLFLOW_TRACKING_URI=server.uri).wait(120)
        (history,) = histories(server.uri).values()
        missing, extra = lost_and_doubled(rows(folder / "run"), history)
    return judged(
        f"server away for {AWAY_S} s: status {status}, ended before: {ended_before}, delivery {delivered}, "
        f"{len(history)} rows, {missing} lost, {extra} doubled",
        status == delivered == missing == extra == 0,
    )


def main(folder: Path) -> list[str]:
    """Try all faults one after another; return the outcomes that are wrong."""
    wrong = []
    cache = f"data.cache_dir={folder / 'cache'}"
    unbroken = folder / "unbroken"
    assert start(unbroken, [*KMCLR, "epochs=8", cache]).wait(300) == 0, output(unbroken)
    record = json.loads((unbroken / "run/run.json").read_text())
    print(f"unbroken: {record['seconds']:.0f} s, {len(rows(unbroken / 'run'))} values")
    try:
        for leave in (0, 1000, 100_000):
            wrong += run_on_a_full_disk(folder / f"full-{leave}", unbroken, cache, leave)
        wrong += store_on_a_full_disk(folder / "full-store", unbroken, cache)
    except subprocess.CalledProcessError as error:
        print(f"no full disk: {error}")
    wrong += locked_store(folder / "locked", unbroken, cache, from_the_start=False)
    wrong += locked_store(folder / "locked-first", unbroken, cache, from_the_start=True)
    wrong += server_away(folder / "away", cache, epochs=8)
    return wrong + server_away(folder / "away-long", cache, epochs=300)


if __name__ == "__main__":
    campaign(__doc__, main)
