"""A real SLURM with accounting and a real Ray, which run on this machine for the duration of a ``with`` block.

SLURM's daemons come from Debian: ``apt-get install slurm-wlm slurmdbd mariadb-server munge``. They run as the caller,
who must be root, on loopback with ports different from the defaults, with all files in one folder, and without systemd.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

TOOLS = ("munged", "mariadbd", "mariadb-install-db", "slurmdbd", "slurmctld", "slurmd", "sbatch", "sacctmgr")
CORES, MEMORY_MB = 2, 4000  # of each node
PORTS = {
    "database": 17306,
    "slurmdbd": 17819,
    "slurmctld": 17817,
    "slurmd": 17820,  # the second node's slurmd has the next port
    "ray": 7379,
    "dashboard": 8299,
    "agents": 17830,
}


@contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """Run SLURM; yields the environment variables by which its tools find it.

    It has the partitions ``main``, ``short`` (a limit of five minutes), ``closed`` (down) and ``both``, with two nodes
    that are this machine under two names, of which only the first can be resolved.
    """
    if missing := [tool for tool in TOOLS if not shutil.which(tool)]:
        sys.exit(f"{', '.join(missing)}: not here; apt-get install slurm-wlm slurmdbd mariadb-server munge, as root")
    folder.mkdir(parents=True)
    for name in ("state", "database"):
        (folder / name).mkdir()
    host = socket.gethostname()
    nodes = {host: PORTS["slurmd"], f"{host}2": PORTS["slurmd"] + 1}
    # A requeued job waits until its credential has expired, so the credential's lifetime is short.
    auth = f"AuthType=auth/munge\nAuthInfo=socket={folder}/munge.socket,cred_expire=10"
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    _write(
        folder / "slurmdbd.conf",
        f"{auth}\nSlurmUser=root\nDbdHost=localhost\nDbdAddr=127.0.0.1\nDbdPort={PORTS['slurmdbd']}\n"
        f"StorageType=accounting_storage/mysql\nStorageHost=127.0.0.1\nStoragePort={PORTS['database']}\n"
        f"StorageUser=slurm\nStorageLoc=slurm\nLogFile={folder}/slurmdbd.log\nPidFile={folder}/slurmdbd.pid\n",
    )
    _write(
        folder / "slurm.conf",
        f"{auth}\nClusterName=one\nSlurmctldHost={host}(127.0.0.1)\nSlurmUser=root\nSlurmdUser=root\n"
        f"SlurmctldPort={PORTS['slurmctld']}\nReturnToService=2\nMpiDefault=none\n"
        f"StateSaveLocation={folder}/state\nSlurmdSpoolDir={folder}/spool-%n\nSwitchType=switch/none\n"
        f"SlurmctldLogFile={folder}/slurmctld.log\nSlurmdLogFile={folder}/slurmd-%n.log\n"
        f"SlurmctldPidFile={folder}/slurmctld.pid\nSlurmdPidFile={folder}/slurmd-%n.pid\n"
        "ProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\nJobAcctGatherType=jobacct_gather/none\n"
        "SelectType=select/cons_tres\nSelectTypeParameters=CR_Core_Memory\nKillWait=30\nMinJobAge=2\n"
        "SchedulerParameters=requeue_delay=1\nAccountingStorageType=accounting_storage/slurmdbd\n"
        f"AccountingStorageHost=127.0.0.1\nAccountingStoragePort={PORTS['slurmdbd']}\n"
        f"AccountingStoragePass={folder}/munge.socket\n"
        f"NodeName={','.join(nodes)} NodeHostname={host} NodeAddr=127.0.0.1 Port={','.join(map(str, nodes.values()))} "
        f"CPUs={CORES} RealMemory={MEMORY_MB} State=UNKNOWN\n"
        f"PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE\nPartitionName=both Nodes={','.join(nodes)}\n"
        f"PartitionName=short Nodes={host} MaxTime=5\nPartitionName=closed Nodes={host} State=DOWN\n",
    )
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    data, sql = folder / "database", folder / "database.socket"
    with ExitStack() as daemons:

        def daemon(name: str, *command: str) -> None:
            daemons.enter_context(_daemon(folder / f"{name}.out", command))

        flags = [f"--key-file={folder}/munge.key", f"--socket={folder}/munge.socket", f"--pid-file={folder}/munge.pid"]
        daemon("munged", "munged", "--foreground", "--force", *flags, f"--seed-file={folder}/munge.seed")
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        install = ["mariadb-install-db", "--no-defaults", f"--datadir={data}", "--user=root", "--skip-test-db"]
        subprocess.run([*install, "--auth-root-authentication-method=normal"], check=True, **quiet)  # type: ignore[call-overload]
        database = [f"--datadir={data}", "--user=root", f"--socket={sql}", "--bind-address=127.0.0.1"]
        daemon("mariadbd", "mariadbd", "--no-defaults", *database, f"--port={PORTS['database']}")
        grant = "create user slurm@'%'; create user slurm@localhost; grant all on slurm.* to slurm@'%';"
        grant += "grant all on slurm.* to slurm@localhost;"
        ask = ["mariadb", "--no-defaults", f"--socket={sql}", "--user=root", "--execute"]
        _until(lambda: not subprocess.run([*ask, "select 1"], **quiet).returncode)  # type: ignore[call-overload]
        subprocess.run([*ask, grant], check=True)
        daemon("slurmdbd", "slurmdbd", "-D")
        add = ["sacctmgr", "--immediate", "add", "cluster", "one"]
        _until(lambda: "already exists" in (said := _said(add)) or "Adding" in said)
        daemon("slurmctld", "slurmctld", "-D", "-c")
        for node in nodes:
            daemon(f"slurmd-{node}", "slurmd", "-D", "-N", node)
        _until(lambda: _said(["sinfo", "--noheader", "--partition=both", "--format=%T"]).split() == ["idle"])
        try:
            yield {"SLURM_CONF": str(folder / "slurm.conf")}
        finally:
            subprocess.run(["scancel", "--user=root"])
            _until(lambda: not _said(["squeue", "--noheader"]), 60)


@contextmanager
def ray() -> Iterator[dict[str, str]]:
    """Run a Ray cluster; yields the environment variables by which ``address=auto`` finds it."""
    tool = str(Path(sys.executable).with_name("ray"))
    head = [tool, "start", "--head", "--block", "--disable-usage-stats", f"--num-cpus={CORES}", "--num-gpus=0"]
    ports = [f"--port={PORTS['ray']}", f"--dashboard-port={PORTS['dashboard']}"]
    address = f"127.0.0.1:{PORTS['ray']}"
    with _daemon(Path("/dev/null"), [*head, *ports]):
        _until(lambda: not subprocess.run([tool, "status", f"--address={address}"], capture_output=True).returncode)
        yield {"RAY_ADDRESS": address}


@contextmanager
def _daemon(output: Path, command: list[str] | tuple[str, ...]) -> Iterator[None]:
    """Run a process for the duration of the block; at the end terminate it, or if needed kill its whole session."""
    with output.open("ab") as file:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _write(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o600)


def _said(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout + done.stderr


def _until(condition: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("a daemon does not answer")
        time.sleep(0.5)
