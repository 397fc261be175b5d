import io

import pytest
import rich
from rich.console import Console

from src.sweeps import bars
from src.sweeps.bars import Bars, training_progress
from src.training.progress import Progress


@pytest.mark.parametrize(
    ("text", "share", "known"),
    [
        ("run: started at step 0\n", 0, ""),
        ("epoch 3/4  loss 1.250  val kNN 12.3%\n", 0.75, "epoch 3/4  loss 1.250  val kNN 12.3%"),
        ("epoch 2/4  loss 1.250\nepoch 3/4  step 5/10  loss 1.100\nepoch 3/", 0.625, "epoch 3/4  loss 1.100"),
        ("epoch 4/4  loss 1.250\nevaluating on the test images\n", 1, "epoch 4/4  loss 1.250"),
        ("\n" * 5000 + "epoch 1/2  loss 2.000\n" + "w" * 3000, 0.5, "epoch 1/2  loss 2.000"),
    ],
)
def test_a_jobs_log_says_how_far_it_is(tmp_path, text, share, known):
    (tmp_path / "0.log").write_text(text)
    assert training_progress(tmp_path / "0.log") == (share, known)


def test_a_job_without_a_log_has_not_begun(tmp_path):
    assert training_progress(tmp_path / "0.log") == (0, "")


def test_the_lines_of_a_run_are_understood(tmp_path, monkeypatch, capsys):
    """`training_progress` reads the lines that `Progress` prints."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    lines = Progress(epochs=4, steps=10, batch_size=1)
    for action, share in ((lambda: lines.epoch(1, 2.0, {}), 0.5), (lambda: lines.step(25, 1.5), 0.625)):
        now[0] += 11
        action()
        (tmp_path / "0.log").write_text(capsys.readouterr().out)
        assert training_progress(tmp_path / "0.log")[0] == share


def test_a_terminal_shows_all_jobs_and_those_that_run(tmp_path, monkeypatch):
    sent = io.StringIO()
    monkeypatch.setattr(rich, "_console", Console(file=sent, force_terminal=True, width=120))
    monkeypatch.setattr(bars, "in_terminal", lambda: True)
    monkeypatch.setattr(bars, "LOOK_EVERY_S", 0)
    logs = {f"job {number}": tmp_path / f"{number}.log" for number in range(3)}
    logs["job 1"].write_text("epoch 1/4  loss 1.250\n")
    with Bars(3) as shown:
        shown.look({name: logs[name] for name in ("job 0", "job 1")})
        assert {task.description: task.completed for task in shown.tasks} == {
            "all jobs": 0.25,
            "job 0": 0,
            "job 1": 0.25,
        }
        shown.count()
        shown.look({name: logs[name] for name in ("job 1", "job 2")})
        assert [task.description for task in shown.tasks] == ["all jobs", "job 1", "job 2"]
        assert shown.tasks[0].completed == 1.25
        shown.refresh()
    assert "1 of 3 ended" in sent.getvalue()
    assert [task.description for task in shown.tasks] == ["all jobs"]
    assert sent.getvalue().endswith("\x1b[?25h")


def test_elsewhere_there_is_nothing_to_see(tmp_path, capsys):
    """Without a terminal no bars are shown."""
    with Bars(None) as shown:
        shown.look({"job 0": tmp_path / "0.log"})
        shown.count()
    assert capsys.readouterr() == ("", "")
