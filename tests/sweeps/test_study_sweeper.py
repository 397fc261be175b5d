"""Searches whose jobs do not run: a stand-in for the launcher ends each job as the test says."""

import re
import shutil
from contextlib import nullcontext
from unittest.mock import Mock

import pytest
from optuna import Study
from optuna.trial import TrialState, create_trial

from src.config import identity
from src.config.explain import whole_numbers
from src.errors import Collapsed, Diverged, UsageError
from src.runs.record import Record
from src.sweeps import optuna_study
from src.sweeps.study_sweeper import StudySweeper
from src.system.stopping import PRUNED

SPACE = {"k": "choice(10,20,30,40,50,60)"}
FIXED = ["data=digits", "backbone=resnet_tiny", "tracking=jsonl"]


class Launcher:
    """Stands in for a launcher: ends the jobs with the given statuses, in the order in which they are proposed.

    Args:
        statuses: Exit statuses of the jobs; 0 leaves the record of a finished run, 65 that of one that has
            diverged, and 76 that of a pruned one. After the last, no job is taken.
        status: The launcher's own exit status: 0, or that of whatever stopped the sweep.
        figures: The metrics of every run; None: its kNN accuracy is its k.
    """

    def __init__(self, *statuses, status=0, figures=None):
        self.statuses, self.status, self.figures = statuses, status, figures
        self.ran, self.directories = [], []

    def run(self, sweep, jobs, swept, at_a_time):
        self.folder = sweep.directory
        for status, job in zip(self.statuses, jobs, strict=False):
            self.ran.append(job.trial)
            job.error, job.status = "as the test says" if status else "", status
            self.directories.append(job.directory)
            if status == 0:
                finish(job.directory, self.figures or {"val/knn_top1": float(job.cfg.k)}, identity.flat(job.cfg))
            if status in (Diverged.status, PRUNED):
                tag = "pruned" if status == PRUNED else "diverged"
                finish(job.directory, {}, identity.flat(job.cfg), "FAILED", **{tag: "true"})
            yield job


class Beside(Launcher):
    """A launcher beside which another process finishes the first job before the search ends."""

    def run(self, *given):
        yield from super().run(*given)
        finish(self.directories[0], self.figures, {})


def finish(directory, figures, params, status="FINISHED", **tags):
    """Leave the parts of a run's record that a search reads."""
    record = Record.new(directory.name, "study")
    record.status, record.metrics, record.tags = status, figures, tags
    record.params = {key: str(value) for key, value in params.items()}
    record.tags["config_hash"] = directory.name.rpartition("-")[2]
    directory.mkdir(parents=True, exist_ok=True)
    record.save(directory)


@pytest.fixture
def search(as_hydra_does, cache_dir, tmp_path, monkeypatch):
    """A function that runs a search with a `Launcher` and returns the exit status; a dry run that succeeds has none."""
    monkeypatch.chdir(tmp_path)

    def run(launcher, *arguments, trials=3, space=SPACE, hydra=(), pruner="none"):
        sweeper = as_hydra_does(StudySweeper(trials=trials, pruner=pruner, seed=0, params=space), *hydra)
        sweeper.launcher, sweeper.prepare = launcher, lambda: None
        with nullcontext() if "dry_run=true" in hydra else pytest.raises(SystemExit) as end:
            sweeper.sweep([*FIXED, f"data.cache_dir={cache_dir}", *arguments])
        return end and end.value.code

    return run


def study_of(launcher):
    return optuna_study._open(launcher.folder)


def states(launcher):
    return [trial.state.name for trial in study_of(launcher).trials]


@pytest.fixture(autouse=True)
def _without_a_table(monkeypatch):
    """Leave out the table at the end of a sweep: these jobs leave too little for its rows."""
    monkeypatch.setattr("src.sweeps.sweep.summarise", lambda records: ([], []))


def test_a_trial_whose_job_may_end_otherwise_is_taken_up_again_and_no_other(search):
    """A job may succeed the next time after a full disk (74), a kill (-9) or a mistake (2), but not if it diverged."""
    first, second = Launcher(74, -9, 2, 65), Launcher(0, 0, 0)
    assert search(first, trials=4) == 1
    assert states(first) == ["RUNNING"] * 3 + ["FAIL"]
    assert search(second, trials=4) == 1
    assert second.ran == [0, 1, 2]
    assert states(second) == ["COMPLETE"] * 3 + ["FAIL"]


def test_what_was_refused_is_not_said_to_be_missing(search, capsys):
    assert search(Launcher(0, 2), trials=2) == 1
    assert "run again" not in capsys.readouterr().err


def test_what_would_end_the_same_way_is_not_said_to_be_missing(search, capsys):
    assert search(Launcher(0, 65, 74)) == 1
    assert "run again just what is missing" in capsys.readouterr().err
    for launcher in (Launcher(0), Launcher()):
        assert search(launcher) == 1
        said = capsys.readouterr().err
        assert "no result: " in said
        assert "run again" not in said


def test_a_search_that_is_taken_up_copies_its_trials_as_often_whatever_their_number(search, monkeypatch):
    """To copy all trials is slow, so a search that is continued does it as often with six trials as with two."""
    fetched, real = [], Study.get_trials

    def get_trials(study, *args, **kwargs):
        fetched.append(real(study, *args, **kwargs))
        return fetched[-1]

    times = []
    for trials in (2, 6):
        space = {"k": f"choice({','.join(map(str, range(10, 10 + trials)))})"}
        search(Launcher(*[74] * trials), trials=trials, space=space)
        with monkeypatch.context() as counting:
            counting.setattr(Study, "get_trials", get_trials)
            fetched.clear()
            again = Launcher(74)
            search(again, trials=trials, space=space)
            times.append(len(fetched))
        assert again.ran == [0]
        assert states(again) == ["RUNNING"] * trials
    assert times[0] == times[1]


def test_a_search_has_as_many_trials_as_are_asked_for_with_those_of_earlier_commands(search):
    first, more, again = (Launcher(*[0] * 9) for _ in range(3))
    assert (search(first, trials=2), search(more, trials=5), search(again, trials=5)) == (0, 0, 0)
    assert (first.ran, more.ran, again.ran) == ([0, 1], [2, 3, 4], [])


def test_a_dry_run_only_reads_the_study(search, capsys):
    launcher = Launcher(0, -9)
    search(launcher, trials=2)
    study_of(launcher).ask()  # killed before its point was drawn
    file = launcher.folder / "study.db"

    def previewed():
        before, _ = (file.read_bytes(), file.stat().st_mtime_ns), capsys.readouterr()
        assert search(None, trials=5, hydra=["dry_run=true"], pruner="median") is None
        assert (file.read_bytes(), file.stat().st_mtime_ns) == before
        assert sorted(path.name for path in launcher.folder.iterdir() if path.name.startswith("study")) == ["study.db"]
        return capsys.readouterr().out

    out = previewed()
    assert "2 jobs, 1 to run" in out
    assert out.endswith("3 trials to propose\n")
    file.write_bytes(b"")  # counts as a missing one
    assert previewed().endswith("5 trials to propose\n")


def test_a_search_without_its_study_begins_anew_and_says_so(search, capsys):
    first, again = Launcher(0, 0), Launcher(0, 0)
    search(first, trials=2)
    assert "begins anew" not in capsys.readouterr().err
    (first.folder / "study.db").write_bytes(b"")  # counts as a missing one
    assert search(again, trials=2) == 0
    assert "study.db has no trials: the search begins anew; jobs that it proposes again" in capsys.readouterr().err
    assert again.ran == []  # the seed proposes the same points, whose jobs are finished


def test_a_complete_trial_whose_folder_is_removed_runs_again_and_its_old_value_does_not_count(search, capsys):
    """Its number, its point and the other trials stay; what a run by hand has left counts without another run."""
    first, again = Launcher(0, 0, 65, 0), Launcher(0, 0, figures={"val/knn_top1": 1.0})
    assert search(first, trials=4) == 1
    before = study_of(first).trials
    removed, by_hand = first.directories[:2]
    params = Record.load(by_hand).params
    shutil.rmtree(removed)
    shutil.rmtree(by_hand)
    finish(by_hand, {"val/knn_top1": 2.0}, params)
    capsys.readouterr()
    assert search(again, trials=4) == 1
    assert again.ran == [0]
    assert again.directories == [removed]
    after = study_of(again).trials
    assert [trial.params for trial in after] == [trial.params for trial in before]
    assert [trial.state for trial in after] == [trial.state for trial in before]
    assert [trial.value for trial in after] == [1.0, 2.0, None, before[3].value]
    assert f"best: val/knn_top1 {before[3].value:.2f} with k={before[3].params['k']}\n" in capsys.readouterr().out
    assert search(Launcher(), trials=4) == 1
    assert [path.name for path in again.folder.glob("study.db*")] == ["study.db"]


def test_a_trial_that_diverged_or_was_pruned_runs_again_if_its_folder_is_removed(search, capsys):
    first, again = Launcher(65, 76, 65, 76), Launcher(0, 143, status=143)
    assert search(first, trials=4) == 1
    for directory in first.directories[:2]:
        shutil.rmtree(directory)
    capsys.readouterr()
    assert search(again, trials=4) == 143
    assert again.ran == [0, 1]
    assert states(again) == ["COMPLETE", "RUNNING", "FAIL", "PRUNED"]
    assert "run again just what is missing" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")  # of Optuna 2, for create_trial
def test_points_that_are_one_configuration_are_one_trial_and_the_best_line_has_no_key_that_is_skipped(search, capsys):
    """SimCLR has no k, so whatever is drawn for it makes no other run. An older study may have such trials."""
    space = {"method": "choice(simclr,kmclr)", "k": "choice(10,20,30)"}
    best = Launcher(*[0] * 9, figures={"val/knn_top1": 50.0})
    assert search(best, trials=4, space=space) == 0
    names = sorted("-".join(path.name.split("-")[:2]) for path in best.directories)
    assert names == ["kmclr-k10", "kmclr-k20", "kmclr-k30", "simclr-digits"]
    with pytest.raises(UsageError, match="no other point"):
        search(Launcher(0), trials=5, space=space)
    (simclr,) = [trial for trial in study_of(best).trials if trial.params["method"] == "simclr"]
    record = Record.load(best.directories[simclr.number])
    record.metrics["val/knn_top1"] = 60.0
    record.save(best.directories[simclr.number])
    point = {"method": "simclr", "k": 20 if simclr.params["k"] == 10 else 10}
    for state, value in ((TrialState.COMPLETE, 99.0), (TrialState.RUNNING, None)):
        same = create_trial(state=state, value=value, params=point, distributions=simclr.distributions)
        study_of(best).add_trial(same)
    capsys.readouterr()
    again = Launcher(0)
    assert search(again, trials=4, space=space) == 0
    said = capsys.readouterr().out
    assert "4 of 4 trials are there\nbest: val/knn_top1 60.00 with method=simclr\n" in said
    assert "4 of 4 jobs finished" in said
    assert again.ran == []


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("k=764", "k=764: is never filled, because only 512 embeddings are seen"),
        ("batch_size=400", "batch_size=400 is larger than the 300 training images"),
        ("support.refit_window=9000", "support.refit_window=9000: is not full at any step"),
    ],
)
def test_a_trial_that_has_too_few_images_is_judged_once_and_never_run(search, capsys, setting, says):
    arguments = ["data.limit=300", "batch_size=256", "epochs=3"]
    arguments += ["k=10", "support.refit=faiss", "support.refit_every=1"] if "refit" in setting else []
    key, value = setting.split("=")
    arguments += ["backbone.bn_splits=2"] if "batch" in setting else []  # any other batch shrinks
    arguments = [each for each in arguments if not each.startswith(key)]
    space = {key: f"choice({value},20)", "optimizer.lr": "choice(1,2)"}
    first, second = Launcher(0, 0, 0, 0), Launcher(0)
    for launcher in (first, second):
        assert search(launcher, *arguments, trials=4, space=space) == 1
        assert sorted(states(launcher)) == ["COMPLETE"] * 2 + ["FAIL"] * 2
        said = capsys.readouterr().err
        assert said.count(f"no result: {says}") == 2
        assert "run again" not in said
    assert (len(first.ran), second.ran) == (2, [])


def test_a_search_whose_time_is_up_says_so_where_its_last_job_has_ended_by_itself(search):
    launcher = Launcher(0, status=75)
    assert search(launcher, trials=2) == 75
    assert Record.load(launcher.folder).status == "KILLED"
    assert search(Launcher(0, status=75), trials=2) == 0


def test_a_key_with_plus_signs_replaces_a_distribution(search):
    launcher = Launcher(0, 0)
    assert search(launcher, "++k=10,20", trials=2) == 0
    assert sorted(Record.load(path).name.split("-")[1] for path in launcher.folder.parent.glob("kmclr-*")) == [
        "k10",
        "k20",
    ]
    assert search(Launcher(0), "++k=interval(5,9)", trials=1) == 0  # drawn as whole numbers, because k is one
    fixed = Launcher(0, 0)
    assert search(fixed, "++k=10", trials=2, space=SPACE | {"epochs": "choice(1,2,3)"}) == 0
    assert len(list(fixed.folder.parent.glob("kmclr-k10-*"))) == 3


@pytest.mark.parametrize("given", ["seed=0,1", "++seed=0,1", "seed=range(3)"])
def test_a_search_does_not_choose_a_seed(search, given):
    with pytest.raises(UsageError, match="a search would choose the luckiest seed; give one, and repeat") as error:
        search(Launcher(0), given)
    assert str(error.value).startswith(f"{given}: ")
    assert search(Launcher(0), "seed=1", trials=1) == 0


@pytest.mark.parametrize("given", ["data.final=true", "data.final=choice(true,false)"])
def test_a_search_does_not_choose_a_final_run(search, given):
    with pytest.raises(UsageError, match=r"data\.final=true: leaves no validation images"):
        search(Launcher(0), given)


def test_a_key_by_its_former_name_replaces_a_distribution(search):
    launcher = Launcher(0)
    search(
        launcher,
        "method=kmclr",
        "method.temperature=0.5",
        trials=1,
        space=SPACE | {"objective.temperature": "interval(0.1,0.2)"},
    )
    (directory,) = launcher.directories
    assert Record.load(directory).params["objective.temperature"] == "0.5"
    assert set(optuna_study._open(launcher.folder).trials[0].params) == {"k"}


def test_the_keys_of_whole_numbers_are_those_of_the_schema():
    whole = whole_numbers()
    assert whole >= {"k", "queue_size", "data.limit", "support.refit_window", "objective.neighbours", "projector.out"}
    assert not whole & {"support.half_life", "schedule.warmup_epochs", "optimizer.lr", "compile", "projector.hidden"}


def test_settings_that_are_at_odds_with_a_default_only_are_searched(search):
    """A window of 100 is too small for the default k, but not for the values of k that are searched."""
    launcher = Launcher(0)
    fixed = ["support.refit=faiss", "support.refit_window=100"]
    assert search(launcher, *fixed, "k=interval(10,50)", trials=1, space={}) == 0
    assert states(launcher) == ["COMPLETE"]
    with pytest.raises(UsageError, match="must hold k=200"):
        search(launcher, *fixed, "k=interval(200,300)", trials=1, space={})
    with pytest.raises(UsageError, match="suport"):
        search(launcher, *fixed, "k=interval(10,50)", "suport.metric=euclidean", trials=1, space={})


@pytest.mark.parametrize(
    ("given", "space", "says"),
    [
        (
            "optimizer.momentumm=interval(0.1,0.2)",
            SPACE,
            r"optimizer\.momentumm: unknown key.*did you mean optimizer\.m",
        ),
        ("optimizer.lrr=0.1,0.2", SPACE, "did you mean optimizer.lr"),
        ("queue_size=100,200", SPACE, r"queue_size: only support=queue"),
        ("support=none,queue", SPACE | {"optimizer.lrr": "choice(1,2)"}, "did you mean optimizer.lr"),
        ("epocs=1,2", {"k": "interval(1,9)"}, "did you mean epochs"),  # k=1 is impossible
        ("epocs=1,2", {"experiment": "choice(mnn,demo)", "method": "choice(kmclr,nnclr)"}, "did you mean epochs"),
    ],
)
def test_a_key_that_no_trial_has_is_refused_also_with_several_values(search, given, space, says):
    with pytest.raises(UsageError, match=says):
        search(Launcher(0), given, space=space)


def test_a_key_of_a_sweeps_file_that_the_typed_method_lacks_is_left_out(search):
    assert search(Launcher(0, figures={"val/knn_top1": 50.0}), "method=simclr", trials=1) == 0
    with pytest.raises(UsageError, match=r"k: only support=kmeans"):
        search(Launcher(0), "method=simclr", "k=5,6", trials=1)


@pytest.mark.parametrize("given", ["support=queue,kmeans", "method=nnclr,kmclr", "experiment=original_nnclr,demo"])
def test_a_setting_that_some_trials_have_is_theirs_and_makes_another_search(search, given):
    launchers = [Launcher(0, 0, figures={"val/knn_top1": 50.0}) for _ in range(2)]
    for launcher, size in zip(launchers, (128, 256), strict=True):
        assert search(launcher, given, "k=10", f"queue_size={size}", trials=2, space={}) == 0
    ran = [{path.name.split("-")[1] for path in launcher.directories} for launcher in launchers]
    assert ran == [{"k10", "queue128"}, {"queue256"}]
    assert launchers[0].folder != launchers[1].folder


def test_images_without_labels_are_searched_once_and_not_again(search):
    first, second = (Launcher(0, 0, 0, figures={"val/effective_rank": 3.0}) for _ in range(2))
    for launcher in (first, second):
        with pytest.raises(UsageError, match="without labels there is no val/knn_top1"):
            search(launcher)
    assert (first.ran, second.ran) == ([0], [])


@pytest.mark.parametrize("status", [Diverged.status, PRUNED])
def test_a_trial_without_a_value_that_was_finished_by_hand_counts_once_and_may_be_the_best(search, capsys, status):
    before = Launcher(status, 0)
    assert search(before, trials=2) == (0 if status == PRUNED else 1)
    finish(before.directories[0], {"val/knn_top1": 99.0}, {})
    again = Launcher(0)
    assert (search(again, trials=2), again.ran) == (0, [])
    said = capsys.readouterr().out
    assert "2 of 2 jobs finished, 0 pruned" in said
    assert "best: val/knn_top1 99" in said


@pytest.mark.parametrize("status", [2, Diverged.status, PRUNED])
def test_a_job_that_another_process_finishes_meanwhile_counts_and_may_be_the_best(search, capsys, status):
    """A job whose folder another process holds is refused (status 2); one that ended may be repeated by hand."""
    launcher = Beside(status, 0, figures={"val/knn_top1": 99.0})
    assert search(launcher, trials=2) == 0
    assert states(launcher) == ["COMPLETE"] * 2
    said = capsys.readouterr().out
    assert "2 of 2 jobs finished" in said
    assert f"best: val/knn_top1 99.00 with k={study_of(launcher).trials[0].params['k']}\n" in said


def test_a_job_that_another_process_finishes_without_labels_is_told(search):
    with pytest.raises(UsageError, match="without labels there is no val/knn_top1"):
        search(Beside(2, figures={"val/effective_rank": 3.0}), trials=1)


def test_a_run_whose_support_set_was_never_filled_is_not_the_best(search, capsys):
    """The table leaves it out; an older study may have it as complete."""
    first, again = Launcher(0, 0), Launcher()
    assert search(first, trials=2) == 0
    best = max(first.directories, key=lambda path: Record.load(path).metrics["val/knn_top1"])
    record = Record.load(best)
    record.tags["support_unused"] = "true"
    record.save(best)
    capsys.readouterr()
    assert search(again, trials=2) == 0
    assert (again.ran, sorted(states(again))) == ([], ["COMPLETE", "FAIL"])
    (other,) = set(first.directories) - {best}
    assert f"best: val/knn_top1 {Record.load(other).metrics['val/knn_top1']:.2f} with" in capsys.readouterr().out


def test_a_trial_that_collapsed_is_trained_on_if_that_is_asked_for(search, capsys):
    """The search is the same with any ``on_collapse``, but its jobs end the same way again only with ``stop``."""
    first, again, trained_on = Launcher(Collapsed.status, 0), Launcher(), Launcher(0)
    assert search(first, "on_collapse=stop", trials=2) == 1
    record = Record.load(first.directories[0])
    record.tags["collapsed"] = "at step 4"
    del record.tags["diverged"]
    record.save(first.directories[0])
    assert search(again, "on_collapse=stop", trials=2) == 1
    assert (again.ran, states(again)) == ([], ["FAIL", "COMPLETE"])
    assert "run again" not in capsys.readouterr().err
    assert search(trained_on, "on_collapse=warn", trials=2) == 0
    assert (trained_on.ran, states(trained_on)) == ([0], ["COMPLETE"] * 2)


def test_a_search_says_once_that_finished_trials_were_evaluated_otherwise(search, caplog):
    assert search(Launcher(0, 0), trials=2) == 0
    assert "otherwise" not in caplog.text
    assert search(Launcher(), "evaluation.epochs=9", trials=2) == 0
    (said,) = [line for line in caplog.messages if "otherwise" in line]
    assert "2 finished jobs were evaluated otherwise (evaluation.epochs was 100 and is 9): " in said


def test_a_search_ends_with_the_settings_of_its_best_trial_also_where_no_other_is_found(search, capsys, monkeypatch):
    described = []
    monkeypatch.setattr("src.sweeps.sweep.summarise", lambda records: (["a row"], []))
    monkeypatch.setattr("src.sweeps.sweep.table", Mock(**{"write.return_value": [], "summary.return_value": {}}))
    monkeypatch.setattr("src.sweeps.sweep.mlflow_charts.describe_sweep", lambda *given: described.append(given) or "")
    monkeypatch.setattr("src.sweeps.sweep.table.show", lambda *_: print("the table"))
    search(Launcher(65, 0, 0, 76), trials=4, space={"k": "choice(10,20,30,40)"})
    said = capsys.readouterr().out
    (best,) = re.findall("^the table\nbest: (.*)$", said, re.MULTILINE)
    assert best in ("val/knn_top1 20.00 with k=20", "val/knn_top1 30.00 with k=30", "val/knn_top1 40.00 with k=40")
    with pytest.raises(UsageError, match="no other point"):
        search(Launcher(0), trials=5, space={"k": "choice(10,20,30,40)"})
    assert f"the table\nbest: {best}\n" in capsys.readouterr().out
    assert [each[2] for each in described] == [best, best]
