import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from src import cli
from src.config.schema import Tracking
from src.errors import UsageError
from src.evaluation import evaluate
from src.runs import checkpoint
from src.runs.delivery import deliver
from src.runs.metrics_file import read_rows
from src.runs.record import Record
from src.runs.tracker import Tracker
from tests.composing import composed
from tests.data.layouts import LAYOUTS, write_set
from tests.stores import MLFLOW, break_store


def run(*overrides):
    return evaluate.main(composed(*overrides, name="evaluate"))


def ask_mlflow():
    """Let the run in the folder ``run`` be requested for MLflow, too."""
    record = Record.load(Path("run"))
    record.request(MLFLOW)
    record.save(Path("run"))


@pytest.fixture(scope="module")
def taught(finished, small):
    """A finished run whose teacher was evaluated, too, at the end."""
    folder = finished.parent / "taught"
    own = ["objective=teacher", "support=none", "objective.predictor_hidden=32", "evaluation.teacher=true"]
    cli.pretrain(composed(*small, *own, "epochs=1", "tracking=jsonl", f"output_dir={folder}"))
    return folder


def test_the_teachers_figures_stand_beside_the_students_and_are_its_own(taught, tmp_path):
    figures = Record.load(taught).metrics
    both = {key for key in figures if key.startswith(("val/linear", "test/")) and "online" not in key}
    assert {key.removeprefix("teacher/") for key in figures if key.startswith("teacher/")} == both
    # A student that is given the teacher's weights has the teacher's figures.
    _, state = checkpoint.load_latest(taught / "checkpoints")
    for key in list(state["model"]):
        if key.startswith("teacher_encoder."):
            state["model"][key.removeprefix("teacher_")] = state["model"][key]
    path = checkpoint.save(tmp_path, 1, state)
    metrics = run(f"checkpoint={path}", "evaluation.teacher=false")
    assert metrics == {key: figures[f"teacher/{key}"] for key in metrics}
    assert metrics != {key: figures[key] for key in metrics}


def test_others_get_the_encoder_of_the_student(taught):
    """The file of the encoder, which other programs read, holds the student's weights and not the teacher's."""
    model = checkpoint.load_latest(taught / "checkpoints")[1]["model"]
    weights = load_file(taught / "encoder.safetensors")
    assert all(torch.equal(value, model[f"encoder.{key}"]) for key, value in weights.items())
    assert not all(torch.equal(value, model[f"teacher_encoder.{key}"]) for key, value in weights.items())


def test_a_teacher_is_evaluated_when_the_run_has_long_been_finished(taught):
    before = Record.load(taught).metrics
    metrics = run(f"checkpoint={taught}", "evaluation.teacher=true")
    assert metrics == {key: before[key] for key in metrics}
    assert "teacher/test/linear_top1" in metrics
    assert "teacher/test/linear_top1" not in run(f"checkpoint={taught}", "evaluation.teacher=false")
    other = run(f"checkpoint={taught}", "evaluation=original", "evaluation.epochs=1", "evaluation.teacher=true")
    assert {"test_original/linear_top1", "teacher_original/test/linear_top1"} <= other.keys()


def test_without_a_teacher_there_is_none_to_evaluate(finished):
    with pytest.raises(
        UsageError, match=r"^evaluation\.teacher=true: objective=mixed has no teacher; choose .*teacher"
    ):
        run(f"checkpoint={finished}", "evaluation.teacher=true")


def test_a_checkpoint_with_another_number_of_channels_is_one_line(finished, tmp_path):
    _, state = checkpoint.load_latest(finished / "checkpoints")
    path = checkpoint.save(tmp_path, 1, state | {"mean": [0.5]})
    with pytest.raises(UsageError, match=r"is not the checkpoint of a run \(.*mean and std of 1 and 3 channels"):
        run(f"checkpoint={path}")


def test_a_finished_run_is_evaluated_to_the_same_figures(finished):
    before = Record.load(finished).metrics
    metrics = run(f"checkpoint={finished}")
    assert metrics == {key: before[key] for key in metrics}
    assert {"test/knn_top1", "test/linear_top1", "test/linear_top5"} <= metrics.keys()
    assert Record.load(finished).status == "FINISHED"


def test_a_run_is_named_by_its_name_its_folder_its_id_or_a_checkpoint(finished, tmp_path, monkeypatch):
    folder = shutil.copytree(finished, tmp_path / "multirun/named")
    monkeypatch.chdir(tmp_path)
    identity = Record.load(folder).uuid
    file, _ = checkpoint.load_latest(folder / "checkpoints")
    ways = ["run=named", "run_id=named", "checkpoint=named", f"run={identity}", f"run_id={identity}", f"run={folder}"]
    ways += [f"checkpoint={folder}", f"checkpoint={folder}/checkpoints", f"checkpoint={file}"]
    found = [evaluate._checkpoint(composed(way, name="evaluate"))[0].resolve() for way in ways]
    assert set(found) == {file}


def test_figures_of_an_earlier_checkpoint_are_only_printed(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    (newest,) = (tmp_path / "run/checkpoints").glob("step-*.pt")
    earlier = shutil.copy(newest, newest.with_name("step-00000001.pt"))
    before = Record.load(tmp_path / "run")
    metrics = run(f"checkpoint={earlier}", "evaluation=original", "evaluation.epochs=1")
    assert "test_original/linear_top1" in metrics
    first, *table, last = capsys.readouterr().out.splitlines()
    assert (first, len(table)) == (f"{earlier}:", len(metrics))
    assert last == "written nowhere: this is not the last checkpoint of a run"
    assert Record.load(tmp_path / "run") == before
    link = newest.with_name("latest.pt")
    link.symlink_to(newest.name)
    run(f"checkpoint={link}", "evaluation=original", "evaluation.epochs=1")
    assert "test_original/linear_top1" in Record.load(tmp_path / "run").metrics


def test_it_prints_whose_figures_they_are_and_where_they_went(finished, tmp_path, capsys):
    metrics = run(f"run={finished}", "data=digits", f"data.cache_dir={finished.parent}/cache")
    first, *table, last = capsys.readouterr().out.splitlines()
    assert (first, last) == (f"{finished}:", f"written to {finished}/run.json")
    assert {line.split()[0]: float(line.split()[1]) for line in table} == {
        key: round(value, 2) for key, value in metrics.items()
    }
    assert len({len(line) for line in table if not line.split()[0].endswith("knn_k")}) == 1
    assert [line.split()[1].isdigit() for line in table] == ["knn_k" in line for line in table]


@pytest.mark.parametrize("is_down", [False, True])
def test_it_says_that_mlflow_has_the_figures_only_where_it_has(finished, client, monkeypatch, capsys, is_down):
    shutil.copytree(finished, "run")
    ask_mlflow()
    if is_down:
        break_store(client, monkeypatch, "log_batch")
    run("run=run", "evaluation.knn_k=5")
    said = capsys.readouterr().out.splitlines()
    assert (said[0], said[-1]) == ("run:", f"written to run/run.json{'' if is_down else ' and MLflow'}")


@pytest.mark.parametrize("how", ["deleted", "another store", "no store"])
def test_a_run_that_mlflow_no_longer_has_is_not_brought_back(
    finished, client, fresh_store, monkeypatch, caplog, capsys, how
):
    """A line says so, as when the training command is repeated, and the figures are in the run's folder alone."""
    shutil.copytree(finished, "run")
    ask_mlflow()
    run("run=run", "evaluation.knn_k=5")
    run_id = Record.load(Path("run")).run_id
    if how == "deleted":
        client.delete_run(run_id)
    elif how == "another store":
        shutil.copy(fresh_store, "other.db")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///other.db")
    else:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///none.db")
    for k in (7, 9):
        caplog.clear()
        metrics = run("run=run", f"evaluation.knn_k={k}")
        said = "there is no MLflow store at none.db" if how == "no store" else "MLflow no longer has this run"
        [warning] = [each for each in map(logging.LogRecord.getMessage, caplog.records) if "MLflow" in each]
        assert warning.startswith(said)
        assert "python -m src.tracking" in warning
        assert capsys.readouterr().out.splitlines()[-1] == "written to run/run.json"
        assert metrics.items() <= Record.load(Path("run")).metrics.items()
        assert Record.load(Path("run")).run_id == run_id
    assert client.get_run(run_id).info.lifecycle_stage == ("deleted" if how == "deleted" else "active")
    assert not Path("none.db").exists()
    if how == "another store":
        assert [each.name for each in type(client)("sqlite:///other.db").search_experiments()] == ["Default"]


def test_the_encoders_model_in_mlflow_has_the_figures_at_once(finished, client):
    shutil.copytree(finished, "run")
    ask_mlflow()
    for protocol in ("linear", "original"):
        metrics = run("run=run", f"evaluation={protocol}", "evaluation.epochs=1")
        (model,) = client.search_logged_models([client.get_experiment_by_name("exp").experiment_id])
        assert {key for key in metrics if key.startswith("test")} <= {each.key for each in model.metrics}


def test_the_encoders_model_in_mlflow_has_one_value_of_each_figure(finished, client):
    """Also where the run was evaluated several times before MLflow got it."""
    shutil.copytree(finished, "run")
    for epochs in (1, 2):
        metrics = run("run=run", "evaluation=original", f"evaluation.epochs={epochs}")
    ask_mlflow()
    deliver(Path("run"))
    (model,) = client.search_logged_models([client.get_experiment_by_name("exp").experiment_id])
    keys = [each.key for each in model.metrics]
    assert len(keys) == len(set(keys))
    newest = {key: value for key, value in metrics.items() if key.startswith("test")}
    assert {each.key: each.value for each in model.metrics if each.key in newest} == newest


def test_another_protocol_has_names_of_its_own(finished):
    before = Record.load(finished).metrics["test/linear_top1"]
    metrics = run(f"checkpoint={finished}", "evaluation=original", "evaluation.epochs=1")
    assert {"test_original/linear_top1", "test_original/knn_top1"} <= metrics.keys()
    record = Record.load(finished)
    assert record.metrics["test/linear_top1"] == before
    assert record.metrics["test_original/linear_top1"] == metrics["test_original/linear_top1"]
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert any("test_original/linear_top1" in row["metrics"] for row in rows)


def test_few_labels_and_fine_tuning_stand_beside_the_linear_probe(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    before = Record.load(finished).metrics
    encoder = (finished / "encoder.safetensors").read_bytes()
    few = run(f"checkpoint={tmp_path}/run", "evaluation=fewshot", "evaluation.epochs=2")
    tuned = run(
        f"checkpoint={tmp_path}/run", "evaluation=finetune", "evaluation.epochs=5", "evaluation.finetune.epochs=1",
        "evaluation.finetune.lr=[0.01]",
    )  # fmt: skip
    names = {f"test_fewshot/fewshot_{share}pct_top1{end}" for share in (1, 10) for end in ("", "_std")}
    assert names <= few.keys()
    assert {"test_finetune/finetune_top1", "test_finetune/finetune_top5", "val_finetune/finetune_top1"} <= tuned.keys()
    assert tuned["test_finetune/linear_top1"] == before["test/linear_top1"]
    after = Record.load(tmp_path / "run").metrics
    assert {key: after[key] for key in before} == before
    assert after == before | few | tuned
    assert (tmp_path / "run/encoder.safetensors").read_bytes() == encoder


@pytest.mark.slow
def test_a_run_ends_with_few_labels_and_fine_tuning_and_repeats_them(tmp_path, small):
    both = [
        "evaluation=fewshot",
        "evaluation.fewshot.draws=2",
        "+evaluation.finetune={epochs:1,batch_size:32,lr:[0.01]}",
    ]
    less = ["method=simclr", "data.limit=100", "epochs=1", "evaluation.epochs=1", "tracking=jsonl"]
    cli.pretrain(composed(*small, *both, *less, f"output_dir={tmp_path}/run"))
    before = Record.load(tmp_path / "run").metrics
    own = {"test/linear_top1", "test/fewshot_1pct_top1", "test/fewshot_10pct_top1_std", "test/finetune_top1"}
    assert own | {f"untrained/{key}" for key in own} | {"val/finetune_top1"} <= before.keys()
    metrics = run(f"checkpoint={tmp_path}/run")
    assert metrics == {key: before[key] for key in metrics}
    assert own <= metrics.keys()


def test_figures_are_logged_where_the_run_was_last_asked_for(finished, tmp_path):
    """They go to the experiment that requested the run last, and to the run's last step."""
    shutil.copytree(finished, tmp_path / "run")
    record = Record.load(tmp_path / "run")
    before = {*record.copies, "other"}
    record.request(Tracking("jsonl", "other", 10, parent="a folder that is gone"))
    record.save(tmp_path / "run")
    run(f"checkpoint={tmp_path / 'run'}")
    after = Record.load(tmp_path / "run")
    assert (after.experiment, set(after.copies)) == ("other", before)
    last, _ = read_rows(tmp_path / "run/metrics.jsonl")
    assert last[-1]["step"] == checkpoint.load_latest(tmp_path / "run/checkpoints")[1]["step"] > 0


def test_what_matters_in_training_only_makes_no_other_protocol(finished):
    """Settings that matter during training only leave the figures their own names, ``test/...``."""
    for setting in ("every=7", "online_lr=0.7", "bank=40", "pictures=true"):
        found = run(f"checkpoint={finished}", "evaluation=linear", "evaluation.epochs=5", f"evaluation.{setting}")
        assert "test/linear_top1" in found, setting


@pytest.mark.parametrize("setting", ["evaluation.knn_k=3", "evaluation.epochs=6", "precision=bfloat16"])
def test_another_setting_of_the_same_protocol_does_not_pass_for_the_runs_own(finished, setting):
    before = Record.load(finished).metrics
    metrics = run(f"checkpoint={finished}", "evaluation=linear", "evaluation.epochs=5", setting)
    assert "test_linear/linear_top1" in metrics
    after = Record.load(finished).metrics
    assert all(after[key] == before[key] for key in before if key.startswith(("val/", "test/")))


def test_a_setting_of_the_runs_own_protocol_needs_nothing_beside_it(finished):
    metrics = run(f"checkpoint={finished}", "evaluation.knn_k=20")
    assert metrics["test_linear/knn_k"] == 20
    assert metrics["test_linear/linear_top1"] == Record.load(finished).metrics["test/linear_top1"]


def test_more_neighbours_than_a_class_has_images_are_said(finished, caplog):
    metrics = run(f"checkpoint={finished}", "evaluation.knn_k=200")
    assert f"evaluation.knn_k=200: a class has {metrics['test_linear/knn_k']:.0f} training images" in caplog.text


def test_transfer_has_the_data_sets_name(finished):
    metrics = run(f"checkpoint={finished}", "data=digits", f"data.cache_dir={finished.parent}/cache")
    (own,) = (finished.parent / "cache").glob("digits-*.safetensors")
    with safe_open(own, "np") as file:
        assert f"transfer/digits-{file.metadata()['fingerprint'][:8]}/test/linear_top1" in metrics


def test_other_images_have_the_size_of_the_runs_own_unless_one_is_typed(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    data = ["data=digits", f"data.cache_dir={finished.parent}/cache", "evaluation.epochs=1"]
    same = run(f"run={folder}", *data)
    assert same == run(f"run={folder}", *data, "data.image_size=8")
    larger = run(f"run={folder}", *data, "data.image_size=12")
    assert not same.keys() & larger.keys()
    tags = Record.load(folder).tags
    for figures, is_said in ((same, False), (larger, True)):
        family = next(key for key in figures if key.endswith("linear/linear_top1")).rpartition("/")[0]
        assert ("data.image_size=12" in tags[f"evaluated/{family}"]) is is_said


@pytest.mark.parametrize(
    ("typed", "size", "keep"),
    [
        ([], 8, 12),
        (["data.keep=16"], 8, 16),
        (["data.image_size=32"], 32, None),
        (["data.image_size=32", "data.keep=40"], 32, 40),
        (["data.resize=squash"], 8, None),
    ],
)
def test_other_images_are_kept_whole_as_the_runs_own_are(finished, typed, size, keep):
    saved = checkpoint.load_latest(finished / "checkpoints")[1]["config"]
    saved["data"]["keep"] = 12
    data = evaluate._merged(saved, composed("data=digits", *typed, name="evaluate")).data
    assert (data.image_size, data.keep) == (size, keep)


def test_a_protocol_that_is_chosen_has_no_settings_of_the_runs_own(finished):
    """A setting that is typed alone changes the run's own protocol."""
    saved = checkpoint.load_latest(finished / "checkpoints")[1]["config"]
    saved["evaluation"] |= {"fewshot": {"fractions": [0.1], "draws": 2}}
    chosen, own = (
        evaluate._merged(saved, composed(typed, name="evaluate")).evaluation
        for typed in ("evaluation=linear", "evaluation.epochs=7")
    )
    assert (chosen.epochs, chosen.fewshot) == (100, None)
    assert (own.epochs, own.fewshot.draws, own.knn_k) == (7, 2, saved["evaluation"]["knn_k"])


def test_the_record_says_by_which_settings_and_still_when_the_run_ended(finished, caplog):
    before = Record.load(finished)
    data = ["data=digits", f"data.cache_dir={finished.parent}/cache"]
    for limit in (250, 300):
        assert "was with" not in caplog.text
        metrics = run(f"checkpoint={finished}", *data, f"data.limit={limit}", "evaluation.epochs=3")
    family = next(key for key in metrics if key.endswith("linear/linear_top1")).rpartition("/")[0]
    record = Record.load(finished)
    assert record.tags[f"evaluated/{family}"] == "data.limit=300 data.val_fraction=0.1 evaluation.epochs=3"
    assert f"evaluated/{family}: was with data.limit=250 data.val_fraction=0.1 evaluation.epochs=3" in caplog.text
    assert (record.end_time, record.seconds, record.status) == (before.end_time, before.seconds, "FINISHED")


def test_a_tag_is_of_the_figures_that_are_there(finished, caplog):
    """The tag of a group of figures names the settings with which its present figures were measured."""
    for chosen in (["evaluation.knn_k=5"], ["precision=bfloat16"]):
        run(f"checkpoint={finished}", *chosen)
    assert Record.load(finished).tags["evaluated/test_linear"] == "precision=bfloat16"
    assert "evaluated/test_linear: was with evaluation.knn_k=5; its figures are now with precision=b" in caplog.text
    own = {key: value for key, value in Record.load(finished).params.items() if key.startswith("data.")}
    data = ["data=digits", *(f"data.{key}={own[f'data.{key}']}" for key in ("image_size", "cache_dir", "val_fraction"))]
    for limit in (250, 200):
        metrics = run(f"checkpoint={finished}", *data, f"data.limit={limit}")
    family = next(key for key in metrics if key.endswith("/test/linear_top1")).rpartition("/")[0]
    assert Record.load(finished).tags[f"evaluated/{family}"] == "the run's own settings"


def test_a_figure_that_a_later_evaluation_does_not_measure_keeps_its_settings():
    record = Record.new("one", "e")
    first = {"test_fewshot/fewshot_1pct_top1": 31.25, "test_fewshot/fewshot_10pct_top1": 38.75}
    record.tags |= evaluate._tags(record, first, "draws=2")
    record.metrics |= first
    assert record.tags == {"evaluated/test_fewshot": "draws=2"}
    second = {"test_fewshot/fewshot_5pct_top1": 35.0}
    record.tags |= evaluate._tags(record, second, "fractions=[0.05]")
    record.metrics |= second
    assert record.tags == {
        "evaluated/test_fewshot": "fractions=[0.05]",
        "evaluated/test_fewshot/fewshot_1pct_top1": "draws=2",
        "evaluated/test_fewshot/fewshot_10pct_top1": "draws=2",
    }
    third = {"test_fewshot/fewshot_1pct_top1": 33.0}
    record.tags |= evaluate._tags(record, third, "draws=9")
    assert record.tags == {
        "evaluated/test_fewshot": "draws=9",
        "evaluated/test_fewshot/fewshot_1pct_top1": "draws=9",
        "evaluated/test_fewshot/fewshot_10pct_top1": "draws=2",
        "evaluated/test_fewshot/fewshot_5pct_top1": "fractions=[0.05]",
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_sets_of_a_layout_have_metrics_of_their_own(finished, tmp_path, layout):
    names = []
    for seed in (0, 1):
        root = write_set(layout, tmp_path / str(seed), seed)
        metrics = run(f"checkpoint={finished}", f"data={layout}", f"data.root={root}", f"data.cache_dir={tmp_path}/c")
        names += [key for key in metrics if key.endswith("/test/linear_top1")]
    assert len(set(names)) == 2
    assert all(name.startswith(f"transfer/{layout}-") for name in names)
    assert Record.load(finished).metrics.keys() >= set(names)


def test_a_runs_own_images_may_have_moved_but_not_changed(tmp_path, small):
    root = write_set("image_folder", tmp_path / "images")
    images = ["data=image_folder", f"data.root={root}", f"data.cache_dir={tmp_path}/c", "data.limit=null"]
    more = ["k=5", "batch_size=8", "epochs=1", "tracking=jsonl", f"output_dir={tmp_path}/run"]
    cli.pretrain(composed(*small, *images, *more))
    before = Record.load(tmp_path / "run").metrics
    root = root.rename(tmp_path / "moved")
    metrics = run(f"checkpoint={tmp_path}/run", f"data.root={root}")
    assert metrics == {key: before[key] for key in metrics}

    others = write_set("image_folder", tmp_path / "others", seed=1)
    with pytest.raises(UsageError, match=rf"^data\.root={others}: holds other images .*set data\.root to") as refused:
        run(f"checkpoint={tmp_path}/run", f"data.root={others}")
    assert "\n" not in str(refused.value)
    assert Record.load(tmp_path / "run").metrics == before

    _, state = checkpoint.load_latest(tmp_path / "run/checkpoints")
    assert state["config"]["data"].pop("fingerprint")  # as in checkpoints from before there were fingerprints
    old = checkpoint.save(tmp_path / "old", 1, state)
    assert run(f"checkpoint={old}", f"data.root={root}") == metrics
    with pytest.raises(UsageError, match=r"^data\.limit: a run's own images stay as they are; choose others"):
        run(f"checkpoint={old}", f"data.root={root}", "+data.limit=9")


def test_a_checkpoint_of_another_shape_is_refused(finished, tmp_path):
    _, state = checkpoint.load_latest(finished / "checkpoints")
    state["config"]["backbone"]["name"] = "resnet18"
    path = checkpoint.save(tmp_path, 1, state)
    with pytest.raises(UsageError, match=r"another method or shape: .*missing"):
        run(f"checkpoint={path}")


def test_a_run_that_is_not_finished_is_refused(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    record = Record.load(tmp_path / "run")
    record.status = "KILLED"
    record.save(tmp_path / "run")
    with pytest.raises(UsageError, match="the run is KILLED, not FINISHED"):
        run(f"checkpoint={tmp_path / 'run'}")


def test_a_checkpoint_alone_is_evaluated_and_nothing_is_written(finished, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    path = shutil.copy(checkpoint.load_latest(finished / "checkpoints")[0], tmp_path / "elsewhere")
    assert "test/linear_top1" in run(f"checkpoint={path}")
    assert [each.name for each in tmp_path.iterdir()] == ["elsewhere"]


def test_the_figures_of_a_run_are_never_those_of_an_older_checkpoint(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    newest, state = checkpoint.load_latest(folder / "checkpoints")
    whole = newest.read_bytes()
    checkpoint.save(folder / "checkpoints", state["step"] - 1, state)
    newest.write_bytes(whole[:1000])
    with pytest.raises(UsageError, match=f"{newest.name} is damaged"):
        run(f"run={folder}")


@pytest.mark.parametrize("where", ["log", "close"])
def test_a_run_stays_finished_where_a_later_evaluation_is_broken_off(finished, tmp_path, monkeypatch, where):
    folder = shutil.copytree(finished, tmp_path / "run")
    run(f"run={folder}", "evaluation.knn_k=5")
    before = Record.load(folder)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Tracker, where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(f"run={folder}", "evaluation.knn_k=7")
    after = Record.load(folder)  # a SIGTERM would leave the same
    assert (after.status, after.end_time) == ("FINISHED", before.end_time)
    assert (after.tags == before.tags) == (after.metrics == before.metrics), "tags change with the metrics only"
    assert run(f"run={folder}", "evaluation.knn_k=7").items() <= Record.load(folder).metrics.items()
