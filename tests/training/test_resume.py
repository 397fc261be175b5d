import errno
import importlib
import os
import shutil
import signal
import subprocess
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from src import build
from src.errors import CannotWrite, UsageError
from src.evaluation import evaluate
from src.evaluation.probes import FrozenEncoder
from src.reporting import curves
from src.reporting.comparison import comparable
from src.reporting.rows import summarise
from src.runs import checkpoint
from src.runs.record import Record
from src.runs.tracker import Tracker
from src.training import loop
from src.training import run as run_module
from tests.composing import composed
from tests.conftest import ELSEWHERE
from tests.data.layouts import LAYOUTS, write_set
from tests.training.small_net import SMALL_NET, SmallNet
from tests.training.training_runs import ALL, METHODS, assert_same_run, clocked, failing, trained_on


def test_a_run_that_goes_on_within_an_epoch_counts_what_it_took_before(run, stopped, monkeypatch):
    """The epoch's time includes the steps before the stop."""
    clocked(monkeypatch, {(SmallNet, "forward"): 1})
    stopped(1, "method=simclr")
    assert curves.read(run("method=simclr"))["time/epoch_seconds"][1] == [2 * 3] * 2


@pytest.fixture
def trained(run, monkeypatch):
    """A function that trains as ``run`` does, and is killed before the final evaluation."""

    def killed(*_):
        raise KeyboardInterrupt

    def train(*overrides):
        with monkeypatch.context() as patch:
            patch.setattr(loop.Pretraining, "finish", killed)
            with pytest.raises(KeyboardInterrupt):
                run(*overrides)

    return train


def test_a_run_that_is_stopped_in_the_final_evaluation_has_used_its_support_set_all_the_same(run, trained):
    trained("method=nnclr", "queue_size=64")
    assert "support_unused" not in Record.load(run("method=nnclr", "queue_size=64")).tags


@pytest.mark.parametrize(
    ("method", "extra"),
    [
        ("simclr", []),
        ("nnclr", []),
        ("mnn", []),
        ("relation", []),
        ("evolving", []),
        ("evolving", ["objective=teacher", "objective.neighbours=2", "support.every=1"]),
        ("nnclr", ["support.precision=bfloat16"]),
        ("nnclr", ["search=ivf", "search.index='IVF4,Flat'", "search.nprobe=1", "search.refresh_every=3"]),
        ("kmclr", ["support.forget_every=1"]),
        ("kmclr", ["support.forget=decay", "support.half_life=3", "support.revive_after=2"]),
        ("kmclr", ["support.refit=faiss", "support.refit_every=2", "support.refit_window=100"]),
    ],
)
def test_stopped_anywhere_and_continued_it_is_the_unbroken_run(run, stopped, method, extra):
    overrides = [*ALL[method], *extra, "epochs=3"]
    unbroken = run(*overrides, directory="unbroken")
    for steps in (2, 1, 2):
        stopped(steps, *overrides, directory="broken")
        assert Record.load(unbroken.parent / "broken").status == "KILLED"
    assert_same_run(unbroken, run(*overrides, directory="broken"))


def test_another_evaluation_starts_no_training_anew_and_is_said(run, stopped, tmp_path, caplog):
    """A run with changed evaluation settings goes on from its checkpoint; warnings, tags and reports say so."""
    overrides = ["method=simclr", "epochs=2"]
    stopped(4, *overrides)
    directory = tmp_path / "run"
    assert Record.load(directory).status == "KILLED"

    run(*overrides, "evaluation.every=2", "evaluation.knn_k=5")
    record = Record.load(directory)
    assert record.status == "FINISHED"
    assert record.tags["evaluation_changed"].startswith("evaluation.knn_k was 20 and is 5 at step ")
    assert "every" not in record.tags["evaluation_changed"]
    assert "rows logged so far keep the former evaluation (evaluation.knn_k was 20 and is 5)" in caplog.text

    caplog.clear()
    run(*overrides, "evaluation.knn_k=5")
    assert "otherwise" not in caplog.text  # the settings are those of the last session
    run(*overrides, "evaluation.knn_k=9")
    assert "was evaluated otherwise (evaluation.knn_k was 5 and is 9)" in caplog.text
    assert f"python -m src.evaluate run={directory.relative_to(tmp_path)}" in caplog.text
    rows, notes = summarise([record])
    assert [each.params["evaluation.knn_k"] for row in rows for each in row.runs] == ["5", "5"]  # untrained and trained
    assert any("evaluation.knn_k was 20 and is 5 at step 4" in note for note in notes)


def test_a_trained_run_keeps_the_evaluation_of_its_last_validation_and_may_change_what_comes_after(
    run, trained, tmp_path
):
    """Else one row would have validation figures by one evaluation and test figures by another."""
    trained("method=simclr", "evaluation.epochs=9")
    with pytest.raises(UsageError, match=r"run: is trained, and its last validation .*knn_k was 20 and is 3\): repeat"):
        run("method=simclr", "evaluation.epochs=9", "evaluation.knn_k=3")
    assert not Record.load(tmp_path / "run").tags.keys() & {"evaluation.knn_k", "evaluation_changed"}

    ended = Record.load(run("method=simclr", "evaluation.epochs=2"))
    assert ended.tags["evaluation.epochs"] == "2"
    again = evaluate.main(composed(f"run={tmp_path}/run", "device=cpu", name="evaluate"))  # as the last session did
    assert again == {key: ended.metrics[key] for key in again}
    assert "test/linear_top1" in again


def test_another_evaluation_is_said_of_a_run_that_lost_its_checkpoints_and_of_one_that_returns_to_the_first(
    stopped, tmp_path
):
    """The tag lists each change of the evaluation's settings, with the step."""
    overrides, directory = ["method=simclr", "epochs=2"], tmp_path / "run"
    for steps, more in [(2, []), (1, ["evaluation.knn_k=5"]), (1, ["evaluation.bank=30"])]:
        stopped(steps, *overrides, *more)
        if not more:
            shutil.rmtree(directory / "checkpoints")
    tags = Record.load(directory).tags
    assert (tags["evaluation.knn_k"], tags["evaluation.bank"]) == ("20", "30")
    first, second = tags["evaluation_changed"].split("; ")
    assert first == "evaluation.knn_k was 20 and is 5 at step 0"
    assert second == "evaluation.bank was 50000 and is 30, evaluation.knn_k was 5 and is 20 at step 2"


def test_what_an_evaluation_no_longer_has_is_no_setting_of_the_run(run, stopped, tmp_path):
    """Evaluation settings that only an earlier session had are tagged null and left out of comparisons."""
    overrides, directory = ["method=simclr", "epochs=2"], tmp_path / "run"
    stopped(2, *overrides, "evaluation=fewshot")
    run(*overrides, "evaluation.bank=null")
    record = Record.load(directory)
    assert record.tags["evaluation.fewshot.draws"] == record.tags["evaluation.bank"] == "null"
    of_now = comparable(record)
    assert of_now["evaluation.name"] == "linear"
    assert not [key for key in of_now if key.startswith("evaluation.fewshot") or key == "evaluation.bank"]


def test_a_crash_loses_at_most_the_steps_since_the_checkpoint(run, monkeypatch):
    """The lost steps are computed again, and each step is logged once."""
    unbroken = run("method=kmclr", "k=7", "epochs=3", "checkpoint.every=1", directory="unbroken")
    real, calls = loop.seed_everything, []

    def crash(*numbers):
        calls.append(numbers)
        if len(calls) == 5:
            raise RuntimeError("power cut")
        real(*numbers)

    monkeypatch.setattr(loop, "seed_everything", crash)
    with pytest.raises(RuntimeError, match="power cut"):
        run("method=kmclr", "k=7", "epochs=3", "checkpoint.every=1", directory="broken")
    assert Record.load(unbroken.parent / "broken").status == "FAILED"
    monkeypatch.setattr(loop, "seed_everything", real)
    assert_same_run(unbroken, run("method=kmclr", "k=7", "epochs=3", "checkpoint.every=1", directory="broken"))


DAMAGES = {
    "the last row is gone": (lambda lines: lines[:-1], 3),
    "a row in the middle is gone": (lambda lines: [*lines[:-2], lines[-1]], None),
    "all rows but two are gone": (lambda lines: lines[:2], None),
    "the last row has lost its newline": (lambda lines: [*lines[:-1], lines[-1][:-1]], 4),
}


def test_rows_that_a_checkpoint_rests_on_are_missed(run, stopped, tmp_path, caplog, capsys):
    """Lost rows are noticed: the run continues from the checkpoint before them, or is refused if there is none.

    There are checkpoints of steps 3 and 4, and the last row is that of the fourth step.
    """
    overrides = ["method=kmclr", "k=7"]
    unbroken = run(*overrides, directory="unbroken")
    stopped(4, "checkpoint.minutes=0", *overrides, directory="stopped")
    for name, (damage, goes_on_from) in DAMAGES.items():
        shutil.copytree(tmp_path / "stopped", tmp_path / name)
        metrics = tmp_path / name / "metrics.jsonl"
        metrics.write_bytes(b"".join(damage(metrics.read_bytes().splitlines(keepends=True))))
        caplog.clear()
        if goes_on_from is None:
            lost = r"metrics\.jsonl: rows from before step-00000004\.pt are lost or changed: put .* remove .*, and"
            with pytest.raises(UsageError, match=lost):
                run(*overrides, directory=f"'{name}'")
            continue
        assert_same_run(unbroken, run(*overrides, directory=f"'{name}'").with_name(name))
        assert f"continued at step {goes_on_from}" in capsys.readouterr().out
        assert ("trying the checkpoint before" in caplog.text) == (goes_on_from == 3)


@pytest.mark.parametrize("by_another", [False, True])
def test_a_folder_that_is_taken_away_is_missed_and_what_is_put_there_stays(run, tmp_path, monkeypatch, by_another):
    """The run ends with an error, and writes nothing into a folder that somebody else has put in its place."""
    real = loop.seed_everything

    def remove_at_step_4(*numbers):
        if numbers[1:] == (4,):
            shutil.rmtree(tmp_path / "run")
            if by_another:
                (tmp_path / "run").mkdir()
                (tmp_path / "run/metrics.jsonl").write_text("another's\n")
        real(*numbers)

    monkeypatch.setattr(loop, "seed_everything", remove_at_step_4)
    with pytest.raises(CannotWrite, match="run: was removed or replaced while the run worked in it"):
        run("method=simclr", "checkpoint.every=1")
    left = [path.name for path in (tmp_path / "run").glob("*")]
    assert left == (["metrics.jsonl"] if by_another else [])
    if by_another:
        assert (tmp_path / "run/metrics.jsonl").read_text() == "another's\n"


@pytest.mark.parametrize(("where", "write"), [("rows", "log"), ("checkpoint", "whole"), ("record", "write_whole")])
def test_a_full_disk_stops_the_run_and_when_there_is_room_it_is_the_unbroken_one(
    run, tmp_path, monkeypatch, where, write
):
    overrides = ["method=kmclr", "k=7", "epochs=3", "checkpoint.every=1"]
    unbroken = run(*overrides, directory="unbroken")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as patch:
        if where == "rows":
            patch.setattr(run_module, "Tracker", FullAtStep5)
        else:
            writes = importlib.import_module(f"src.runs.{where}")
            patch.setattr(writes, write, failing(getattr(writes, write), full, after=2))
        with pytest.raises(CannotWrite, match=r"run(/metrics\.jsonl)?: No space left on device; mend that, and"):
            run(*overrides)
    assert Record.load(tmp_path / "run").status in ("FAILED", "RUNNING")  # RUNNING if the record cannot be written
    assert_same_run(unbroken, run(*overrides))


def test_a_disk_that_fills_up_before_the_first_step_leaves_no_run_that_seems_to_go_on(run, tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(run_module, "write_whole", failing(run_module.write_whole, full, after=0))
    with pytest.raises(CannotWrite, match="No space left on device") as error:
        run("method=simclr")
    assert error.value.status == 74  # the command's exit status
    assert Record.load(tmp_path / "run").status == "FAILED"


class FullAtStep5(Tracker):
    """Writes only a part of step 5's row, as a full disk does."""

    def log(self, metrics, step):
        if step == 5:
            rows = self._rows
            self._rows = SimpleNamespace(write=lambda row: rows.write(row[:10]), fileno=rows.fileno, close=rows.close)
        super().log(metrics, step)


def test_a_signal_in_the_final_evaluation_is_not_kept_waiting(run, tmp_path, monkeypatch):
    unbroken = run("method=simclr", directory="unbroken")

    def interrupted(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("went on")

    with monkeypatch.context() as patch:
        patch.setattr(loop.Protocol, "final", interrupted)
        with pytest.raises(SystemExit) as end:
            run("method=simclr")
    assert end.value.code == 128 + signal.SIGTERM
    assert Record.load(tmp_path / "run").status == "KILLED"
    assert_same_run(unbroken, run("method=simclr"))


def test_a_signal_in_a_validation_is_looked_at_between_its_blocks(run, tmp_path, monkeypatch):
    """Each command gets the signal in its second validation; the continued run equals the unbroken one."""
    arguments = ["method=kmclr", "k=7", "evaluation.every=1", "epochs=2"]
    unbroken = run(*arguments, directory="unbroken")
    validate, encode, counts = loop.Protocol.validation, FrozenEncoder.encode, []

    def counted(frozen, images):
        counts[-1] += 1
        if len(counts) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return encode(frozen, images)

    def interrupted(*given):
        counts.append(0)
        return validate(*given)

    for step in (3, 6):
        counts.clear()
        with monkeypatch.context() as patch:
            patch.setattr(FrozenEncoder, "encode", counted)
            patch.setattr(loop.Protocol, "validation", interrupted)
            with pytest.raises(SystemExit) as end:
                run(*arguments)
        assert end.value.code == 128 + signal.SIGTERM
        assert counts == [2, 1]  # blocks encoded: validation images and bank; then the validation images alone
        assert Record.load(tmp_path / "run").status == "KILLED"
        assert checkpoint.load_latest(tmp_path / "run/checkpoints")[1]["step"] == step
    assert_same_run(unbroken, run(*arguments))


def test_a_whole_checkpoint_that_no_run_wrote_is_refused(run, tmp_path):
    """Its digest is right, but its content is not that of a run."""
    run("method=simclr", "epochs=1")
    (tmp_path / "run/run.json").unlink()
    _, state = checkpoint.load_latest(tmp_path / "run/checkpoints")
    for broken in ({}, state | {"config": "none"}, state | {"optimizer": {}}, state | {"seconds": 1}):
        checkpoint.save(tmp_path / "run/checkpoints", state["step"], broken)
        with pytest.raises(UsageError, match=r"is not the checkpoint of a run|is of another") as error:
            run("method=simclr", "epochs=1")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_that_was_stopped_continues_on_its_own_images_only(run, stopped, tmp_path, layout):
    a, b = (write_set(layout, tmp_path / name, seed) for seed, name in enumerate("ab"))
    trained_on(partial(stopped, 2), layout, a, "output_dir=run")
    record = (tmp_path / "run/run.json").read_bytes()
    for remove in (False, True):  # without the record, the checkpoint tells the fingerprint
        if remove:
            (tmp_path / "run/run.json").unlink()
        with pytest.raises(UsageError, match=r"data\.fingerprint was [0-9a-f]{16} and is [0-9a-f]{16}"):
            trained_on(run, layout, b, "output_dir=run")
    (tmp_path / "run/run.json").write_bytes(record)
    trained_on(run, layout, a.rename(tmp_path / "moved"), "output_dir=run")
    assert Record.load(tmp_path / "run").status == "FINISHED"


def test_other_conditions_on_resume_are_said_and_another_precision_is_refused(
    run, stopped, tmp_path, monkeypatch, caplog
):
    overrides = ["method=simclr", "precision=auto", "epochs=1"]
    monkeypatch.setattr(build, "precision", lambda *_: torch.float32)
    stopped(1, *overrides)
    before = Record.load(tmp_path / "run").conditions
    assert [(each["step"], each["precision"], each["threads"]) for each in before] == [("0", "float32", "1")]
    code = before[0]["code"]

    with monkeypatch.context() as patch:
        patch.setattr(build, "precision", lambda *_: torch.bfloat16)
        with pytest.raises(UsageError, match="computed in float32 up to step 2, and precision=auto means bfloat16 on"):
            run(*overrides)
    assert Record.load(tmp_path / "run").conditions == before

    torch.set_num_threads(2)
    monkeypatch.setattr(run_module, "project_digest", lambda: "0" * 16)
    run(*overrides)
    changes = f"threads was 1 and is 2, code was {code} and is {'0' * 16}"
    assert f"run: {changes}, so the end may differ from that of an unbroken run" in caplog.text
    record = Record.load(tmp_path / "run")
    assert [(each["step"], each["threads"]) for each in record.conditions] == [("0", "1"), ("2", "2")]
    assert f"continued under other conditions ({changes} from step 2 on): run" in summarise([record])[1]


@pytest.mark.slow
def test_sigkill_at_any_moment_changes_nothing(command, run, small, tmp_path):
    """The real command is killed twice and then left alone; `scripts/reliability/kills.py` kills at random moments.

    KMCLR has the most to save; `test_stopped_anywhere_and_continued_it_is_the_unbroken_run` tries all methods.
    """
    overrides = [*METHODS["kmclr"], "epochs=8", "checkpoint.every=1"]
    unbroken = run(*overrides, directory="unbroken")
    arguments = [*small, *SMALL_NET, *overrides, "tracking=jsonl", "output_dir=broken"]
    for ends, status in (("- 9 3", -signal.SIGKILL), ("- 9 12", -signal.SIGKILL), ("- 0 0", 0)):
        assert command("src.train", *arguments, environment={"ENDS": ends}).returncode == status
    assert_same_run(unbroken, tmp_path / "broken")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGXCPU])
def test_a_signal_stops_the_run_cleanly(command, small, tmp_path, number):
    """The signal comes in the fifth step, which is completed. ``ulimit -S -t`` limits CPU time by sending SIGXCPU."""
    arguments = [*small, *SMALL_NET, "method=kmclr", "k=7", "tracking=jsonl", "output_dir=run"]
    stopped = command("src.train", *arguments, environment={"ENDS": f"- {number:d} 9"})
    assert stopped.returncode == 128 + number
    assert Record.load(tmp_path / "run").status == "KILLED"
    assert curves.read(tmp_path / "run")["train/loss"][0] == list(range(5))
    assert checkpoint.load_latest(tmp_path / "run" / "checkpoints")[1]["step"] == 5


@pytest.mark.slow
def test_a_run_whose_output_nobody_reads_stops_as_by_a_signal(python, small, tmp_path):
    arguments = " ".join([*small, "method=simclr", "tracking=jsonl", "epochs=1000", "output_dir=run"])
    line = f"{python} -m src.train {arguments} | head -1; exit ${{PIPESTATUS[0]}}"
    environment = os.environ | ELSEWHERE
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (128 + signal.SIGPIPE, "run: started at step 0\n")
    assert "Error" not in done.stderr
    assert Record.load(tmp_path / "run").status == "KILLED"


@pytest.mark.slow
def test_max_minutes_stops_resumably(command, small, tmp_path):
    arguments = [*small, "method=simclr", "tracking=jsonl", "output_dir=run", "epochs=1000", "max_minutes=0.002"]
    first = command("src.train", *arguments)
    assert (first.returncode, Record.load(tmp_path / "run").status) == (75, "KILLED")
    assert "the same command continues" in first.stdout
    assert "continued at step" in command("src.train", *arguments).stdout


def test_a_time_that_is_up_after_the_last_step_leaves_the_final_evaluation(run, tmp_path):
    """When ``max_minutes`` is over after the last step, the final evaluation is still made."""
    run("method=simclr", "epochs=1", "batch_size=64", "data.limit=80", "max_minutes=0.00001")
    assert Record.load(tmp_path / "run").status == "FINISHED"
