"""Campaign on a real tracking server with SQLite or PostgreSQL, killed and restarted while four jobs log to it.

    python -m scripts.reliability.servers FOLDER [sqlite] [postgresql]

PostgreSQL is Debian's (package postgresql); if the caller is root, it runs as the user ``nobody``. The tracking server
needs psycopg2 (``pip install psycopg2-binary``).
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

from scripts.reliability.campaign import campaign, judged
from scripts.reliability.runs import PYTHON, SMALL, lost_and_doubled, output, rows, start, wait_for

STOPS, AWAY = 2, 10  # how many times the server is killed while jobs run, and for how many seconds it stays away


class Server:
    """A process ``mlflow server`` on loopback.

    Args:
        folder: the folder for the log, the artifacts and, unless ``backend`` is given, the SQLite database.
        backend: the URI of the database.
    """

    def __init__(self, folder: Path, backend: str | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.backend = folder, backend or f"sqlite:///{folder}/mlflow.db"
        self.port = _free_port()
        self.uri = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        arguments = ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        arguments += ["--backend-store-uri", self.backend, "--artifacts-destination", str(self.folder / "artifacts")]
        clean = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
        with (self.folder / "server.txt").open("ab") as log:
            self.process = subprocess.Popen(
                [PYTHON, "-m", "mlflow", "server", *arguments],
                env=clean | {"NO_PROXY": "127.0.0.1", "MLFLOW_DISABLE_TELEMETRY": "true"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        assert wait_for(self._answers, self.process, 180), (self.folder / "server.txt").read_text()[-2000:]

    def _answers(self) -> bool:
        time.sleep(0.2)
        try:
            return _get(f"{self.uri}/health", timeout=2) == b"OK"
        except OSError:
            return False

    def stop(self) -> None:
        """Kill the server and all its workers."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, 9)
        self.process.wait()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _get(url: str, data: dict[str, Any] | None = None, timeout: float = 60) -> bytes:
    request = urllib.request.Request(url, json.dumps(data).encode() if data else None)
    request.add_header("Content-Type", "application/json")
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=timeout) as answer:
        return answer.read()


def runs_on(uri: str) -> list[dict[str, Any]]:
    """All runs on a server, as its REST interface returns them."""
    api = f"{uri}/api/2.0/mlflow"
    experiments = json.loads(_get(f"{api}/experiments/search", {"max_results": 100}))["experiments"]
    ids = [each["experiment_id"] for each in experiments]
    return json.loads(_get(f"{api}/runs/search", {"experiment_ids": ids, "max_results": 1000})).get("runs", [])


def histories(uri: str) -> dict[str, list[tuple[str, int, float]]]:
    """All values on a server except times and memory, by the run's output directory."""
    found: dict[str, list[tuple[str, int, float]]] = {}
    for run in runs_on(uri):
        tags = {tag["key"]: tag["value"] for tag in run["data"]["tags"]}
        values = found.setdefault(tags["output_dir"], [])
        for key in {metric["key"] for metric in run["data"].get("metrics", [])}:
            if not key.startswith(("time/", "memory/")):
                query = f"run_id={run['info']['run_id']}&metric_key={key}&max_results=10000"
                history = json.loads(_get(f"{uri}/api/2.0/mlflow/metrics/get-history?{query}"))["metrics"]
                values += [(key, int(point.get("step", 0)), float(point["value"])) for point in history]
    return found


class Postgres:
    """A PostgreSQL server with its own database cluster, on loopback."""

    def __init__(self, folder: Path) -> None:
        self.programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))[-1]
        self.folder = folder
        self.port = _free_port()
        self.uri = f"postgresql+psycopg2://tester:not-a-secret@127.0.0.1:{self.port}/postgres"

    def _run(self, program: str, *arguments: str) -> None:
        user = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"] if os.geteuid() == 0 else []
        subprocess.run(
            [*user, str(self.programs / program), *arguments], check=True, stdout=subprocess.DEVNULL, cwd="/"
        )

    def __enter__(self) -> Postgres:
        self.folder.mkdir(parents=True)
        (self.folder / "password").write_text("not-a-secret")
        for each in (self.folder, self.folder / "password"):
            if os.geteuid() == 0:
                shutil.chown(each, "nobody", "nogroup")
        data = str(self.folder / "data")
        self._run("initdb", "-D", data, "-U", "tester", "-A", "scram-sha-256", f"--pwfile={self.folder}/password")
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self.folder}"
        self._run("pg_ctl", "-D", data, "-w", "-l", str(self.folder / "log"), "-o", options, "start")
        return self

    def __exit__(self, *_: object) -> None:
        self._run("pg_ctl", "-D", str(self.folder / "data"), "-m", "fast", "-w", "stop")


def four_jobs(folder: Path, name: str, backend: str | None) -> list[str]:
    """Run a sweep of four jobs at once, while the server is killed and restarted; return what was wrong."""
    with Server(folder / "server", backend) as server:
        arguments = ["--multirun", *SMALL, "method=kmclr", "k=5,7,9,11", "epochs=20", "jobs=4"]
        sweep = start(folder, [*arguments, "data.cache_dir=cache"], MLFLOW_TRACKING_URI=server.uri)
        for stop in range(STOPS):
            validations = 4 * (2 + 8 * stop)

            def far_enough(validations: int = validations) -> bool:
                logs = folder.glob("multirun/kmclr*/metrics.jsonl")
                return sum(path.read_bytes().count(b"val/knn") for path in logs) >= validations

            assert wait_for(far_enough, sweep, 600), output(folder)
            server.stop()
            time.sleep(AWAY)
            server.start()
        status = sweep.wait(900)
        later = start(folder, [], module="src.tracking", MLFLOW_TRACKING_URI=server.uri).wait(120)
        told = Counter(run["info"]["status"] for run in runs_on(server.uri))
        lost = doubled = 0
        on_server = histories(server.uri)
        directories = list(folder.glob("multirun/kmclr*"))
        for directory in directories:
            missing, extra = lost_and_doubled(rows(directory), on_server[str(directory)])
            lost, doubled = lost + missing, doubled + extra
    return judged(
        f"{name}, server killed {STOPS} times for {AWAY} s: sweep's status {status}, delivery {later}, "
        f"{len(directories)} jobs, {dict(told)}, rows: {lost} lost, {doubled} doubled or different",
        status == later == lost == doubled == 0 and len(directories) == 4 and told == {"FINISHED": 5},
    )


def two_at_once(folder: Path, store: str) -> list[str]:
    """Start two runs together on an empty database, without a tracking server; return what was wrong."""
    arguments = [*SMALL, "method=kmclr", "k=7", "epochs=1", "evaluation.pictures=false"]
    runs = [start(folder / name, [*arguments, "output_dir=run"], MLFLOW_TRACKING_URI=store) for name in ("one", "two")]
    statuses = [run.wait(600) for run in runs]
    later = [
        start(folder / name, ["run"], "src.tracking", MLFLOW_TRACKING_URI=store).wait(300) for name in ("one", "two")
    ]
    outcome = f"two runs at once on an empty PostgreSQL: statuses {statuses}, deliveries {later}"
    return judged(outcome, not any([*statuses, *later]))


def main(folder: Path, names: list[str]) -> list[str]:
    """Try SQLite, and PostgreSQL if it is installed, or one of both; return what was wrong."""
    wrong = four_jobs(folder / "sqlite", "SQLite", None) if "sqlite" in names else []
    if "postgresql" not in names:
        return wrong
    if not list(Path("/usr/lib/postgresql").glob("*/bin/initdb")):
        print("no PostgreSQL")
        return wrong
    with Postgres(folder / "cluster") as postgres:
        wrong += two_at_once(folder / "together", postgres.uri)
        return wrong + four_jobs(folder / "postgresql", "PostgreSQL", postgres.uri)


if __name__ == "__main__":
    campaign(__doc__, main, names=["sqlite", "postgresql"])
