import os
import sqlite3
from functools import partial

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.distributions import CategoricalDistribution

from src.errors import UsageError
from src.sweeps import optuna_study


def space(*overrides, whole=()):
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return optuna_study.space({each.get_key_element(): each for each in parsed}, whole)


def test_a_range_excludes_its_end_and_whole_keys_get_whole_numbers():
    assert space("k=range(1,10)", whole={"k"}) == {"k": optuna_study.numbers(1, 9)}
    assert space("k=interval(5,60)", whole={"k"}) == {"k": optuna_study.numbers(5, 60)}
    assert space("k=tag(log,interval(5,60))", whole={"k"}) == {"k": optuna_study.numbers(5, 60, log=True)}
    assert space("k=int(interval(5,60))") == {"k": optuna_study.numbers(5, 60)}
    assert space("lr=interval(1,2)") == {"lr": optuna_study.numbers(1.0, 2.0)}
    assert space("lr=range(0.5,2,0.5)") == {"lr": optuna_study.numbers(0.5, 1.5, 0.5)}
    assert space("lr=float(range(1,4))") == {"lr": optuna_study.numbers(1.0, 3.0, 1.0)}
    assert space("k=range(10,1,-3)") == {"k": optuna_study.numbers(4, 10, 3)}
    assert space("f=a,b", "seed=3") == {"f": CategoricalDistribution(("a", "b"))}
    assert space("b=true,false") == {"b": CategoricalDistribution((True, False))}


def test_the_best_is_of_the_trials_that_ended_whole_and_reads_as_it_is_typed(tmp_path):
    """`best` names the best trial that was completed, with its settings as they would be typed."""
    distributions = space("k=10,20,30,40", "projector.hidden=[32],[64]", "optimizer.lr=0.1234567,0.7")
    search = opened(tmp_path, **distributions)
    assert best(search) == ""
    for state, value in [("COMPLETE", 50.0), ("COMPLETE", 81.25), ("PRUNED", None), ("FAIL", None)]:
        number = search.propose()
        optuna_study.should_prune(str(tmp_path), number, 1, {"val/knn_top1": 99.0})
        search.conclude(number, state, value)
        if value == 81.25:
            point = search.trials()[number].params
    typed = f"val/knn_top1 81.25 with k={point['k']} 'projector.hidden={point['projector.hidden']}' "
    assert best(search) == f"{typed}optimizer.lr={point['optimizer.lr']}"
    assert best(search, ["k", "projector.hidden"]) == f"val/knn_top1 81.25 with optimizer.lr={point['optimizer.lr']}"
    assert search.best({0: ()}).startswith("val/knn_top1 50.00 with ")


def test_numbers_have_the_names_that_this_optuna_knows():
    asked = [(1, 2), (1.0, 2.0), (1.0, 2.0, 0.5), (1, 2, None, True), (1.0, 2.0, None, True)]
    names = [type(optuna_study.numbers(*each)).__name__.removesuffix("Distribution") for each in asked]
    since_3 = ["Int", "Float", "Float", "Int", "Float"]
    assert names in (["IntUniform", "Uniform", "DiscreteUniform", "IntLogUniform", "LogUniform"], since_3)


def test_a_first_point_is_the_lowest_of_each():
    drawn = space("k=tag(log,interval(5,60))", "lr=interval(0.5,2)", "f=shuffle(b,a)", whole={"k"})
    assert optuna_study.first(drawn) == ["k=5", "lr=0.5", "f=b"]


def test_shuffling_changes_no_space():
    assert all(space("f=shuffle(a,b,c,d,e)") == space("f=a,b,c,d,e") for _ in range(5))
    assert space("k=shuffle(range(1,10))") == space("k=range(1,10)")


@pytest.mark.parametrize(
    "line", ["lr=interval(2,1)", "lr=tag(log,interval(0,1))", "k=range(5,5)", "k=range(1,5,0)", "lr=range(0.5,1,0)"]
)
def test_what_optuna_cannot_draw_from_is_one_line(line):
    with pytest.raises(UsageError, match="Optuna cannot draw from that") as caught:
        space(line)
    assert str(caught.value).startswith(f"{line}: ")
    assert "\n" not in str(caught.value)


def opened(folder, seed=0, **distributions):
    return optuna_study.Study(folder, distributions or {"k": optuna_study.numbers(1, 50)}, "median", seed)


def best(search, skipped=()):
    return search.best(dict.fromkeys(search.trials(), skipped))


def run(search, objective, count):
    for _ in range(count):
        number = search.propose()
        search.conclude(number, "COMPLETE", objective(search.trials()[number].params))


def test_points_are_distinct_until_there_are_none(tmp_path):
    search = opened(tmp_path, k=optuna_study.numbers(1, 4))
    run(search, lambda point: point["k"], 4)
    assert sorted(trial.params["k"] for trial in search.trials().values()) == [1, 2, 3, 4]
    with pytest.raises(UsageError, match="no other point"):
        search.propose()
    assert best(search) == "val/knn_top1 4.00 with k=4"


def test_points_that_are_no_other_configuration_are_not_proposed(tmp_path):
    search = opened(tmp_path, **space("method=simclr,kmclr", "k=1,2,3"))
    known = []

    def configuration(point):
        return point["k"] if point["method"] == "kmclr" else 0

    def is_new(point):
        return configuration(point) not in known

    for _ in range(4):
        number = search.propose(is_new)
        known.append(configuration(search.trials()[number].params))
        search.conclude(number, "COMPLETE", 1.0 if known[-1] else 99.0)
    assert sorted(known) == [0, 1, 2, 3]
    with pytest.raises(UsageError, match="4 trials: 100 draws found no other point"):
        search.propose(is_new)
    assert len(search.study.trials) == 4


def test_a_search_has_proposals_of_its_seed_and_soon_of_the_better_points(tmp_path):
    drawn = {}
    for seed, count in ((0, 30), (1, 2)):
        (tmp_path / str(seed)).mkdir()
        search = opened(tmp_path / str(seed), seed, k=optuna_study.numbers(1, 1000))
        run(search, lambda point: point["k"], count)
        drawn[seed] = [trial.params["k"] for _, trial in sorted(search.trials().items())]
    assert drawn[0][:2] != drawn[1]
    assert sum(drawn[0][15:]) / 15 > 650  # the mean of random proposals would be 500


def test_a_continued_study_proposes_what_an_unbroken_one_does(tmp_path):
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    run(opened(tmp_path / "whole"), lambda point: point["k"], 6)
    for _ in range(3):
        run(opened(tmp_path / "parts"), lambda point: point["k"], 2)
    whole, parts = (opened(tmp_path / name).trials() for name in ("whole", "parts"))
    assert {number: trial.params for number, trial in whole.items()} == {
        number: trial.params for number, trial in parts.items()
    }


def test_a_trial_that_is_reopened_has_reported_nothing(tmp_path):
    """Its number and point stay, but no other trial is compared with what it reported before."""
    search = opened(tmp_path)
    for value in (90.0, 10.0):
        number = search.propose()
        optuna_study.should_prune(str(tmp_path), number, 1, {"val/knn_top1": value})
        search.conclude(number, "COMPLETE", value)
    points = [trial.params for trial in search.trials().values()]
    search.reopen({0})
    first, second = search.trials().values()
    assert (first.state.name, first.value, first.intermediate_values) == ("RUNNING", None, {})
    assert (second.state.name, second.value, second.intermediate_values) == ("COMPLETE", 10.0, {1: 10.0})
    assert [first.params, second.params] == points
    assert search.study.user_attrs == {"pruner": "median"}
    search.conclude(0, "COMPLETE", 5.0)
    assert opened(tmp_path).trials()[0].value == 5.0


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")  # of Optuna 2, for enqueue_trial
def test_what_a_kill_leaves_behind(tmp_path):
    """A trial that a kill left without a point fails, one that was running goes on, and a queued point is proposed."""
    search = opened(tmp_path)
    open_trial = search.propose()
    search.study.ask()  # killed before it had its point
    search.study.enqueue_trial({"k": 33})  # killed before it began
    again = opened(tmp_path)
    assert again.trials()[open_trial].state.name == "RUNNING"
    assert list(again.trials()) == [open_trial]
    assert again.study.trials[1].state.name == "FAIL"
    number = again.propose()
    assert again.trials()[number].params == {"k": 33}


def test_a_trial_far_behind_is_pruned_and_a_good_one_is_not(tmp_path):
    search = opened(tmp_path)
    for value in (50.0, 51.0, 52.0, 53.0, 54.0):
        number = search.propose()
        assert not optuna_study.should_prune(str(tmp_path), number, 1, {"val/knn_top1": value + 10})
        search.conclude(number, "COMPLETE", value)
    bad, good = search.propose(), search.propose()
    assert optuna_study.should_prune(str(tmp_path), bad, 1, {"val/knn_top1": 20.0})
    assert not optuna_study.should_prune(str(tmp_path), good, 1, {"val/knn_top1": 64.0})
    search.conclude(bad, "PRUNED")
    assert search.trials()[bad].state.name == "PRUNED"


def test_the_first_four_trials_are_compared_with_nothing(tmp_path):
    search = opened(tmp_path)
    for value in (60.0, 20.0, 10.0, 5.0):
        number = search.propose()
        assert not optuna_study.should_prune(str(tmp_path), number, 1, {"val/knn_top1": value})
        search.conclude(number, "COMPLETE", value)
    assert optuna_study.should_prune(str(tmp_path), search.propose(), 1, {"val/knn_top1": 4.0})


def test_the_tables_of_another_optuna_are_one_line(tmp_path):
    opened(tmp_path)
    with sqlite3.connect(tmp_path / optuna_study.FILE) as tables:
        tables.execute("update version_info set schema_version = 0")
        tables.execute("update alembic_version set version_num = 'v1.3.0.a'")
    with pytest.raises(UsageError, match=f"{tmp_path}.*upgrade --storage sqlite:///{tmp_path}/study.db`"):
        opened(tmp_path)
    assert not optuna_study.should_prune(str(tmp_path), 0, 1, {"val/knn_top1": 0.0})


@pytest.mark.filterwarnings("error::FutureWarning")
def test_a_study_of_whole_numbers_opens_without_a_warning(tmp_path):
    for _ in range(2):
        opened(tmp_path, **space("k=tag(log,int(interval(1,50)))")).propose()


def test_a_study_that_is_a_link_writes_nothing_elsewhere(tmp_path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / optuna_study.FILE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="a link"):
        opened(tmp_path / "sweep")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("damage", ["text", "NUL", "cut", "zeros", "state", "folder", "fifo"])
def test_a_damaged_study_is_one_line(tmp_path, damage):
    run(opened(tmp_path), lambda point: point["k"], 2)
    path = tmp_path / optuna_study.FILE
    content = bytearray(path.read_bytes())
    if damage == "text":
        path.write_text("garbage, " * 1000)
    elif damage == "NUL":
        path.write_bytes(b"\0")
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "zeros":
        content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
        path.write_bytes(content)
    elif damage == "state":
        with sqlite3.connect(path) as tables:
            tables.execute("update trial_params set distribution_json = '[]'")
    else:
        path.unlink()
        (path.mkdir if damage == "folder" else partial(os.mkfifo, path))()
    with pytest.raises(UsageError, match=r"study\.db is not the study of a sweep") as error:
        opened(tmp_path)
    assert "\n" not in str(error.value)
    assert not optuna_study.should_prune(str(tmp_path), 0, 1, {"val/knn_top1": 0.0})


def test_without_a_study_nothing_is_pruned(tmp_path, caplog):
    assert not optuna_study.should_prune(None, None, 1, {"val/knn_top1": 0.0})
    assert not optuna_study.should_prune(str(tmp_path), 0, 1, {})
    assert not optuna_study.should_prune(str(tmp_path / "nowhere"), 0, 1, {"val/knn_top1": 0.0})
    assert not caplog.text, "a trial's recorded command may be typed where its search is not"
    assert not optuna_study.should_prune(str(tmp_path), 0, 1, {"val/knn_top1": 0.0})
    assert "does not answer" in caplog.text
