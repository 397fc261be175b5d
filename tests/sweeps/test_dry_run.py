import re

import pytest

from src.config import identity
from src.runs import directory as run_directory
from src.runs.record import Record
from src.sweeps.dry_run import preview
from tests.composing import parsed


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def ran(cfg, seconds, status="FINISHED", **tags):
    """Leave the record of a run that was worked on for so many seconds."""
    directory = run_directory.path_of(cfg)
    directory.mkdir(parents=True)
    record = Record.new(directory.name, "support-sets")
    record.params = {key: str(value) for key, value in identity.flat(cfg).items()}
    record.status, record.seconds, record.tags = status, seconds, tags
    record.save(directory)


def estimates(shown):
    """The time after "about" in each line, or an empty string: one for each job, the last for all of them."""
    return [found[1] if (found := re.search(r"about ([\d.]+ \w+)", line)) else "" for line in shown.splitlines()]


def jobs(*seeds, method="kmclr", epochs=10):
    known = "+data.fingerprint=0123456789abcdef"
    return [parsed(f"method={method}", f"epochs={epochs}", f"seed={seed}", known) for seed in seeds]


def test_nothing_is_known_before_a_run_has_finished():
    shown = preview(jobs(0, 1), at_a_time=2)
    assert estimates(shown) == ["", "", ""]
    assert shown.endswith("2 jobs, 2 to run; no time known for 2: none like them has finished yet")


def test_a_job_of_unknown_images_is_to_do_and_has_no_hash():
    done = jobs(0)[0]
    ran(done, 3000)
    done.data.fingerprint = None
    assert preview([done], at_a_time=1).splitlines()[0].split() == [
        *("0", "to", "do", "400", "kmclr-k400-cifar100-resnet18-seed0", "about", "50", "min"),
    ]


def test_what_tells_a_job_from_others_of_its_name_stands_beside_the_name():
    ran(jobs(0)[0], 3000)
    shown = preview(jobs(1, 2), 1, ["schedule=step schedule.gamma=0.2", ""]).splitlines()
    assert shown[0].endswith("  schedule=step schedule.gamma=0.2  about 50 min")
    assert len(shown[1].split()) == 8


def test_time_goes_with_epochs_and_what_is_done_is_taken_off():
    """The estimate of a job grows with its epochs, and the time that it has already worked is subtracted."""
    done, halved, fresh, longer = *jobs(0, 1, 2), *jobs(3, epochs=20)
    ran(done, 3000)
    ran(halved, 1200, "KILLED")
    shown = preview([done, halved, fresh, longer], at_a_time=1)
    assert [line.split()[1] for line in shown.splitlines()[:4]] == ["finished", "killed", "to", "to"]
    assert estimates(shown) == ["", "30 min", "50 min", "100 min", "3.0 h"]


def test_a_job_that_has_diverged_is_not_to_run():
    first, second, third = jobs(0, 1, 2)
    ran(first, 100)
    ran(second, 50, "FAILED", diverged="true")
    shown = preview([first, second, third], at_a_time=1)
    assert " diverged " in shown.splitlines()[1]
    assert estimates(shown) == ["", "", "100 s", "100 s"]
    assert "3 jobs, 1 to run, about" in shown


def test_jobs_side_by_side_take_no_less_than_the_longest():
    ran(jobs(0)[0], 3000)
    assert estimates(preview(jobs(1, 2, 3, 4), at_a_time=2))[-1] == "100 min"
    assert estimates(preview(jobs(1), at_a_time=8))[-1] == "50 min"


def test_a_method_is_judged_by_its_own_runs_if_there_are_any():
    ran(jobs(0)[0], 3000)
    ran(jobs(0, method="simclr")[0], 1000)
    assert estimates(preview(jobs(1, method="simclr"), at_a_time=1))[0] == "17 min"
    assert estimates(preview(jobs(1, method="nnclr"), at_a_time=1))[0] == "33 min", "the mean of the others"


def test_runs_of_other_images_or_networks_tell_nothing():
    ran(parsed("backbone=resnet50"), 3000)
    ran(parsed("data.limit=1000"), 3000)
    assert "no time known for 1" in preview(jobs(0), at_a_time=1)


def test_finished_runs_of_another_evaluation_are_named_in_one_line(caplog):
    for cfg in jobs(0, 1):
        ran(cfg, 3000)
    now = jobs(0, 1, 2)
    preview(now, at_a_time=1)
    assert not caplog.messages
    for cfg in now:
        cfg.evaluation.epochs = 20
    assert "3 jobs, 1 to run" in preview(now, at_a_time=1)
    (said,) = caplog.messages
    assert said.startswith("2 finished jobs were evaluated otherwise (evaluation.epochs was 100 and is 20): ")
