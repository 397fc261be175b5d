import io
import re
from contextlib import suppress

import pytest
import rich
from rich.console import Console

from src.training import progress as module
from src.training.progress import Progress


def test_a_line_an_epoch_and_one_every_ten_seconds(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    progress = Progress(epochs=3, steps=4, batch_size=2)
    for step, at in ((1, 1.0), (2, 9.9), (3, 10.0), (4, 12.0)):
        now[0] = at
        progress.step(step, loss=1.5)
    progress.epoch(0, 1.25, {"val/knn_top1": 12.34, "time/images_per_second": 567.8, "support/dead": 3.0})
    assert capsys.readouterr().out == (
        "epoch 1/3  step 3/4  loss 1.500\nepoch 1/3  loss 1.250  val kNN 12.3%  568 images/s\n"
    )


@pytest.fixture
def terminal(monkeypatch):
    """Everything that is sent to a simulated terminal of 120 columns."""
    sent = io.StringIO()
    monkeypatch.setattr(rich, "_console", Console(file=sent, force_terminal=True, width=120))
    monkeypatch.setattr(module, "in_terminal", lambda: True)
    return sent


def test_a_terminal_has_a_bar_and_no_lines(terminal, capsys):
    with Progress(epochs=3, steps=4, batch_size=2) as progress:
        for step in range(5, 9):  # the run was resumed after its first epoch
            progress.step(step, loss=step / 4)
        progress.epoch(1, 2.0, {"val/knn_top1": 12.34})
        progress.step(9, loss=1.5)
        progress.epoch(2, 1.5, {})
        (task,) = progress._bar.tasks
        assert (task.completed, task.total) == (9, 12)
    last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue()).strip().splitlines()[-1]
    assert last.startswith("epoch 3/3  step 1/4  loss 1.500 ")
    assert re.search(r" \d+ images/s .*val kNN 12\.3%$", last)
    assert terminal.getvalue().count("\x1b[?25l") == terminal.getvalue().count("\x1b[?25h") == 1
    assert capsys.readouterr().out == ""


def test_a_run_that_is_stopped_gives_the_cursor_back(terminal):
    with suppress(SystemExit), Progress(epochs=3, steps=4, batch_size=2) as progress:
        progress.step(1, loss=1.0)
        raise SystemExit(143)
    assert terminal.getvalue().endswith("\x1b[?25h")
