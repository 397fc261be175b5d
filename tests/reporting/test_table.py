"""The table, the plot and the files; the command."""

import csv
import json
import math
import re
import statistics
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
from rich.console import Console

from src.errors import UsageError
from src.reporting import report
from src.reporting import table as table_module
from src.reporting.report import Arguments, parse
from src.reporting.rows import summarise
from src.reporting.table import caption, courses, plot, records, table, write
from src.runs.record import Copy, Record
from tests.conftest import PROJECT
from tests.made_up_runs import STUDY, run, with_untrained, without

ROOT = PROJECT


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


def test_the_untrained_encoder_is_in_the_table_but_leaves_the_plot_its_scale():
    runs = [with_untrained(each, test_linear_top1=9.5, val_knn_top1=7.0) for each in STUDY]
    rows, _ = summarise(runs)
    assert table(rows)[1] == ["untrained", "0", "0 bytes", "0.00%", "3", "7.00 ± 0.00", "-", "9.50 ± 0.00", "-"]
    assert drawn(plot(rows).axes[0]) == drawn(plot(summarise(STUDY)[0]).axes[0])


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
    for axes, metric in zip(figure.axes, table_module.PLOTTED, strict=True):
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


def test_nothing_stored_is_a_level_of_its_own():
    rows, _ = summarise([run("simclr"), run("nnclr", 0), run("nnclr", 400)])
    assert [row.title for row in rows] == ["SimCLR", "nothing stored", "NNCLR 400"]
    axes = plot(rows).axes[0]
    series = drawn(axes)
    assert [size for size, _ in series["NNCLR"]] == [400]
    assert series["nothing stored"][0][0] == series["SimCLR"][0][0]
    assert sum(list(line.get_xdata()) == [0, 1] for line in axes.lines) == 2  # both levels go across


@pytest.mark.parametrize("sizes", [(50, 400, 1600, 4096, 4496, 16384, 300000), (1, 2, 3, 4), (50,), (98304, 100000)])
def test_labels_of_sizes_do_not_run_into_each_other(sizes):
    figure = plot(summarise([run("simclr"), *(run("kmclr", size) for size in sizes)])[0])
    figure.canvas.draw()
    for axes in figure.axes:
        shown = [tick.get_window_extent() for tick in axes.get_xticklabels() if tick.get_text()]
        assert len(shown) > 1
        assert all(left.x1 < right.x0 for left, right in pairwise(sorted(shown, key=lambda box: box.x0)))


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
    runs = [replace(run("kmclr", 50, seed), directory=place) for seed, place in enumerate(places)]
    rows, notes = summarise([*runs, run("simclr")])
    (course,) = courses(rows)
    assert course[:2] + course[3:5] == ("KMCLR 50", 50, 500, (tmp_path / "a", tmp_path / "b"))
    assert [path.name for path in write(rows, notes, "study", tmp_path / "out")][-1] == "curves.png"
    assert (tmp_path / "out/curves.png").read_bytes().startswith(b"\x89PNG")


def test_arguments():
    assert parse(["experiment=2026_11"]) == Arguments("2026_11", "", "", "mlflow", "multirun")
    assert parse(["out=a=b", "tracking=jsonl", "sweep=x", "root=r"]) == Arguments("", "x", "a=b", "jsonl", "r")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["experimnt=x"], "experimnt: unknown key"),
        (["experiment=x", "verbose"], "verbose: unknown key"),
        ([], "name one of experiment=NAME and sweep=ID"),
        (["experiment="], "name one of experiment=NAME and sweep=ID"),
        (["experiment=x", "sweep=y"], "name one of experiment=NAME and sweep=ID"),
        (["experiment=x", "root=r"], "root=r is where run.json files are: add tracking=jsonl"),
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

    (tmp_path / "multirun").rename(tmp_path / "kept")
    moved = command(tmp_path, "experiment=study", "tracking=jsonl", "root=kept", "out=again")
    assert (moved.returncode, moved.stderr) == (0, "")
    for name in ("table.md", "plot.png"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "results/study" / name).read_bytes()
    (tmp_path / "kept").rename(tmp_path / "multirun")

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


@pytest.mark.parametrize("width", [80, 120])
def test_a_narrow_terminal_loses_no_figure(monkeypatch, capsys, width):
    monkeypatch.setattr(table_module, "Console", lambda **_: Console(width=width))
    rows, notes = summarise(STUDY)
    table_module.show(rows, notes, "study")
    shown = capsys.readouterr().out
    for line in table(rows)[1:]:
        for number in " ".join(line[1:]).split():
            assert number in shown, "cut off"


def test_no_name_of_a_run_is_read_as_markup_or_mathematics(tmp_path, capsys):
    strange = {"method.label": "[/red] $x_{", "backbone.name": "[bold] $\\nope$ ${", "method.colour": "red; x"}
    rows, notes = summarise([run("kmclr", 50, **strange), run("kmclr", 70, **strange)])
    write(rows, notes, "[/x] $_{", tmp_path)
    table_module.show(rows, notes, "[/x] $_{")
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("[/red] $x_{", "[bold] $\\nope$", "[/x] $_{"))
    assert rows[0].colour == "#0072b2"


@pytest.mark.parametrize("name", ["../../x", "..", ".", "a/../../x"])
def test_a_report_is_not_written_outside_of_results(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    finished = replace(run("simclr"), experiment=name, copies={name: Copy()})
    (tmp_path / "runs").mkdir()
    finished.save(tmp_path / "runs")
    with pytest.raises(UsageError, match="out=DIR"):
        report.main([f"experiment={name}", "tracking=jsonl", "root=runs"])
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
