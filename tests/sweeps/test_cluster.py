"""The launcher for SLURM, whose commands are replaced by small scripts on the PATH, the work of one job, and presets.

``make clusters`` tries the presets on a real SLURM and a real Ray.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from src.errors import UsageError
from src.sweeps import cluster
from src.sweeps import slurm as slurm_module
from src.sweeps.slurm import SlurmLauncher
from src.sweeps.worker import Work, as_rank
from tests.conftest import PROJECT
from tests.sweeps.launching import jobs_of, run

pytest.importorskip("submitit")


@pytest.fixture
def slurm(program, monkeypatch):
    """Replaces SLURM's commands; returns the folder of the files that they read and write.

    sbatch copies the script that it is given, squeue and sacct print a file, scancel notes the ids. Nothing that is
    submitted runs: a test writes the status that a job would leave.
    """
    tools = program / "tools"
    tools.mkdir()
    for name, text in {
        "srun": "exit 0",
        "sbatch": f"cp $1 {program}/submitted; echo Submitted batch job 7",
        "squeue": f"cat {program}/queue",
        "sacct": f"cat {program}/accounting",
        "scancel": f"echo $1 >> {program}/cancelled",
    }.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    (program / "queue").touch()
    (program / "accounting").touch()
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    for key, value in {"pause": 0.01, "ask_seconds": 0.02, "grace_seconds": 0.1}.items():
        monkeypatch.setattr(cluster.ClusterLauncher, key, value)
    return program


def launcher(**settings):
    return SlurmLauncher(jobs=None, max_num_timeout=3, timeout_min=10, **settings)


def leave(folder, name, status):
    """Write the exit status of a job, as the job does when it ends."""
    (folder / "sweep" / "jobs" / f"{name}.status").write_text(str(status))


@pytest.fixture
def look(monkeypatch):
    """A function that sets what to do before each query of the scheduler, given the number of earlier queries."""

    def use(what):
        asked = []

        def ask(self, waiting):
            what(len(asked))
            asked.append(waiting)
            return real(self, waiting)

        monkeypatch.setattr(cluster.ClusterLauncher, "_ask", ask)
        return asked

    real = cluster.ClusterLauncher._ask
    return use


def test_a_sweep_is_one_array_of_which_all_run_at_once(slurm, look, capsys):
    a, b = jobs_of("k=a status=0", "k=b status=0")
    look(lambda _: [leave(slurm, name, 0) for name in ("k=a", "k=b")])
    (slurm / "queue").write_text("7_0|PENDING|Resources|\n7_1|RUNNING|None|n1\n")
    assert len(list(run(launcher(partition="gpu"), [a, b]))) == 2
    said, script = capsys.readouterr().out.splitlines(), (slurm / "submitted").read_text()
    assert "job 1 is submitted to SLURM as 7_1: k=b (sweep/jobs/k=b.log)" in said
    assert {"job 0 (7_0) waits: Resources", "job 1 (7_1) runs: on n1", "job 0 finished"} <= set(said)
    assert "--array=0-1%2" in script
    assert "--partition=gpu" in script
    assert (a.status, b.status, a.error) == (0, 0, "")


def test_a_look_opens_no_file_of_a_job_that_has_not_ended(slurm, look, monkeypatch):
    jobs = jobs_of("k=a", "k=b", "k=0.5")
    (slurm / "queue").write_text("".join(f"7_{i}|RUNNING|None|n1\n" for i in range(3)))
    read, real = [], Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, **how: read.append(path.name) or real(path, **how))
    at = {2: "k=b", 4: "k=a", 6: "k=0.5"}
    look(lambda times: times in at and leave(slurm, at[times], 0))
    assert [str(job.directory) for job in run(launcher(), jobs)] == list(at.values())
    statuses = [name for name in read if name.endswith(".status")]
    assert statuses == [f"{name}.status" for name in at.values()]


def test_without_a_result_a_job_fails_and_the_others_do_not(slurm, look):
    given = killed, cancelled, failed, fine = jobs_of("k=a", "k=b", "k=c", "k=d")
    (slurm / "queue").write_text("7_1|CANCELLED|None|\n7_2|FAILED|NonZeroExitCode|n1\n7_3|RUNNING|None|n1\n")
    (slurm / "accounting").write_text("7_0|FAILED\n")
    leaves = {0: ("k=c", 2), 1: ("k=d", 0)}
    look(lambda times: times in leaves and leave(slurm, *leaves[times]))
    assert len(list(run(launcher(), given))) == 4
    assert killed.error == "it ended without a result: FAILED"
    assert cancelled.error == "it ended without a result: CANCELLED"
    assert (failed.error, failed.status) == ("exit status 2, see sweep/jobs/k=c.log", 2)
    assert (fine.error, fine.status) == ("", 0)


@pytest.mark.parametrize("fails", [FileNotFoundError, lambda: subprocess.TimeoutExpired("scancel", 120)])
def test_a_scancel_that_fails_ends_no_sweep(monkeypatch, fails):
    def run(*_, **__):
        raise fails()

    monkeypatch.setattr(slurm_module.subprocess, "run", run)
    launcher().cancel("7")


def test_to_begin_anew_is_refused_where_the_same_command_waits_for_its_jobs(slurm):
    with pytest.raises(UsageError, match="resume=never: SLURM may start a job again"):
        list(run(launcher(), jobs_of("k=a"), resume="never"))


def test_a_failing_sacct_leaves_no_job_waiting(slurm):
    (slurm / "tools" / "sacct").write_text("#!/bin/sh\nexit 1\n")
    (job,) = jobs_of("k=a")
    assert list(run(launcher(), [job])) == [job]
    assert job.error == "it ended without a result: SLURM no longer knows it"


def test_the_status_of_a_job_that_is_queued_again_is_not_its_end(slurm, look):
    def next_state(times):
        leave(slurm, "k=a", 0 if times == 4 else 143)
        (slurm / "queue").write_text("7|PENDING|BeginTime|\n")

    (job,) = jobs_of("k=a")
    asked = look(next_state)
    assert list(run(launcher(), [job])) == [job]
    assert (job.status, job.error) == (0, "")
    assert len(asked) >= 5


def test_a_job_that_can_never_start_is_cancelled_and_reported(slurm):
    (job,) = jobs_of("k=a")
    (slurm / "queue").write_text("7|PENDING|PartitionConfig|\n")
    assert list(run(launcher(), [job])) == [job]
    assert job.error.startswith("SLURM can never start it (PartitionConfig, ")
    assert (slurm / "cancelled").read_text() == "7\n"


def test_a_silent_scheduler_is_waited_for(slurm, look, capsys):
    (slurm / "tools" / "squeue").write_text("#!/bin/sh\necho 'slurm_load_jobs error: no controller' >&2; exit 1\n")
    (job,) = jobs_of("k=a")
    look(lambda times: times == 3 and leave(slurm, "k=a", 0))
    assert list(run(launcher(), [job])) == [job]
    assert capsys.readouterr().err.count("squeue does not answer") == 1
    assert job.status == 0


def test_a_refusal_is_one_line(slurm):
    (slurm / "tools" / "sbatch").write_text(
        "#!/bin/sh\necho 'sbatch: error: Batch job submission failed: Invalid generic resource' >&2; exit 1\n"
    )
    with pytest.raises(
        UsageError, match=r"^hydra/launcher=slurm: .*Invalid generic resource; hydra\.launcher\.\*"
    ) as caught:
        list(run(launcher(), jobs_of("k=a", "k=b")))
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match=r"^hydra/launcher=slurm: Unavailable parameter.*colour"):
        list(run(launcher(colour="red"), jobs_of("k=a")))


def test_typed_again_the_command_waits_for_the_jobs_that_are_there(slurm, look, capsys):
    a, b, c = jobs_of("k=a", "k=b", "k=c")
    first = launcher()
    (slurm / "queue").write_text("7_0|RUNNING|None|n1\n7_1|RUNNING|None|n1\n")
    look(lambda _: os.kill(os.getpid(), signal.SIGTERM))
    assert len(list(run(first, [a, b]))) == 2
    assert first.status == a.status == b.status == 128 + signal.SIGTERM
    assert a.error == "it is still with SLURM, as 7_0"
    assert "to stop them: scancel 7\n" in capsys.readouterr().out

    (slurm / "submitted").unlink()
    look(lambda _: [leave(slurm, name, 0) for name in ("k=a", "k=c")])
    assert len(list(run(launcher(), [a, c]))) == 2
    said = capsys.readouterr().out
    assert "job 0 is with SLURM already, as 7_0: k=a" in said
    assert "job 1 is submitted to SLURM as 7: k=c" in said
    assert "--array" not in (slurm / "submitted").read_text()


def test_a_command_killed_before_it_noted_the_ids_finds_its_jobs(slurm, look, monkeypatch, capsys):
    jobs = jobs_of("k=a", "k=b")
    with monkeypatch.context() as killed:
        killed.setattr(cluster, "write_whole", lambda *_: sys.exit(9))
        with pytest.raises(SystemExit):
            list(run(launcher(), jobs))
    assert (slurm / "submitted").exists()
    assert not list((slurm / "sweep" / "jobs").glob("*.id"))

    (slurm / "submitted").unlink()
    (slurm / "queue").write_text("7_0|PENDING|Resources|\n7_1|RUNNING|None|n1\n")
    look(lambda _: [leave(slurm, name, 0) for name in ("k=a", "k=b")])
    for job in (jobs[1], jobs[0]):
        assert list(run(launcher(), [job])) == [job]
    assert "job 0 is with SLURM already, as 7_1: k=b" in capsys.readouterr().out
    assert not (slurm / "submitted").exists()
    assert (slurm / "sweep" / "jobs" / "k=a.id").read_text() == "SLURM 7_0"


@pytest.fixture
def arrays(slurm):
    """sbatch of a cluster with default settings: array indices up to 1,000, and an id of its own for each array.

    It refuses whatever follows the first N submissions, if the file ``most`` holds N.
    """
    (slurm / "tools" / "sbatch").write_text(
        "#!/bin/sh\nlast=$(sed -n 's/.*--array=0-\\([0-9]*\\)%.*/\\1/p' $1)\n"
        f'cd {slurm}; touch count; echo "$last" >> count; times=$(wc -l < count)\n'
        'if [ "${last:-0}" -gt 1000 ] || [ "$times" -gt "$(cat most 2> /dev/null || echo 99)" ]; then\n'
        "echo 'sbatch: error: Invalid job array specification' >&2; exit 1; fi\n"
        "echo Submitted batch job $((6 + times))\n"
    )
    return slurm


def test_a_sweep_of_thousands_is_arrays_of_a_thousand(arrays):
    many = launcher()
    many.sweep = SimpleNamespace(directory=arrays / "sweep")
    work = {str(i): Work([], arrays, arrays / str(i), arrays / "note", {}) for i in range(2001)}
    ids = many.submit(work)
    assert len(set(ids)) == 2001
    assert [*ids[::1000], ids[1999]] == ["7_0", "8_0", "9", "8_999"]
    assert many.unrecorded([each.log for each in work.values()]) == {
        each.log: job_id for each, job_id in zip(work.values(), ids, strict=True)
    }


def test_the_jobs_of_several_arrays_are_found_again_and_stopped(arrays, look, capsys, monkeypatch):
    monkeypatch.setattr(slurm_module, "ARRAY", 2)
    (arrays / "tools" / "sacct").write_text(f"#!/bin/sh\necho $5 >> {arrays}/asked; cat {arrays}/accounting\n")
    jobs = jobs_of("k=a", "k=b", "k=c", "k=d", "k=e")
    (arrays / "queue").write_text("".join(f"{each}|RUNNING|None|n1\n" for each in ("7_0", "7_1", "8_0", "8_1", "9")))
    look(lambda _: os.kill(os.getpid(), signal.SIGTERM))
    assert len(list(run(launcher(), jobs))) == 5
    said = capsys.readouterr().out
    assert "job 3 is submitted to SLURM as 8_1: k=d" in said
    assert "to stop them: scancel 7 8 9\n" in said

    (arrays / "queue").write_text("7_0|RUNNING|None|n1\n")
    (arrays / "accounting").write_text("".join(f"{each}|RUNNING\n" for each in ("7_1", "8_0", "8_1", "9")))
    look(lambda _: [leave(arrays, job.directory, 0) for job in jobs])
    assert len(list(run(launcher(), jobs))) == 5
    assert capsys.readouterr().out.count("is with SLURM already") == 5
    assert (arrays / "count").read_text().split() == ["1", "1"]
    assert "--jobs=7,8,9\n" in (arrays / "asked").read_text()


def test_an_array_that_is_refused_leaves_none_in_the_queue(arrays, monkeypatch):
    monkeypatch.setattr(slurm_module, "ARRAY", 2)
    (arrays / "most").write_text("2")
    with pytest.raises(UsageError, match="Invalid job array specification"):
        list(run(launcher(), jobs_of("k=a", "k=b", "k=c", "k=d", "k=e")))
    assert (arrays / "cancelled").read_text() == "7\n8\n"


@pytest.mark.parametrize(
    ("settings", "tasks", "threads"),
    [
        ({"gpus_per_node": 8, "nodes": 2, "cpus_per_task": 6}, 8, "srun --unbuffered .* --cpus-per-task=6 "),
        ({"gpus_per_node": "a100:4"}, 4, "srun"),
        ({"gpus_per_node": 8, "tasks_per_node": 2}, 2, "srun"),
        ({}, 1, "srun"),
    ],
)
def test_a_run_has_a_task_for_each_gpu(slurm, look, settings, tasks, threads):
    look(lambda _: leave(slurm, "k=a", 0))
    list(run(launcher(**settings), jobs_of("k=a")))
    script = (slurm / "submitted").read_text()
    assert f"--ntasks-per-node={tasks}\n" in script
    assert f"--nodes={settings.get('nodes', 1)}\n" in script
    assert re.search(threads, script)


def test_each_task_of_a_job_is_a_rank_and_the_first_notes_the_end(program, monkeypatch):
    log, note = program / "log", program / "note"
    line = "import os; print(*(os.environ.get(key) for key in {}), sep='|', flush=True)"
    keys = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")
    work = Work([sys.executable, "-c", line.format(keys)], program, log, note, {})
    given = {
        "NTASKS": "4",
        "PROCID": "3",
        "LOCALID": "1",
        "JOB_ID": "7",
        "JOB_NODELIST": "n[5-6]",
        "JOB_NUM_NODES": "2",
    }
    for key, value in given.items():
        monkeypatch.setenv(f"SLURM_{key}", value)
    assert as_rank() == {}  # not started by submitit's srun but, for example, by Ray inside a SLURM job
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    note.write_text("69")
    assert work() == 0
    assert note.read_text() == "69"
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert work() == 0
    assert note.read_text() == "0"
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert work() == 0
    assert log.read_text().splitlines() == ["3|4|1|n5", "0|4|1|n5", "None|None|None|None"]


def test_work_notes_its_status_and_keeps_the_output_of_all_attempts(program, monkeypatch):
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "3")
    log, note = program / "log", program / "note"
    line = [sys.executable, "-m", "src.train", "k=a", "status=2"]
    for _ in range(2):
        assert Work(line, program, log, note, {"CUDA_VISIBLE_DEVICES": "5"})() == 2
    assert note.read_text() == "2"
    assert log.read_text().count("error: no such thing") == 2
    assert (program / "a").read_text() == "3 53 5"


def test_a_job_has_tracebacks_as_the_sweep_says_and_not_as_the_scheduler_hands_on(program, monkeypatch):
    """A job ignores the HYDRA_FULL_ERROR that a scheduler passes on from the environment of the command."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    log = program / "log"
    for said in ({"HYDRA_FULL_ERROR": "1"}, {}):
        Work(["sh", "-c", "echo $HYDRA_FULL_ERROR"], program, log, program / "note", said)()
    assert log.read_text().split() == ["1", "0"]


def test_ahead_of_a_time_limit_work_saves_and_can_be_queued_again(program):
    """The script handles SIGUSR2, which SLURM sends to all processes of a job, as submitit does.

    It asks the work for a checkpoint, which stops the run by SIGUSR1, and exits; submitit would queue the job again.
    """
    script = (
        "import signal, sys\nfrom pathlib import Path\nfrom src.sweeps.worker import Work\n"
        "saves = 'import signal, sys, time; signal.signal(signal.SIGUSR1, lambda *_: sys.exit(138)); "
        "print(1, flush=True); time.sleep(600)'\n"
        "work = Work([sys.executable, '-c', saves], Path(), Path('log'), Path('note'), {})\n"
        "def handler(*_):\n"
        "    again = work.checkpoint()\n"
        "    print(again.function == work, work.process.poll(), flush=True)\n"
        "    sys.exit(9)\n"
        "signal.signal(signal.SIGUSR2, handler)\nwork()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    (program / "src" / "train.py").unlink()
    (program / "src").rmdir()
    process = subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
    while not (program / "log").exists() or not (program / "log").read_text():
        assert process.poll() is None
        time.sleep(0.05)
    (child,) = subprocess.check_output(["pgrep", "-P", str(process.pid)], text=True).split()
    os.kill(int(child), signal.SIGUSR2)  # must not end the child
    time.sleep(0.2)
    process.send_signal(signal.SIGUSR2)
    assert process.communicate(timeout=600)[0] == "True 138\n"
    assert process.returncode == 9
    assert not (program / "note").exists()


@pytest.mark.parametrize(
    ("launcher", "override", "says"),
    [
        (
            "slurm",
            "hydra.launcher.partition=gpu",
            {"SlurmLauncher", "gpus_per_node: 1", "partition: gpu", "mem_gb: 32"},
        ),
        ("slurm_cpu", "jobs=4", {"SlurmLauncher", "gpus_per_node: null", "mem_gb: 8", "timeout_min: 720"}),
        ("ray", "jobs=4", {"RayLauncher", "num_gpus: 1", "jobs: ${jobs}"}),
        (
            "ray_cpu",
            "hydra.launcher.ray.remote.num_cpus=2",
            {"RayLauncher", "num_gpus: 0", "num_cpus: 2", "address: auto"},
        ),
    ],
)
def test_the_presets_of_the_cluster_launchers_compose(command, launcher, override, says):
    done = command("src.train", f"hydra/launcher={launcher}", override, "--cfg", "hydra", "--package", "hydra.launcher")
    assert done.returncode == 0, done.stderr
    assert all(each in done.stdout for each in says), done.stdout
