"""The command lines of the campaigns of `make reliability` and `make clusters`, and their verdicts."""

import runpy
import sys

import pytest

from scripts.reliability.campaign import campaign, judged
from tests.conftest import PROJECT

LINE = next(line for line in (PROJECT / "Makefile").read_text().splitlines() if line.startswith("CAMPAIGNS :="))
CAMPAIGNS = [*LINE.split(":=")[1].split(), "clusters"]


@pytest.mark.parametrize("name", CAMPAIGNS)
@pytest.mark.parametrize(("arguments", "status"), [(["--help"], 0), ([], 2), (["folder", "none"], 2)])
@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_a_campaign_explains_itself_and_begins_nothing(name, arguments, status, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"scripts.reliability.{name}", run_name="__main__")
    assert end.value.code == status
    out, err = capsys.readouterr()
    assert "FOLDER" in (err if status else out)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        ([], {"names": ["one", "two"], "kills": 5}),
        (["7"], {"names": ["one", "two"], "kills": 7}),
        (["7", "two"], {"names": ["two"], "kills": 7}),
    ],
)
def test_a_campaign_takes_its_arguments_and_fails_with_its_faults(arguments, given, tmp_path, monkeypatch, capsys):
    def main(**arguments):
        assert arguments == {"folder": tmp_path / "new", **given}
        return judged("2 rows lost", False) + judged("0 rows lost", True)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["campaign", "new", *arguments])
    with pytest.raises(SystemExit) as end:
        campaign("what it tries", main, names=["one", "two"], kills=5)
    assert end.value.code == 1
    assert capsys.readouterr().out == "2 rows lost\n0 rows lost\nwhat went wrong: ['2 rows lost']\n"


def test_a_campaign_without_faults_succeeds(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["campaign", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        campaign("what it tries", lambda folder: [])
    assert end.value.code == 0
    assert capsys.readouterr().out == "what went wrong: nothing\n"


def test_a_name_that_a_campaign_does_not_have_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["campaign", str(tmp_path), "one", "three"])
    with pytest.raises(SystemExit) as end:
        campaign("what it tries", pytest.fail, names=["one", "two"])
    assert end.value.code == 2
    assert "three: choose from one, two" in capsys.readouterr().err
