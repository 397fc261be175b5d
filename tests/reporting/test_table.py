"""The table of a report, its files, and the command that writes them."""

import csv
import json
import math
import re
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from src.errors import UsageError
from src.reporting import report
from src.reporting import table as table_module
from src.reporting.report import Arguments, parse
from src.reporting.rows import NO_CONTROL, RIGHT_POSITIVES, summarise
from src.reporting.table import GAIN_NOTE, courses, markdown, records, summary, table, write
from src.runs.record import ExperimentEntry, Record
from src.runs.tracker import Tracker
from tests.made_up_runs import STUDY, run, with_right_positives, with_untrained, without
from tests.stores import JSONL


def test_the_table_reads_as_a_paper_would_print_it():
    header, *body = table(summarise(STUDY)[0])
    assert header == [
        *("method", "vectors", "bytes", "of largest queue", "seeds"),
        *("val kNN", "val linear top-1", "test kNN", "test linear top-1", "test linear top-5"),
    ]
    deviation = statistics.stdev([52, 52.25, 52.5])
    assert body[0] == [
        *("SimCLR", "0", "0 bytes", "0.00%", "3"),
        *(f"{mean} ± {deviation:.2f}" for mean in ("47.25", "53.25", "46.25", "52.25", "82.25")),
    ]
    assert body[2][:4] == ["NNCLR", "98,304", "100.7 MB", "100.00%"]
    assert body[4][:4] == ["KMCLR", "400", "409.6 kB", "0.41%"]  # 400 / 98,304


def test_one_seed_has_no_deviation_and_no_queue_no_share():
    (row,), _ = summarise([run("kmclr", 50, top1=54.66)])
    assert table([row])[1][3:] == ["1", "49.66", "55.66", "48.66", "54.66", "84.66"]


def test_the_untrained_encoder_is_in_the_table():
    runs = [with_untrained(each, test_linear_top1=9.5, val_knn_top1=7.0, test_knn_top1=6.0) for each in STUDY]
    rows, _ = summarise(runs)
    figures = ["7.00 ± 0.00", "-", "6.00 ± 0.00", "9.50 ± 0.00", "-"]
    assert table(rows)[1] == ["untrained", "0", "0 bytes", "0.00%", "3", *figures]


def test_few_labels_and_fine_tuning_have_columns_where_a_run_has_them():
    few = {"test/fewshot_10pct_top1": 30.0, "test/fewshot_2pct_top1": 12.0, "test/fewshot_2pct_top1_std": 0.5}
    later = {"test_finetune/finetune_top1": 70.0, "test_finetune/finetune_top5": 90.0}
    one, other, third = (run("kmclr", 50, seed) for seed in range(3))
    runs = [replace(one, metrics=one.metrics | few), replace(other, metrics=other.metrics | few | later), third]
    rows, notes = summarise([*runs, run("simclr")])
    header, simclr, kmclr = table(rows)
    assert header[9:] == [
        *("test 2% of labels top-1", "test 10% of labels top-1"),
        *("test fine-tuned top-1, evaluated later", "test fine-tuned top-5, evaluated later"),
    ]
    assert (simclr[9:], kmclr[9:]) == (["-"] * 4, ["12.00 ± 0.00", "30.00 ± 0.00", "70.00", "90.00"])
    assert [each["test/fewshot_2pct_top1_mean"] for each in records(rows)] == [None, 12.0]
    lacking = "SimCLR (1 of 1 runs), KMCLR 50 (1 of 3 runs)"
    assert f"no test 2% of labels top-1, test 10% of labels top-1: {lacking}" in notes


def test_what_was_evaluated_elsewhere_has_columns_too():
    found = {"teacher/test/linear_top1": 1.0, "test_original/linear_top1": 2.0, "untrained/test/linear_top1": 9.0}
    found |= {f"transfer/cifar10-12ab34cd/{each}/linear_top1": 3.0 for each in ("test", "test_linear", "teacher/test")}
    found |= {"transfer/cifar10-12ab34cd/val/linear_top1": 9.0}
    one = run("kmclr", 50)
    rows, _ = summarise([replace(one, metrics=one.metrics | found)])
    header, *_, line = table(rows)
    assert dict(zip(header[9:], line[9:], strict=True)) == {
        "teacher test linear top-1": "1.00",
        "test_original linear top-1": "2.00",
        "cifar10-12ab34cd teacher test linear top-1": "3.00",
        "cifar10-12ab34cd test linear top-1": "3.00",
        "cifar10-12ab34cd test_linear linear top-1": "3.00",
    }


def test_a_note_says_by_which_settings_it_was_evaluated_elsewhere():
    tag, figure = "evaluated/test_linear", "test_linear/linear_top1"
    runs = [run("kmclr", 50, seed) for seed in range(3)]
    runs = [replace(each, metrics=each.metrics | {figure: 60.0}, tags={tag: "evaluation.knn_k=5"}) for each in runs]
    assert "test_linear was evaluated with evaluation.knn_k=5" in summarise(runs)[1]
    runs[1].tags[tag] = "evaluation.epochs=1"
    runs[2].tags.clear()
    assert (
        "the figures of test_linear differ in how they were evaluated: "
        "evaluation.epochs=1; evaluation.knn_k=5; settings that no tag names"
    ) in summarise(runs)[1]


def test_an_older_figure_is_not_said_to_be_of_a_later_evaluations_settings():
    one = run("simclr")
    one.metrics |= {"test_fewshot/fewshot_1pct_top1": 31.25, "test_fewshot/fewshot_5pct_top1": 35.0}
    one.tags["evaluated/test_fewshot"] = "evaluation.fewshot.draws=5"
    assert "test_fewshot was evaluated with evaluation.fewshot.draws=5" in summarise([one])[1]
    one.tags["evaluated/test_fewshot/fewshot_1pct_top1"] = "evaluation.fewshot.draws=2"
    assert (
        "the figures of test_fewshot differ in how they were evaluated: "
        "evaluation.fewshot.draws=2; evaluation.fewshot.draws=5"
    ) in summarise([one])[1]


def test_a_report_may_be_of_the_runs_with_some_settings():
    runs = [run("kmclr", 50), run("kmclr", 400), run("nnclr", 128)]
    assert report.those_with({}, runs) == runs
    assert report.those_with({"k": "400"}, runs) == [runs[1]]
    assert report.those_with({"k": "null"}, runs) == [runs[2]]
    assert report.those_with({"k": "null", "method.name": "nnclr"}, runs) == [runs[2]]
    assert report.those_with({"method.name": "nnclr", "k": "null"}, runs) == [runs[2]]
    final = replace(runs[0], params=runs[0].params | {"data.final": "True"})
    assert report.those_with({"data.final": "true"}, [final, *runs]) == [final]
    later = replace(runs[0], tags={"evaluation.knn_k": "5"})
    assert report.those_with({"evaluation.knn_k": "5"}, [later, *runs]) == [later]
    failed = replace(runs[0], status="FAILED", params={"k": "50"})
    assert report.those_with({"k": "50"}, [failed]) == [failed]
    with pytest.raises(UsageError, match="k=7: no run has it; choose from 400, 50, null"):
        report.those_with({"k": "7"}, runs)
    with pytest.raises(UsageError, match="experimnt: neither a setting of these runs nor one of experiment=NAME"):
        report.those_with({"experimnt": "x"}, runs)


def test_a_report_is_on_several_values_of_a_setting():
    runs = [run("kmclr", 50), run("kmclr", 400), run("nnclr", 512), run("kmclr", 50, betas="[0.9, 0.99]")]
    assert report.those_with({"k": "50,400"}, runs) == [runs[0], runs[1], runs[3]]
    assert report.those_with({"k": "400,null"}, runs) == [runs[1], runs[2]]
    assert report.those_with({"betas": "[0.9, 0.99]"}, runs) == [runs[3]]
    with pytest.raises(UsageError, match="k=7: no run has it"):
        report.those_with({"k": "50,7"}, runs)


def test_a_report_overwrites_no_study_that_has_a_page_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = tmp_path / "results/support_size"
    study.mkdir(parents=True)
    assert report._folder("support_size") == Path("results/support_size")
    (study / "README.md").touch()
    with pytest.raises(UsageError, match=r"results/support_size: holds a study, .*: out=DIR"):
        report._folder("support_size")


def test_missing_figures_are_counted_and_shown():
    lacking = without(run("nnclr", 4096, seed=1, top1=60), "test/linear_top1")
    nan = replace(
        lacking, params=lacking.params | {"seed": "2"}, metrics=lacking.metrics | {"test/linear_top1": math.nan}
    )
    rows, notes = summarise([run("nnclr", 4096, top1=57.5), lacking, nan])
    assert notes == [NO_CONTROL, "no test linear top-1: NNCLR 4,096 (2 of 3 runs)"]
    assert rows[0].values("test/linear_top1") == [57.5]
    two, _ = summarise([lacking, run("kmclr", 50)])
    header, nnclr, kmclr = table(two)
    place = header.index("test linear top-1")
    assert (nnclr[place], kmclr[place]) == ("-", "50.00")
    assert records(two)[0]["test/linear_top1_mean"] is None


def test_what_no_run_has_is_no_column_and_one_note():
    runs = [without(run(*each), "val/knn_top1", "val/linear_top1") for each in (("kmclr", 50), ("nnclr", 64))]
    rows, notes = summarise(runs)
    assert notes == [NO_CONTROL, "no run has val kNN, val linear top-1"]
    assert table(rows)[0][5:] == ["test kNN", "test linear top-1", "test linear top-5"]
    assert records(rows)[0]["val/linear_top1_mean"] is None


def test_what_storing_is_worth_stands_beside_the_figures_where_there_is_a_control():
    control = [run("nnclr", 0, seed, top1) for seed, top1 in enumerate((50, 51, 52))]
    stored = [run("kmclr", 50, seed, top1) for seed, top1 in enumerate((51, 52.5, 53))]
    rows, _ = summarise([*control, *stored, run("simclr", 0, 2, 51)])
    header, *body = table(rows)
    assert header[-1] == "gain over control"
    # gains of 1, 1.5 and 1: mean 1.1667, deviation 0.2887, and t of two degrees of freedom is 4.3027
    assert [line[-1] for line in body] == ["-1.00", "-", f"+1.17 ± {4.3027 * 0.28868 / 3**0.5:.2f}"]
    numbers = {one["method"]: one for one in records(rows)}
    assert numbers["kmclr"]["test/linear_top5_pairs"] == 3
    assert numbers["kmclr"]["test/linear_top1_difference_low"] == pytest.approx(1.1667 - 0.7171, abs=1e-3)
    assert numbers["kmclr"]["test/linear_top1_difference_high"] == pytest.approx(1.1667 + 0.7171, abs=1e-3)
    assert numbers["kmclr"]["test/linear_top1_std"] == pytest.approx(statistics.stdev((51, 52.5, 53)))
    assert numbers["simclr"]["test/linear_top1_difference_low"] is None
    assert numbers["nothing_stored"]["test/linear_top1_difference"] is None
    assert table(summarise(STUDY)[0])[0][-1] == "test linear top-5"


def test_right_positives_are_set_against_those_of_the_control():
    (_, stored) = records(
        summarise(
            [with_right_positives(run(*each), percent) for each, percent in ((("nnclr", 0), 24), (("kmclr", 50), 14))]
        )[0]
    )
    assert stored[f"{RIGHT_POSITIVES}_mean"] == 14
    assert stored[f"{RIGHT_POSITIVES}_difference"] == -10


def test_what_storing_is_worth_says_that_it_rests_on_fewer_seeds_than_the_row():
    """The means of the rows differ by 8 points, but on the only seed that both have, the difference is 5."""
    stored = [run("nnclr", 128, seed, top1) for seed, top1 in enumerate((55, 58, 61))]
    assert table(summarise([*stored, run("nnclr", 0, top1=50)])[0])[-1][-1] == "+5.00 (1 of 3 seeds)"
    controls = [run("nnclr", 0, seed, 50) for seed in range(2)]
    assert table(summarise([*stored, *controls])[0])[-1][-1].endswith(" (2 of 3 seeds)")


def test_the_files_hold_the_same_table_and_do_not_change_when_written_again(tmp_path):
    rows, notes = summarise([*STUDY, run("nnclr", 0), run("simclr", seed=9, status="KILLED")])
    write(rows, notes, "study", tmp_path)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    plots, tables = ["plot.pdf", "plot.png", "plot.svg"], ["table.csv", "table.json", "table.md"]
    assert sorted(first) == [*plots, "results.html", *tables]
    assert first["plot.png"].startswith(b"\x89PNG")
    assert first["plot.pdf"].startswith(b"%PDF")
    assert b"CreationDate" not in first["plot.pdf"]
    assert b"<svg" in first["plot.svg"]

    markdown = first["table.md"].decode()
    lines = re.findall(r"^\| (.*) \|$", markdown, re.MULTILINE)
    assert [line.split(" | ") for line in lines if "---" not in line] == table(rows)
    assert "- left out: simclr-0-seed9 (killed)" in markdown
    assert f"- {GAIN_NOTE}" in " ".join(markdown.split())
    assert max(map(len, markdown.splitlines())) == max(120, *(len(f"| {line} |") for line in lines))

    saved = json.loads(first["table.json"])
    assert saved["notes"] == [GAIN_NOTE, *notes]
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
    for one in runs[:2]:
        replace(one).save(one.directory)
    rows, notes = summarise([*runs, run("simclr")])
    (course,) = courses(rows)
    assert (course.title, course.size, course.epochs) == ("KMCLR 50 (2 of 4 seeds)", 50, 500)
    assert course.directories == (tmp_path / "a", tmp_path / "b")
    assert course.cycle == 1  # the records do not say how often the prototypes are reset
    assert not course.has_queue
    queue = replace(runs[0], params=runs[0].params | {"support.name": "queue"})
    assert courses([replace(rows[-1], runs=(queue,))])[0].has_queue
    three = {"support.forget": "reset", "support.forget_every": "3"}
    again = replace(runs[0], params=runs[0].params | three)
    assert courses([replace(rows[-1], runs=(again,))])[0].cycle == 3
    never = replace(again, params=again.params | {"epochs": "3"})  # no epoch follows the third
    assert courses([replace(rows[-1], runs=(never,))])[0].cycle == 1
    assert (
        courses([replace(rows[-1], runs=(replace(again, params=again.params | {"support.forget": "none"}),))])[0].cycle
        == 1
    )
    assert [path.name for path in write(rows, notes, "study", tmp_path / "out")][-1] == "curves.png"
    assert (tmp_path / "out/curves.png").read_bytes().startswith(b"\x89PNG")


def test_curves_that_cannot_be_read_are_left_out_and_said_to_be(tmp_path, caplog):
    row = json.dumps({"step": 9, "time": 0, "metrics": {"val/knn_top1": 1.0}})
    for name, content in (("whole", row), ("damaged", f"{row}\n{row[:-9]}\n{row}")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(f"{content}\n")
    places = [tmp_path / name for name in ("whole", "damaged")]
    runs = [replace(run("kmclr", 50, seed), directory=place) for seed, place in enumerate(places)]
    for one in runs:
        replace(one).save(one.directory)
    rows, _ = summarise(runs)
    (course,) = courses(rows)
    assert course.directories == (tmp_path / "whole",)
    assert f"{tmp_path / 'damaged'}: its curves are left out (" in caplog.text


def test_a_folder_that_is_now_another_runs_counts_as_one_that_is_not_here(tmp_path):
    tracker = Tracker(tmp_path, JSONL, {}, {})
    tracker.log({"val/knn_top1": 1.0}, 9)
    tracker.close("FINISHED")
    own = replace(run("kmclr", 50), directory=tmp_path, uuid=tracker.record.uuid)
    assert len(courses(summarise([own])[0])) == 1
    assert courses(summarise([replace(own, uuid="the run that was here before")])[0]) == []


def test_a_bar_in_a_name_is_no_column():
    assert markdown(["a|b"], [["c"]]) == [r"| a\|b |", "| --- |", "| c |"]


def test_arguments():
    """Keys that are no arguments of a report are settings that select runs."""
    assert parse(["experiment=2026_11"]) == Arguments("2026_11", "", "", "mlflow", "multirun", {})
    assert parse(["out=a=b", "tracking=jsonl", "sweep=x", "root=r"]) == Arguments("", "x", "a=b", "jsonl", "r", {})
    assert parse(["experiment=x", "k=50", "data.limit=null"]).settings == {"k": "50", "data.limit": "null"}


def test_a_tilde_that_the_shell_has_left_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    save(run("simclr"), tmp_path / "home/runs/0", "study")
    report.main(["experiment=study", "tracking=jsonl", "root=~/runs", "out=~/there"])
    assert (tmp_path / "home/there/table.md").is_file()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["experimnt=x"], "experimnt: unknown key"),
        (["experiment=x", "verbose"], "verbose: unknown key"),
        ([], "name one of experiment=NAME and sweep=ID"),
        (["experiment="], "name one of experiment=NAME and sweep=ID"),
        (["experiment=x", "sweep=y"], "name one of experiment=NAME and sweep=ID"),
        (["experiment=x", "root=r"], "root=r is where run.json files are: add tracking=jsonl"),
        (["experiment=x", "experiment=y"], "experiment: is given more than once; give one value"),
        (["experiment=x", "k=50", "k=100"], "k: is given more than once; give one value"),
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


def test_the_command_reports_on_the_runs_in_a_folder(command, tmp_path):
    for number, one in enumerate(STUDY):
        save(one, tmp_path / "multirun" / str(number), "study")
    save(run("simclr", status="FAILED"), tmp_path / "multirun" / "other", "failures")
    (tmp_path / "multirun/0/metrics.jsonl").write_text('{"step": 9, "time": 1, "metrics": {"val/knn_top1": 50.0}}\n')

    done = command("src.report", "experiment=study", "tracking=jsonl")
    assert (done.returncode, done.stderr) == (0, "")
    for row in table(summarise(STUDY)[0])[1:]:
        assert re.search(r"\s+".join(map(re.escape, row)), done.stdout)
    pictures = sorted(path.name for path in (tmp_path / "results/study").glob("*.png"))
    assert pictures == ["curves.png", "plot.png"]
    assert all(f"plot: results/study/{name}" in done.stdout for name in pictures)

    (tmp_path / "multirun").rename(tmp_path / "kept")
    moved = command("src.report", "experiment=study", "tracking=jsonl", "root=kept", "out=again")
    assert (moved.returncode, moved.stderr) == (0, "")
    for name in ("table.md", "plot.png", "results.html"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "results/study" / name).read_bytes()
    (tmp_path / "kept").rename(tmp_path / "multirun")
    some = command("src.report", "experiment=study", "tracking=jsonl", "k=400", "out=some")
    assert (some.returncode, some.stderr) == (0, "")
    assert "study-k=400" in some.stdout
    assert "NNCLR" not in some.stdout

    for arguments, named in [
        (
            ["experiment=failures", "tracking=jsonl"],
            "no run has finished; left out: simclr-0-seed0 (failed); train",
        ),
        (["experiment=stduy", "tracking=jsonl"], "study"),
        (["experiment=study"], "no MLflow store"),
        (["experimnt=study"], "experimnt: unknown key"),
    ]:
        failed = command("src.report", *arguments)
        assert failed.returncode == 2
        assert failed.stderr.startswith("error: ")
        assert named in failed.stderr
        assert failed.stderr.count("\n") == 1
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["study"]  # a mistake writes nothing


@pytest.mark.parametrize(("width", "left_out"), [(80, 5), (92, 4), (110, 3), (140, 0)])
def test_a_narrow_terminal_leaves_out_columns_and_cuts_no_figure(monkeypatch, capsys, width, left_out):
    monkeypatch.setattr(table_module, "Console", lambda **_: Console(width=width))
    rows, notes = summarise([*STUDY, *(run("nnclr", 0, seed) for seed in range(3))])
    table_module.show(rows, notes, "study")
    shown = capsys.readouterr().out
    header, *body = table(rows)
    absent = table_module.SPARE_COLUMNS[:left_out]
    assert ("largest" in shown) is (left_out < 2)
    for line in body:
        assert f" {line[0]} " in shown, "a label in two lines"
        for name, cell in zip(header, line, strict=True):
            assert cell in shown or name in absent, "cut off"
    for cell in (body[0][header.index(name)] for name in absent if name.startswith("test")):
        assert cell not in shown


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
    finished = replace(run("simclr"), experiment=name, copies={name: ExperimentEntry()})
    (tmp_path / "runs").mkdir()
    finished.save(tmp_path / "runs")
    with pytest.raises(UsageError, match="out=DIR"):
        report.main([f"experiment={name}", "tracking=jsonl", "root=runs"])
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_a_summarys_best_row_is_the_one_that_is_best_on_validation():
    fair = run("kmclr", 50, top1=60)
    lucky = replace(fair, params=fair.params | {"k": "400", "support_set_size": "400"})
    lucky = replace(lucky, metrics=fair.metrics | {"test/linear_top1": 70.0, "val/linear_top1": 10.0})
    control = run("nnclr", top1=40)
    found = summary(summarise([fair, lucky, control])[0])
    assert (found["best/support_set_size"], found["best/test/linear_top1"]) == (50, 60)
    assert found["nothing_stored/test/linear_top1"] == 40
    unsteady = [run("nnclr", 64, seed, top1) for seed, top1 in ((0, 10), (1, 99))]
    assert summary(summarise([fair, *unsteady])[0])["best/support_set_size"] == 50, "the mean over the seeds counts"
    untrained = with_untrained(control, val_linear_top1=99.0, test_linear_top1=99.0)
    assert summary(summarise([untrained, fair])[0])["best/support_set_size"] == 50
    other = run("nnclr", top1=45, epochs="9")
    two = summary(summarise([control, other, fair])[0])
    assert two["nothing_stored/test/linear_top1"] == 40, "of two controls, the best row's"
    assert summary(summarise([control, other])[0])["nothing_stored/test/linear_top1"] == 45, "which may be the best row"
    alone = summary(summarise([other, fair])[0])
    assert not [key for key in alone if key.startswith("nothing_stored")], "other settings make no control"
    unvalidated = [without(without(each, "val/linear_top1"), "val/knn_top1") for each in (fair, lucky)]
    assert summary(summarise(unvalidated)[0]) == {}, "nothing is chosen on test images"
