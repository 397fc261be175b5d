"""What README and docs/ point to is there, their commands compose, and every metric and option is explained."""

import re
import shlex
import sys

import pytest
from hydra.core.global_hydra import GlobalHydra

from src import cli
from src.sweeps import jobs
from tests.config.test_schema import CONF, options
from tests.conftest import PROJECT
from tests.training.test_loop import METRICS, OF_METHOD

PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
# The arguments of each line that runs src.train, in a block or within a sentence. What --config-dir adds to them is a
# folder that only tests/test_extending.py makes, and it runs these lines.
COMMAND = re.compile(r"-m src\.train ((?!.*--config-dir|--help)[^`\n#]+)")
COMMANDS = sorted({line.strip() for page in PAGES for line in COMMAND.findall(page.read_text()) if "=" in line})


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


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_can_run(tmp_path, monkeypatch, capsys, line):
    """A dry run of it composes every job; images and weights that stand for the user's own are not looked for."""
    one_seed = ["seed=0"] if "+sweep=" in line else []  # of a sweep's three, which takes a third of the time
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["src", *shlex.split(line), *one_seed, "dry_run=true"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    for name in ("outlive_readers", "redact_output"):  # which change the streams of the process
        monkeypatch.setattr(cli, name, lambda: None)
    for module in (cli, jobs):
        monkeypatch.setattr(module, "known_fingerprint", lambda data: None)
        monkeypatch.setattr(module.origin, "identify", lambda cfg: None)
    status = 0
    try:
        cli.train()
    except SystemExit as end:
        status = end.code
    finally:
        GlobalHydra.instance().clear()
    said = capsys.readouterr()
    assert status == 0, said.err
    assert re.search(r"\d+ jobs, \d+ to run", said.out)


@pytest.mark.parametrize(
    "group", [path.name for path in sorted(CONF.iterdir()) if path.is_dir() and path.name not in ("hydra", "shared")]
)
def test_every_option_is_listed(group):
    page = (PROJECT / "docs/first-steps.md").read_text()
    row = re.search(rf"^\| `\+?{group}`.*$", page, re.MULTILINE)[0]
    assert set(options(group)) <= set(re.findall(r"`([\w]+)`", row))
