"""What README and docs/ point to is there, their commands compose, and every metric and option is explained."""

import json
import math
import re
import shlex
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
from omegaconf import OmegaConf

from src import cli
from src.config.schema import Data
from src.evaluation import evaluate
from src.reporting import report
from src.runs.metrics_file import encode
from src.sweeps import jobs
from src.system.environment import CONF
from tests.composing import options
from tests.conftest import PROJECT
from tests.made_up_runs import STUDY
from tests.pages import PAGES
from tests.training.training_runs import METRICS, OF_METHOD


def typed_lines(module):
    """The arguments of each line that runs src.MODULE with some, in a block or within a sentence.

    Lines with --config-dir are left out: tests/test_extending.py makes the folder that they need, and runs them.
    """
    line = re.compile(rf"-m src\.{module} ((?!.*--config-dir|--help)[^`\n#]+)")
    found = {each.strip() for page in PAGES for each in line.findall(page.read_text())}
    return sorted(each for each in found if "=" in each)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_to_files(page):
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text())
    for target in targets:
        assert (page.parent / target).exists(), target


def test_every_page_is_linked_from_the_readme():
    readme = (PROJECT / "README.md").read_text()
    for page in PAGES[1:]:
        assert f"(docs/{page.name})" in readme


def test_every_metric_is_explained():
    explained = set(re.findall(r"`([a-z]+(?:/\w+)+)`", (PROJECT / "docs/metrics.md").read_text()))
    assert METRICS | set().union(*OF_METHOD.values()) <= explained


@pytest.fixture
def printed(typed):
    """A function that runs a command with a line of arguments, and returns what it has printed."""

    def run(entry, line, *more):
        status, out, err = typed(entry, *shlex.split(line), *more)
        assert status == 0, err
        return out

    return run


@pytest.mark.parametrize("line", typed_lines("train"))
def test_every_training_command_can_run(printed, monkeypatch, line):
    """A dry run composes every job of it. Images and weights, which stand for the user's own, are not looked for."""
    one_seed = ["seed=0"] if "+sweep=" in line else []  # three seeds would take three times as long
    for module in (cli, jobs):
        monkeypatch.setattr(module, "known_fingerprint", lambda data: None)
        monkeypatch.setattr(module.origin, "identify", lambda cfg: None)
    assert re.search(r"\d+ jobs?, \d+ to run", printed(cli.train, line, *one_seed, "dry_run=true"))


@pytest.mark.parametrize("line", typed_lines("evaluate"))
def test_every_evaluation_fits_a_run(printed, monkeypatch, line):
    """Its settings fit a run with the default settings, or one with a teacher; that run does not have to exist."""
    trained = []
    monkeypatch.setattr(cli, "pretrain", trained.append)
    printed(cli.train, "experiment=mnn" if "evaluation.teacher" in line else "")
    saved = OmegaConf.to_container(trained[0], resolve=True)
    checked = []
    monkeypatch.setattr(evaluate, "_checkpoint", lambda composed: (Path("run/checkpoints/last"), {"config": saved}))
    monkeypatch.setattr(evaluate, "load", lambda data: checked.append(data) or sys.exit(0))
    printed(cli.evaluate, line)
    assert [type(data) for data in checked] == [Data]


@pytest.mark.parametrize("line", typed_lines("report"))
def test_every_report_can_be_made(printed, monkeypatch, line):
    """Made-up runs stand in for those of the experiment or the sweep."""
    monkeypatch.setattr(report, "read_runs", lambda experiment, backend, root: STUDY)
    monkeypatch.setattr(report, "read_sweep", lambda sweep, backend, root: (f"study-{sweep}", STUDY))
    table = re.search(r"^table: (\S+)", printed(cli.report, line), re.MULTILINE)[1]
    assert "NNCLR" in Path(table).read_text()


def test_the_lines_for_tensorboard_copy_every_value(tmp_path, monkeypatch):
    """A stub stands for TensorBoard, which is not installed with this project."""
    values = [("train/loss", math.nan, 0), ("train/loss", 2.5, 3), ("val/knn_top1", math.inf, 3)]
    rows = [{"step": step, "time": 1, "metrics": encode({key: value})} for key, value, step in values]
    (tmp_path / "multirun/NAME").mkdir(parents=True)
    (tmp_path / "multirun/NAME/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    writer = MagicMock()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=writer))
    (lines,) = re.findall(r"^ {4}import json\n(?: {4}.*\n)+", (PROJECT / "docs/runs.md").read_text(), re.MULTILINE)
    exec(textwrap.dedent(lines), {})
    copied = [call.args for call in writer().__enter__().add_scalar.call_args_list]
    assert str(copied) == str(values)  # NaN is not equal to itself


def test_there_are_lines_of_every_command():
    assert all(typed_lines(module) for module in ("train", "evaluate", "report"))


def test_every_target_of_make_is_one():
    targets = set(re.findall(r"^([a-z-]+):", (PROJECT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        assert set(re.findall(r"(?:`|^    )make ([a-z-]+)", page.read_text(), re.MULTILINE)) <= targets, page


@pytest.mark.parametrize(
    "group", [path.name for path in sorted(CONF.iterdir()) if path.is_dir() and path.name not in ("hydra", "shared")]
)
def test_every_option_is_listed_and_no_other(group):
    page = (PROJECT / "docs/first-steps.md").read_text()
    row = re.search(rf"^\| `\+?{group}`.*$", page, re.MULTILINE)[0]
    assert set(re.findall(r"`(\w+)`", row)) - {group, "k", "queue_size"} == set(options(group))
