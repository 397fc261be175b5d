"""scripts/gpu_plan.py: what runs, in which order, for how long; and every plan with networks that take seconds."""

import copy
import functools
import os
import re
import subprocess
from dataclasses import replace

import pytest

from scripts import gpu_plan
from scripts.workbench import compose
from src.config import identity, schema
from src.errors import UsageError
from src.evaluation import protocol
from src.reporting.rows import summarise
from src.runs import directory as run_directory
from src.runs.record import TAG_DIVERGED, Record, records_below
from src.system.stopping import TIME_IS_UP
from tests.conftest import PROJECT

# Seconds on an H100: an epoch of 45,000 images at batch 512, without and with a teacher; the time until a plan's first
# step; and what each run takes besides its epochs.
EPOCH, TAUGHT_EPOCH, START, RUN = 1.32, 1.85, 41, 16


def seconds(cfg):
    epoch = TAUGHT_EPOCH if isinstance(cfg.objective, schema.MomentumTeacher) else EPOCH
    return RUN + cfg.epochs * epoch * (50 / 45 if cfg.data.final else 1)


@pytest.mark.parametrize(("name", "runs"), [("teacher", 3), ("screen", 3), ("long", 1), ("published", 3), ("curve", 5)])
def test_so_many_runs_fit_into_a_slice(name, runs):
    """On an H100, at least this many of a plan's first runs end within its minutes, less the reserve."""
    plan = gpu_plan.PLANS[name]
    taken = START + sum(seconds(compose(*each)) for each in plan.runs[:runs])
    assert taken <= 60 * plan.minutes - gpu_plan.RESERVE


@pytest.fixture
def trained(tmp_path, cache_dir, monkeypatch):
    """A function that follows a plan whose runs end at once, with the given statuses.

    It returns the status of the plan, and of each run its name, its epochs and the minutes that it was given.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu_plan, "report", lambda *_: None)

    def follow(name, *overrides, minutes=10.0, **statuses):
        runs = []

        def train(cfg, left):
            what = identity.run_name(cfg).removesuffix("-digits-resnet18-seed0")
            runs.append((what, cfg.epochs, left))
            status = statuses.get(what.replace("-", "_"), 0)
            end(cfg, "FINISHED" if status == 0 else "KILLED" if status == TIME_IS_UP else "FAILED")
            return status

        monkeypatch.setattr(gpu_plan, "train", train)
        images = ["data=digits", f"data.cache_dir={cache_dir}"]
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)
        return gpu_plan.follow(name, minutes, out, [*images, *overrides], "the command"), runs

    def end(cfg, status):
        directory = run_directory.path_of(cfg)
        directory.mkdir(parents=True, exist_ok=True)
        record = Record.new(identity.run_name(cfg), "support-sets")
        record.params = {key: str(value) for key, value in identity.flat(cfg).items()}
        record.seconds, record.status = 2.0 * cfg.epochs, status
        record.save(directory)

    return follow


def test_runs_in_order_and_none_twice(trained):
    status, runs = trained("teacher")
    assert status == 0
    assert [what for what, *_ in runs] == ["byol", "mnn-queue4096", "mnn_prototypes-k400"]
    lefts = [left for *_, left in runs]
    assert lefts == sorted(lefts, reverse=True)
    assert 9 < lefts[0] <= 10 - gpu_plan.RESERVE / 60
    assert trained("teacher") == (0, [])


def test_the_records_that_were_kept_are_enough(trained, tmp_path):
    """Only the records in OUT are left: a borrowed machine keeps nothing else."""
    trained("teacher", mnn_prototypes_k400=1)
    (tmp_path / "multirun").rename(tmp_path / "lost")
    _, runs = trained("teacher")
    assert [what for what, *_ in runs] == ["mnn_prototypes-k400"]


def test_a_stop_ends_the_plan_which_goes_on_there(trained):
    status, runs = trained("teacher", mnn_queue4096=TIME_IS_UP)
    assert (status, len(runs)) == (TIME_IS_UP, 2)
    _, runs = trained("teacher")
    assert [what for what, *_ in runs] == ["mnn-queue4096", "mnn_prototypes-k400"]


def test_a_failure_leaves_the_others_their_time(trained):
    status, runs = trained("teacher", byol=65)
    assert (status, len(runs)) == (65, 3)


def test_nothing_is_begun_without_time_for_its_end(trained):
    assert trained("teacher", minutes=gpu_plan.RESERVE / 60) == (TIME_IS_UP, [])


def test_runs_that_overrides_make_the_same_run_once(trained, monkeypatch):
    plan = gpu_plan.PLANS["curve"]
    of_each_seed = [run for run in plan.runs if "support=none" in run]
    monkeypatch.setitem(gpu_plan.PLANS, "curve", replace(plan, runs=of_each_seed))
    assert len(of_each_seed) == 3
    _, runs = trained("curve", "seed=0")
    assert len(runs) == 1


def test_a_run_that_diverged_is_not_repeated_on_another_machine_and_is_said_to_have(trained, tmp_path, capsys):
    trained("teacher", mnn_queue4096=65)
    ((folder, record),) = [each for each in records_below(tmp_path / "out") if each[1].status == "FAILED"]
    record.tags |= {TAG_DIVERGED: "true", "error": "diverged at step 3"}
    record.save(folder)
    (tmp_path / "multirun").rename(tmp_path / "lost")
    capsys.readouterr()
    assert trained("teacher") == (65, [])
    assert capsys.readouterr().err == f"{record.name}: diverged at step 3\n"


@pytest.mark.parametrize(
    ("override", "says"), [("data=image_folder data.root=nowhere", "nowhere"), ("epoch=3", "epoch"), ("k=0", "k")]
)
def test_a_mistake_is_one_line(tmp_path, monkeypatch, capsys, override, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        gpu_plan.main(["--plan", "teacher", "--out", "out", "--", *override.split()])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert says in line


def test_a_setting_that_does_not_fit_one_run_is_said_before_the_first_starts(trained, tmp_path):
    with pytest.raises(UsageError, match=r"k: only support=kmeans .* \(in the plan's run method=kmclr .*support=none"):
        trained("screen", "k=8")
    assert not (tmp_path / "multirun").exists()


def test_a_table_that_fails_costs_no_run(trained, monkeypatch, capsys):
    monkeypatch.setattr(gpu_plan, "report", lambda *_: 1 / 0)
    status, runs = trained("teacher")
    assert (status, len(runs)) == (0, 3)
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_the_suite_follows_a_plan_in_its_minutes(python, tmp_path, cache_dir):
    images = ["data=digits", f"data.cache_dir={cache_dir}"]
    environment = os.environ | {"PYTHON": python, "OUT": str(tmp_path / "out"), "MINUTES": "0"}
    suite = [str(PROJECT / "scripts/gpu_suite.sh"), "teacher", *images]
    stopped = subprocess.run(suite, env=environment, capture_output=True, text=True)
    assert stopped.returncode == TIME_IS_UP
    assert stopped.stderr.endswith("the time is up; the same command continues\n")  # images may have been decoded
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["teacher"]


@pytest.mark.slow
def test_every_plan_at_a_tiny_size(tmp_path, cache_dir, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny = [
        *("data=digits", "data.image_size=8", "data.limit=256", f"data.cache_dir={cache_dir}", "backbone=resnet_tiny"),
        *("batch_size=64", "epochs=2", "seed=0", "projector.hidden=[32]", "projector.out=16"),
        *("objective.predictor_hidden=32", "evaluation.epochs=1", "precision=float32", "device=cpu", "tracking=jsonl"),
    ]
    report, reports = gpu_plan.report, []
    monkeypatch.setattr(gpu_plan, "report", lambda *arguments: reports.append(arguments))  # pictures take a second
    monkeypatch.setattr(gpu_plan.curves, "plot", lambda directory: directory)
    curve = gpu_plan.PLANS["curve"]
    monkeypatch.setitem(gpu_plan.PLANS, "curve", replace(curve, runs=curve.runs[:13]))  # of one seed
    monkeypatch.setattr(protocol.Protocol, "untrained", lambda *_: {})  # takes half the time of so short a run
    composed = functools.cache(compose)
    monkeypatch.setattr(gpu_plan, "compose", lambda *overrides: copy.deepcopy(composed(*overrides)))

    def rows(name):
        status = gpu_plan.main(["--plan", name, "--out", "out", "--", *tiny])
        found, _ = summarise([record for _, record in records_below(tmp_path / f"out/{name}/runs")])
        return status, [(row.method, row.size) for row in found if row.method != "untrained"]

    prototypes = [("mnn_prototypes", k) for k in (50, 100, 200, 400)]
    assert rows("teacher") == (2, [("byol", 0), prototypes[-1]])
    assert "queue_size=4096: is never filled" in capsys.readouterr().err  # the images are too few
    status, ingredients = rows("screen")
    assert (status, len(ingredients)) == (0, len(gpu_plan.PLANS["screen"].runs))
    stored = {("kmclr", 400), prototypes[-1], ("relation_prototypes", 400), ("evolving", 100)}
    assert {*ingredients} == {("nothing_stored", 0), *stored}
    assert rows("long") == (2, [("kmclr", 400)])
    sizes = [("kmclr", k) for k in (50, 100, 200, 400)]
    assert rows("curve") == (2, [("nothing_stored", 0), ("nnclr", 400), *sizes])
    assert rows("published") == (2, [("nothing_stored", 0), *[("kmclr", 400)] * 2])
    assert len(reports) == 3 + len(gpu_plan.PLANS["screen"].runs) + 2 + 13 + 4

    report(*reports[-5])
    assert {path.name for path in (tmp_path / "out/curve").glob("*.*")} >= {"table.md", "plot.png", "curves.png"}
    log = " ".join((tmp_path / "out/curve/log.md").read_text().split())
    assert "How many vectors must be stored?" in log
    assert re.search(r"nothing stored \d+\.\d\d \(\d+\.\d\d\); NNCLR 400", log)
    assert "--plan curve --out out --" in log
    capsys.readouterr()
    gpu_plan.main(["--plan", "teacher", "--out", "out", "--", *tiny])
    assert "started" not in capsys.readouterr().out

    train = gpu_plan.train
    monkeypatch.setattr(gpu_plan, "train", lambda cfg, _: train(cfg, 0.001))
    for word in ("started", "continued"):
        assert gpu_plan.main(["--plan", "long", "--out", "out", "--", *tiny, "epochs=100000"]) == TIME_IS_UP
        out = capsys.readouterr().out
        assert re.search(rf"{word} at step \d+\n(.*\n)*.*stopped at step", out)
