"""What is averaged, what is never averaged, and what the reader is told; then the files."""

import csv
import json
import math
import re
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src import report
from src.errors import UsageError
from src.record import Record
from src.report import (
    Arguments,
    caption,
    courses,
    distinguishing,
    parse,
    plot,
    records,
    select,
    summarise,
    table,
    write,
)
from src.runs import Run

ROOT = Path(__file__).parents[1]


def run(method, size=0, seed=0, top1=50.0, status="FINISHED", at=0.0, name=None, **params):
    own = {"nnclr": {"queue_size": str(size)}, "kmclr": {"k": str(size), "method.forget": "reset"}}.get(method, {})
    common = {
        "method.name": method,
        "method.temperature": "0.2",
        "seed": str(seed),
        "data.name": "cifar100",
        "backbone.name": "resnet18",
        "epochs": "500",
        "support_set_size": str(size),
        "support_bytes": str(size * 1024),
        "output_dir": f"multirun/{method}{size}-{seed}-{at}",
    }
    metrics = {
        "val/knn_top1": top1 - 5,
        "val/linear_top1": top1 + 1,
        "test/linear_top1": top1,
        "test/linear_top5": top1 + 30,
    }
    name = name or f"{method}-{size}-seed{seed}"
    return Run(f"{name}@{at}", name, status, common | own | params, metrics, None, {}, at)


def without(one, metric):
    return replace(one, metrics={key: value for key, value in one.metrics.items() if key != metric})


STUDY = [
    *(run("kmclr", k, seed, 54 + k / 200 + seed / 2) for seed in range(3) for k in (400, 50, 1000)),
    *(run("nnclr", size, seed, 57 + seed / 3) for seed in range(3) for size in (98304, 4096)),
    *(run("simclr", 0, seed, 52 + seed / 4) for seed in range(3)),
]


def test_rows_are_in_the_order_of_methods_then_sizes_whatever_the_order_of_runs():
    expected = [("simclr", 0), ("nnclr", 4096), ("nnclr", 98304), ("kmclr", 50), ("kmclr", 400), ("kmclr", 1000)]
    for runs in (STUDY, STUDY[::-1]):
        rows, notes = summarise(runs)
        assert [(row.method, row.size) for row in rows] == expected
        assert notes == []


@given(st.lists(st.floats(0, 100), min_size=1, max_size=6))
@settings(max_examples=50)
def test_mean_and_sample_deviation_over_seeds(accuracies):
    (row,), _ = summarise([run("simclr", seed=seed, top1=top1) for seed, top1 in enumerate(accuracies)])
    assert row.mean("test/linear_top1") == pytest.approx(np.mean(accuracies))
    if len(accuracies) == 1:
        assert math.isnan(row.std("test/linear_top1"))
    else:
        assert row.std("test/linear_top1") == pytest.approx(np.std(accuracies, ddof=1), abs=1e-9)


def test_the_table_reads_as_a_paper_would_print_it():
    header, *body = table(summarise(STUDY)[0])
    assert header == [
        *("method", "vectors", "bytes", "of largest queue", "seeds"),
        *("val kNN", "val linear top-1", "test linear top-1", "test linear top-5"),
    ]
    deviation = statistics.stdev([52, 52.25, 52.5])
    assert body[0] == [
        *("SimCLR", "0", "0 bytes", "0.00%", "3"),
        *(f"{mean} ± {deviation:.2f}" for mean in ("47.25", "53.25", "52.25", "82.25")),
    ]
    assert body[2][:4] == ["NNCLR", "98,304", "100.7 MB", "100.00%"]
    assert body[4][:4] == ["KMCLR", "400", "409.6 kB", "0.41%"]  # 400 / 98,304


def test_one_seed_has_no_deviation_and_no_queue_no_share():
    (row,), _ = summarise([run("kmclr", 50, top1=54.66)])
    assert table([row])[1][3:] == ["-", "1", "49.66", "55.66", "54.66", "84.66"]


def test_runs_that_differ_in_a_setting_are_not_averaged_and_the_row_says_which():
    runs = [run("simclr", epochs="500", top1=60), run("simclr", epochs="5", top1=20)]
    rows, notes = summarise([*runs, run("simclr", epochs="500", seed=1, top1=62)])
    assert {row.variant: row.mean("test/linear_top1") for row in rows} == {"epochs=500": 61, "epochs=5": 20}
    assert [row.label for row in rows] == ["SimCLR", "SimCLR, epochs=5"]
    assert notes == [
        "the runs also differ in epochs: each combination has its own row",
        "where a row does not say otherwise: epochs=500",
        "the rows differ in their number of seeds: 1 to 2",
    ]


def test_a_setting_that_only_some_runs_have_keeps_them_apart():
    rows, _ = summarise([run("simclr", **{"data.limit": "100"}), run("simclr", seed=1)])
    assert sorted(row.variant for row in rows) == ["", "data.limit=100"]


def test_settings_of_a_method_are_compared_among_its_own_runs_only():
    runs = [run("simclr", **{"method.temperature": "0.1"}), run("kmclr", 50), run("kmclr", 400)]
    assert [row.variant for row in summarise(runs)[0]] == ["", "", ""]
    rows, notes = summarise([*runs, run("kmclr", 50, **{"method.forget": "decay"})])
    assert [row.label for row in rows] == ["SimCLR", "KMCLR", "KMCLR", "KMCLR, forget=decay"]
    assert "where a row does not say otherwise: KMCLR's forget=reset" in notes


def test_a_setting_that_half_of_the_runs_have_is_always_said():
    runs = [run("simclr", epochs="5"), run("kmclr", 50)]
    assert [row.label for row in summarise(runs)[0]] == ["SimCLR, epochs=5", "KMCLR, epochs=500"]
    runs = [run("simclr", seed=seed, **{"data.limit": "100"}) for seed in range(2)] + [run("simclr")]
    assert [row.label for row in summarise(runs)[0]] == ["SimCLR", "SimCLR, data.limit=100"]


def test_a_recipe_of_many_settings_is_named_by_one_and_the_note_names_the_rest():
    original = {"batch_size": "64", "optimizer.lr": "0.2", "method.temperature": "0.1"}
    runs = [run("kmclr", k, batch_size="256", **{"optimizer.lr": "0.3"}) for k in (50, 400)]
    runs += [run("kmclr", 400, **original), run("nnclr", 4096, **original)]
    rows, notes = summarise(runs)
    assert [(row.label, row.size) for row in rows] == [
        ("NNCLR, batch_size=64", 4096),
        ("KMCLR, batch_size=256", 50),
        ("KMCLR, batch_size=256", 400),
        ("KMCLR, batch_size=64 and 1 more", 400),  # that not half of all runs have its learning rate cannot be said
    ]
    assert "with batch_size go method.temperature, optimizer.lr" in notes
    rows, _ = summarise([*runs, run("simclr", batch_size="256", **{"optimizer.lr": "0.3"})])
    assert [row.label for row in rows] == [
        *("SimCLR", "NNCLR, batch_size=64 and 1 more", "KMCLR", "KMCLR", "KMCLR, batch_size=64 and 2 more")
    ]


def test_the_name_of_an_option_names_a_recipe():
    runs = [run("simclr", seed=seed, **{"optimizer.name": "lars", "lr": "0.4"}) for seed in (0, 1)]
    rows, _ = summarise([*runs, run("simclr", **{"optimizer.name": "sgd", "lr": "0.3"})])
    assert [row.label for row in rows] == ["SimCLR", "SimCLR, optimizer.name=sgd and 1 more"]


def test_seeds_that_were_computed_otherwise_are_noted():
    runs = [
        replace(run("kmclr", 50, seed), tags={"dtype": dtype}) for seed, dtype in enumerate(["float32", "bfloat16"])
    ]
    assert summarise(runs)[1] == ["the runs of a row differ in dtype: KMCLR 50"]
    assert summarise([*runs[:1], replace(run("simclr"), tags={"dtype": "bfloat16"})])[1] == ["rows differ in dtype"]
    assert summarise([*runs[:1], run("simclr")])[1] == []  # of an older version, which did not say


@given(st.lists(st.tuples(*[st.integers(0, 2)] * 3), min_size=1, max_size=12))
def test_the_keys_that_name_rows_tell_apart_all_that_differ_and_none_is_idle(settings_of_runs):
    keys = ["batch_size", "epochs", "optimizer.lr"]
    runs = [run("simclr", **dict(zip(keys, map(str, values), strict=True))) for values in settings_of_runs]
    names = distinguishing(runs, keys)

    def groups(chosen):
        return len({tuple(each.params[key] for key in chosen) for each in runs})

    assert groups(names) == groups(keys)
    assert all(groups(names[:i]) < groups(names[: i + 1]) for i in range(len(names)))


def test_where_a_run_was_stored_and_computed_makes_no_difference():
    places = [{"device": "cpu", "tracking.name": "jsonl", "data.root": "/a"}, {"device": "cuda", "resume": "never"}]
    rows, notes = summarise([run("simclr", seed=seed, **place) for seed, place in enumerate(places)])
    assert [len(row.runs) for row in rows] == [2]
    assert notes == []


def test_of_the_same_configuration_and_seed_the_newest_finished_run_counts():
    old, new = run("simclr", top1=10, at=1.0), run("simclr", top1=20, at=2.0)
    crashed = run("simclr", top1=99, at=3.0, status="FAILED")
    for runs in ([old, new, crashed], [crashed, new, old]):
        kept, notes = select(runs)
        assert kept == [new]
        assert notes == ["left out: simclr-0-seed0 (failed)", "simclr-0-seed0 was run 2 times: only the newest counts"]


@pytest.mark.parametrize("status", ["FAILED", "KILLED", "RUNNING"])
def test_runs_without_a_result_are_named_and_left_out(status):
    rows, notes = summarise([run("simclr"), run("kmclr", 50, status=status)])
    assert [row.method for row in rows] == ["simclr"]
    assert notes == [f"left out: kmclr-50-seed0 ({status.lower()})"]


def test_a_foreign_run_in_the_experiment_is_named_and_left_out():
    foreign = Run("x", "someone's", "FINISHED", {}, {}, None, {}, 0.0)
    rows, notes = summarise([run("simclr"), foreign])
    assert len(rows) == 1
    assert notes == ["left out: someone's (not a training run)"]


def test_missing_figures_are_counted_and_shown():
    lacking = without(run("nnclr", 4096, seed=1, top1=60), "test/linear_top1")
    nan = replace(
        lacking, params=lacking.params | {"seed": "2"}, metrics=lacking.metrics | {"test/linear_top1": math.nan}
    )
    rows, notes = summarise([run("nnclr", 4096, top1=57.5), lacking, nan])
    assert notes == ["no test linear top-1: NNCLR 4,096 (2 of 3 runs)"]
    assert rows[0].values("test/linear_top1") == [57.5]
    rows, _ = summarise([lacking])
    assert table(rows)[1][7] == "-"
    assert records(rows)[0]["test/linear_top1_mean"] is None


def test_the_caption_holds_only_what_all_runs_share():
    assert caption(summarise(STUDY)[0]) == "cifar100, resnet18, 500 epochs, mean ± standard deviation over seeds"
    rows, _ = summarise([run("simclr", epochs="5"), run("simclr")])
    assert caption(rows) == "cifar100, resnet18"


def drawn(axes):
    """Each labelled series of a panel: its label, sizes and means."""
    return {bars.get_label(): bars.lines[0].get_xydata().tolist() for bars in axes.containers}


def test_the_plot_shows_every_row_where_it_belongs():
    rows, _ = summarise(STUDY)
    figure = plot(rows)
    for axes, metric in zip(figure.axes, report.PLOTTED, strict=True):
        series = drawn(axes)
        assert list(series) == ["SimCLR", "NNCLR", "KMCLR"]
        assert series["NNCLR"] == [[row.size, row.mean(metric)] for row in rows if row.method == "nnclr"]
        assert series["KMCLR"] == [[row.size, row.mean(metric)] for row in rows if row.method == "kmclr"]
        ((zero, level),) = series["SimCLR"]
        low, high = axes.get_xlim()
        assert low < zero < 50 < 98304 < high  # 0 has a place of its own, left of the smallest size
        ticks = dict(zip(axes.get_xticks(), (tick.get_text() for tick in axes.get_xticklabels()), strict=True))
        assert ticks[zero] == "0"
        assert all(text == f"{int(size):,}" for size, text in ticks.items() if size != zero)
        assert level == pytest.approx(rows[0].mean(metric))
        assert any(list(line.get_ydata()) == [level, level] for line in axes.lines)  # the level across
        assert "%" in axes.get_ylabel()
    styles = {(c.lines[0].get_marker(), c.lines[0].get_linestyle()) for c in figure.axes[0].containers}
    assert len({marker for marker, _ in styles}) == len({line for _, line in styles}) == 3  # readable without colour


def test_each_variant_is_one_line_of_the_plot():
    runs = [run("kmclr", k, **{"method.forget": forget}) for k in (50, 400) for forget in ("reset", "decay")]
    series = drawn(plot(summarise(runs)[0]).axes[0])
    assert {label: [size for size, _ in points] for label, points in series.items()} == {
        "KMCLR, forget=decay": [50, 400],
        "KMCLR, forget=reset": [50, 400],
    }


def test_more_variants_than_markers_are_one_cloud_and_lose_no_point():
    few, _ = summarise([run("kmclr", k, **{"optimizer.lr": f"0.1{k}234567"}) for k in range(50, 65)])
    bars = plot(few).axes[0].containers
    assert len({(bar.lines[0].get_marker(), bar.lines[0].get_linestyle()) for bar in bars}) == 15
    rows, _ = summarise([run("kmclr", k, **{"optimizer.lr": f"0.1{k}234567"}) for k in range(50, 70)])
    assert rows[0].label == "KMCLR, optimizer.lr=0.15"
    axes = plot(rows).axes[0]
    assert {label: len(points) for label, points in drawn(axes).items()} == {"KMCLR": 20}
    assert axes.containers[0].lines[0].get_linestyle() == "None"


@pytest.mark.parametrize("runs", [[run("simclr")], [run("kmclr", 50)], [without(run("simclr"), "test/linear_top1")]])
def test_small_experiments_are_drawn_and_written_too(runs, tmp_path):
    write(*summarise(runs), "small", tmp_path)
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_the_files_hold_the_same_table_and_do_not_change_when_written_again(tmp_path):
    rows, notes = summarise([*STUDY, run("simclr", seed=9, status="KILLED")])
    write(rows, notes, "study", tmp_path)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(first) == ["plot.png", "plot.svg", "table.csv", "table.json", "table.md"]
    assert first["plot.png"].startswith(b"\x89PNG")
    assert b"<svg" in first["plot.svg"]

    markdown = first["table.md"].decode()
    lines = re.findall(r"^\| (.*) \|$", markdown, re.MULTILINE)
    assert [line.split(" | ") for line in lines if "---" not in line] == table(rows)
    assert "- left out: simclr-0-seed9 (killed)" in markdown

    saved = json.loads(first["table.json"])
    assert saved["notes"] == notes
    assert [{key: value for key, value in one.items() if key != "runs"} for one in saved["rows"]] == records(rows)
    with (tmp_path / "table.csv").open(newline="") as file:
        for line, one in zip(csv.DictReader(file), records(rows), strict=True):
            assert line == {key: "" if value is None else str(value) for key, value in one.items()}

    write(rows, notes, "study", tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first


def test_curves_are_drawn_of_the_runs_whose_folders_are_here(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        row = {"step": 9, "time": 0, "metrics": {"val/knn_top1": 1.0}}
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    places = [tmp_path / "a", tmp_path / "b", tmp_path / "gone", None]
    runs = [replace(run("kmclr", 50, seed), directory=place and str(place)) for seed, place in enumerate(places)]
    rows, notes = summarise([*runs, run("simclr")])
    (course,) = courses(rows)
    assert course[:2] + course[3:] == ("KMCLR", 50, 500, (tmp_path / "a", tmp_path / "b"))
    assert [path.name for path in write(rows, notes, "study", tmp_path / "out")][-1] == "curves.png"
    assert (tmp_path / "out/curves.png").read_bytes().startswith(b"\x89PNG")


def test_arguments():
    assert parse(["experiment=2026_11"]) == Arguments("2026_11", "", "", "mlflow")
    assert parse(["out=a=b", "tracking=jsonl", "sweep=x"]) == Arguments("", "x", "a=b", "jsonl")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["experimnt=x"], "experimnt: unknown key"),
        (["experiment=x", "verbose"], "verbose: unknown key"),
        ([], "name one of experiment=NAME and sweep=ID"),
        (["experiment="], "name one of experiment=NAME and sweep=ID"),
        (["experiment=x", "sweep=y"], "name one of experiment=NAME and sweep=ID"),
        (["experiment=x", "tracking=wandb"], "tracking=wandb: choose one of mlflow, jsonl"),
    ],
)
def test_mistaken_arguments_are_named_in_one_line(arguments, named):
    with pytest.raises(UsageError, match=re.escape(named)) as raised:
        parse(arguments)
    assert "\n" not in str(raised.value)


def save(one, directory, experiment):
    directory.mkdir(parents=True)
    record = Record.new(one.name, experiment)
    record.status, record.params, record.metrics = one.status, one.params, one.metrics
    record.tags["output_dir"] = str(directory)
    record.save(directory)


def command(folder, *arguments):
    line = [sys.executable, "-m", "src.report", *arguments]
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_command_reports_on_the_runs_in_a_folder(tmp_path):
    for number, one in enumerate(STUDY):
        save(one, tmp_path / "multirun" / str(number), "study")
    save(run("simclr", status="FAILED"), tmp_path / "multirun" / "other", "failures")

    done = command(tmp_path, "experiment=study", "tracking=jsonl")
    assert (done.returncode, done.stderr) == (0, "")
    for row in table(summarise(STUDY)[0])[1:]:
        assert re.search(r"\s+".join(map(re.escape, row)), done.stdout)
    assert "results/study/plot.png" in done.stdout
    assert (tmp_path / "results/study/plot.png").exists()

    for arguments, named in [
        (["experiment=failures", "tracking=jsonl"], "no run has finished (left out: simclr-0-seed0 (failed))"),
        (["experiment=stduy", "tracking=jsonl"], "study"),
        (["experiment=study"], "no MLflow store"),
        (["experimnt=study"], "experimnt: unknown key"),
    ]:
        failed = command(tmp_path, *arguments)
        assert failed.returncode == 2
        assert failed.stderr.startswith("error: ")
        assert named in failed.stderr
        assert failed.stderr.count("\n") == 1
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["study"]  # a mistake writes nothing
