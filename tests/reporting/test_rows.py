"""Which runs are averaged in a row of a table, which never are, and which notes tell the reader so."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from src.config import identity
from src.reporting.comparison import compared_settings, distinguishing, select
from src.reporting.rows import NO_CONTROL, RIGHT_POSITIVES, control_of, difference, metrics_of, summarise
from src.runs.record import TAG_COLLAPSED, TAG_CONDITIONS_CHANGED, Record
from tests.config.test_schema import parsed
from tests.made_up_runs import STUDY, run, with_right_positives, with_untrained


def test_rows_are_in_the_order_of_methods_then_sizes_whatever_the_order_of_runs():
    expected = [("simclr", 0), ("nnclr", 4096), ("nnclr", 98304), ("kmclr", 50), ("kmclr", 400), ("kmclr", 1000)]
    for runs in (STUDY, STUDY[::-1]):
        rows, notes = summarise(runs)
        assert [(row.method, row.size) for row in rows] == expected
        assert notes == [NO_CONTROL]


@given(st.lists(st.floats(0, 100), min_size=1, max_size=6))
@settings(max_examples=50)
def test_mean_and_sample_deviation_over_seeds(accuracies):
    (row,), _ = summarise([run("simclr", seed=seed, top1=top1) for seed, top1 in enumerate(accuracies)])
    assert row.mean("test/linear_top1") == pytest.approx(np.mean(accuracies))
    if len(accuracies) == 1:
        assert math.isnan(row.std("test/linear_top1"))
    else:
        assert row.std("test/linear_top1") == pytest.approx(np.std(accuracies, ddof=1), abs=1e-9)


def test_the_untrained_encoder_is_one_row_whatever_was_trained_from_it_with_a_run_a_seed():
    """All runs of a seed measure the same encoder; a mean over all runs would weigh seeds by their number of runs."""
    runs = [
        with_untrained(run(method, size, seed), test_linear_top1=10.0 + seed, val_knn_top1=8.0 + seed)
        for method, size, seed in [("simclr", 0, 0), ("kmclr", 50, 0), ("kmclr", 400, 0), ("kmclr", 50, 1)]
    ]
    (first, *others), notes = summarise(runs)
    assert (first.title, first.size, len(first.runs)) == ("untrained", 0, 2)
    assert first.values("test/linear_top1") == [10, 11]
    assert first.mean("val/knn_top1") == 8.5
    without, same_notes = summarise([replace(each, metrics=run("simclr").metrics) for each in runs])
    assert [row.title for row in others] == [row.title for row in without]
    assert notes == same_notes


def test_right_positives_are_a_column_of_runs_that_know_them():
    knows = [with_right_positives(run("kmclr", 400, seed), percent) for seed, percent in enumerate((6, 8))]
    knows = [with_untrained(each, test_linear_top1=10) for each in knows]
    rows, notes = summarise(knows)
    assert list(metrics_of(rows).values())[-1] == "right positives"
    assert [row.text(RIGHT_POSITIVES) for row in rows] == ["-", "7.00 ± 1.41"]
    assert not any("right positives" in note for note in notes)
    _, notes = summarise([knows[0], run("nnclr", 4096)])
    assert "no right positives: NNCLR 4,096 (1 of 1 runs)" in notes
    assert RIGHT_POSITIVES not in metrics_of(summarise([run("kmclr", 400)])[0])


@pytest.mark.parametrize(("epochs", "is_young"), [("99", False), ("100", True), ("500", True), ("2", False)])
def test_right_positives_of_young_prototypes_are_told(epochs, is_young):
    """A note names the rows whose right positives are counted soon after a reset of the prototypes."""
    reset = {"support.forget": "reset", "support.forget_every": "3", "epochs": epochs}
    runs = [run("kmclr", 50, **reset), run("kmclr", 400, **reset), run("nnclr", 400, epochs=epochs)]
    _, notes = summarise([with_right_positives(each, 10) for each in runs])
    told = "right positives are counted soon after a reset of the prototypes: KMCLR 50, KMCLR 400"
    assert (told in notes) is is_young


def test_collapsed_runs_are_named():
    fine = [run("kmclr", 400, seed) for seed in range(2)]
    bad = replace(fine[1], tags={TAG_COLLAPSED: "at step 42: features of different images are alike"})
    (note,) = (note for note in summarise([fine[0], bad])[1] if "alike" in note)
    assert note == f"features or embeddings of different images became alike in training: {bad.name}"


def test_a_run_that_collapse_has_ended_is_left_out_as_collapsed():
    ended, stopped = (
        replace(run("kmclr", 400, status=status, name=status), tags={TAG_COLLAPSED: "at step 42"})
        for status in ("FAILED", "KILLED")
    )
    assert summarise([ended, stopped])[1] == ["left out: FAILED (collapsed), KILLED (killed)"]


def test_a_size_of_ones_own_that_is_not_the_number_of_vectors_tells_rows_apart():
    """A class from another package may store another number of vectors than its ``size`` (docs/library.md)."""
    runs = [run("pool", 32, seed, **{"support.size": size}) for size in ("64", "256") for seed in range(2)]
    rows, _ = summarise(runs)
    assert [(row.variant, len(row.runs)) for row in rows] == [("size=256", 2), ("size=64", 2)]
    assert len(summarise([run("pool", 64, seed, **{"support.size": "64"}) for seed in range(2)])[0]) == 1


def test_each_encoder_and_data_set_has_an_untrained_row_of_its_own():
    runs = [
        with_untrained(run("simclr", **{"backbone.name": name, "epochs": epochs}), test_linear_top1=top1)
        for name, epochs, top1 in [("resnet18", "5", 10), ("resnet18", "9", 10), ("resnet50", "5", 12)]
    ]
    settings = [("data.name", "cifar10", 20), ("data.limit", "500", 5), ("evaluation.epochs", "1", 9)]
    settings += [("precision", "bfloat16", 8)]
    for key, value, top1 in settings:
        other = run("simclr", **{"backbone.name": "resnet18", key: value})
        rows = summarise([runs[0], with_untrained(other, test_linear_top1=top1)])[0]
        rows = [row for row in rows if row.method == "untrained"]
        assert sorted(row.values("test/linear_top1") for row in rows) == sorted([[10], [top1]]), key
    rows = [row for row in summarise(runs)[0] if row.method == "untrained"]
    assert [(row.label, row.values("test/linear_top1")) for row in rows] == [
        ("untrained, backbone.name=resnet18", [10]),
        ("untrained, backbone.name=resnet50", [12]),
    ]


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


@pytest.mark.parametrize("key", ["knn_k", "knn_temperature", "lr", "epochs", "batch_size", "fewshot.draws"])
def test_runs_that_were_evaluated_otherwise_are_not_averaged(key):
    runs = [run("simclr", seed=seed, **{f"evaluation.{key}": str(seed)}) for seed in (1, 2)]
    assert [len(row.runs) for row in summarise(runs)[0]] == [1, 1]


def test_a_run_from_before_a_setting_existed_is_of_one_row_with_later_ones():
    """The neutral default of a setting is what was done before it, and both have the same hash."""
    later = {"optimizer.decay_all": "False", "support.precision": "float32", "schedule.milestones": "[]"}
    old, new = run("nnclr", 64), run("nnclr", 64, seed=1, **later)
    rows, notes = summarise([old, new])
    assert [(row.variant, len(row.runs)) for row in rows] == [("", 2)]
    assert notes == [NO_CONTROL]
    other = run("nnclr", 64, seed=2, **(later | {"optimizer.decay_all": "True"}))
    assert sorted((row.variant, len(row.runs)) for row in summarise([old, new, other])[0]) == [
        ("optimizer.decay_all=False", 2),
        ("optimizer.decay_all=True", 1),
    ]


WITHOUT_EFFECT = [
    (["data.final=true"], ["data.val_fraction=0.2", "data.split_seed=3"]),
    (["optimizer.weight_decay=0"], ["optimizer.trust_coefficient=0.1", "optimizer.decay_all=true"]),
    (["optimizer=adamw"], ["+optimizer.momentum=0.5"]),
    (["optimizer=sgd"], ["+optimizer.clip_trust=true"]),
    (["method=simclr"], ["search=torch"]),
    (["method=simclr"], ["+schedule.gamma=0.5"]),
    (["method=kmclr"], ["support.half_life=5", "support.refit_window=999", "objective.off_diagonal=0.5"]),
    (["method=nnclr"], ["objective.same_prototype=negative", "augment.view2.blur_sigma=[1,2]"]),
]


@pytest.mark.parametrize(("common", "more"), WITHOUT_EFFECT)
def test_a_setting_without_effect_makes_no_row_and_takes_no_control_away(common, more):
    """Runs that differ in it have one hash, and are one experiment."""
    stores = "method=simclr" not in common
    runs, hashes = [], []
    for seed, each in enumerate([[*common, *more], common, [*common, "epochs=7"]]):
        control = [*(override for override in each if not override.startswith("support.")), "support=none"]
        for overrides in [each, control] if stores else [each]:
            cfg = parsed(*overrides, f"seed={seed}")
            flat = {key: str(value) for key, value in identity.flat(cfg).items()}
            size = {"support_set_size": str(identity.support_set_size(cfg)), "support_bytes": "0"}
            runs.append(replace(run(cfg.method.name, seed=seed), params=flat | size))
            hashes.append(identity.config_hash(replace(cfg, seed=0)))
    assert len(set(hashes)) == 2 + 2 * stores
    rows, _ = summarise(runs)
    assert sorted(len(row.runs) for row in rows) == ([1, 1, 2, 2] if stores else [1, 2])
    assert all(control_of(row, rows) for row in rows if row.size)


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
        ("KMCLR, batch_size=64 and 1 more", 400),  # the temperature; no learning rate is that of most runs
    ]
    assert "with batch_size go objective.temperature, optimizer.lr" in notes
    rows, _ = summarise([*runs, run("simclr", batch_size="256", **{"optimizer.lr": "0.3"})])
    assert [row.label for row in rows] == [
        *("SimCLR", "NNCLR, batch_size=64 and 1 more", "KMCLR", "KMCLR", "KMCLR, batch_size=64 and 2 more")
    ]


def test_the_name_of_an_option_names_a_recipe():
    runs = [run("simclr", seed=seed, **{"optimizer.name": "lars", "lr": "0.4"}) for seed in (0, 1)]
    rows, _ = summarise([*runs, run("simclr", **{"optimizer.name": "sgd", "lr": "0.3"})])
    assert [row.label for row in rows] == ["SimCLR", "SimCLR, optimizer.name=sgd and 1 more"]


def test_seeds_that_were_computed_otherwise_are_noted():
    tags = [{"dtype": dtype} for dtype in ("float32", "bfloat16")]
    runs = [replace(run("nnclr", 0, seed), tags=each) for seed, each in enumerate(tags)]
    assert summarise(runs)[1] == ["the runs of a row differ in dtype: nothing stored"]
    assert summarise([*runs[:1], replace(run("simclr"), tags=tags[1])])[1] == ["rows differ in dtype"]
    assert summarise([*runs[:1], run("simclr")])[1] == []  # a record of an older version does not say


def test_runs_of_code_that_was_edited_between_them_say_so():
    old, new = ({"code/my_package": digest} for digest in ("0" * 16, "1" * 16))
    runs = [replace(own("none", seed=seed), tags=tags) for seed, tags in enumerate([old, new])]
    assert summarise(runs)[1] == ["the runs of a row differ in code/my_package: mine"]
    rows = [runs[0], replace(own("queue", 256), tags=new), run("simclr")]
    assert "rows differ in code/my_package" in summarise(rows)[1]
    assert summarise([runs[0], run("simclr")])[1] == []


def test_a_run_counts_under_the_evaluation_that_its_figures_are_of():
    """A run's params are those of its first session; a tag says what a later session evaluated with."""
    one, other = (run("simclr", seed=seed, **{"evaluation.epochs": "20"}) for seed in (0, 1))
    (row,), _ = summarise([one, other])
    assert len(row.runs) == 2
    told = {"evaluation.epochs": "1", "evaluation_changed": "evaluation.epochs was 20 and is 1 at step 9"}
    rows, notes = summarise([replace(one, tags=told), other])
    assert sorted(each.variant for each in rows) == ["evaluation.epochs=1", "evaluation.epochs=20"]
    assert (
        "with the figures of the last evaluation (evaluation.epochs was 20 and is 1 at step 9): simclr-0-seed0" in notes
    )
    (row,), _ = summarise([replace(each, tags=told) for each in (one, other)])
    assert len(row.runs) == 2


def test_a_validation_by_fewer_images_is_noted():
    runs = [run("simclr", seed=seed, **{"evaluation.bank": bank}) for seed, bank in enumerate(("50000", "30"))]
    (row,), notes = summarise(runs)
    assert len(row.runs) == 2
    assert notes == ["the runs differ in evaluation.bank: their val kNN cannot be compared"]
    assert summarise([runs[0], run("simclr", seed=2)])[1] == []  # a record of an older version does not say


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
        assert [each.run_id for each in kept] == [new.run_id]
        assert notes == ["left out: simclr-0-seed0 (failed)", "simclr-0-seed0 was run 2 times: only the newest counts"]


def test_folders_of_one_configuration_are_all_named():
    """A batch size above the number of images is lowered to it when the name is made already."""
    runs = [run("simclr", top1=10, at=at) for at in (1.0, 2.0)]
    runs[1].name = "simclr-0-other"
    kept, notes = select(runs)
    assert [each.run_id for each in kept] == [runs[1].run_id]
    assert notes == ["simclr-0-seed0 and simclr-0-other are one configuration: only the newest counts"]


@pytest.mark.parametrize("status", ["FAILED", "KILLED", "RUNNING"])
def test_runs_without_a_result_are_named_and_left_out(status):
    rows, notes = summarise([run("simclr"), run("kmclr", 50, status=status)])
    assert [row.method for row in rows] == ["simclr"]
    assert notes == [f"left out: kmclr-50-seed0 ({status.lower()})"]


def test_a_foreign_run_in_the_experiment_is_named_and_left_out():
    foreign = Record("x", "someone's", "study", 0, status="FINISHED")
    rows, notes = summarise([run("simclr"), foreign])
    assert len(rows) == 1
    assert notes == ["left out: someone's (not a training run)"]


def test_a_title_is_the_label_with_the_size_behind_the_method():
    rows, _ = summarise([run("simclr"), run("kmclr", 4096, **{"method.forget": "none"}), run("kmclr", 4096)])
    assert [row.title for row in rows] == ["SimCLR", "KMCLR 4,096, forget=none", "KMCLR 4,096, forget=reset"]
    assert replace(rows[1], label="KMCLR and 3 more").title == "KMCLR 4,096 and 3 more"
    assert summarise([run("nnclr", 0)])[0][0].title == "nothing stored"


@pytest.mark.parametrize("value", ["***", "", "-1", "1e400", "9" * 5000, "nan", "1.5", "\u0661"])
@pytest.mark.parametrize("key", ["support_set_size", "support_bytes", "epochs"])
def test_a_run_whose_sizes_are_no_numbers_is_left_out_and_named(key, value):
    rows, notes = summarise([run("simclr"), run("nnclr", 64, **{key: value})])
    assert [row.method for row in rows] == ["simclr"]
    assert f"nnclr-64-seed0 (its {key} is {value})" in notes[0]


def test_an_old_run_whose_settings_are_damaged_is_left_out_and_named():
    _, notes = summarise([run("simclr"), run("nnclr", 64, **{"method.support_weight": "***"})])
    assert "objective.support_weight=***: is not a number" in notes[0]


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(-5, 5)), min_size=2, max_size=6))
@settings(max_examples=50)
def test_the_interval_of_a_difference_is_that_of_a_paired_t_test(pairs):
    control = [run("nnclr", 0, seed, top1) for seed, (top1, _) in enumerate(pairs)]
    rows, _ = summarise([*control, *(run("kmclr", 50, seed, sum(both)) for seed, both in enumerate(pairs))])
    found = difference(rows[1], rows[0], "test/linear_top1")
    gains = [(top1 + gain) - top1 for top1, gain in pairs]
    expected = stats.ttest_1samp(gains, 0).confidence_interval(0.95)
    assert (found.mean, found.pairs) == (pytest.approx(np.mean(gains)), len(pairs))
    if np.std(gains) > 1e-9:
        assert (found.low, found.high) == pytest.approx(tuple(expected))


def test_equal_differences_have_no_interval():
    """With few test images they can be equal by chance, and an interval of no width would be taken for a proof."""
    figures = {"nnclr": (50.1, 51.1), "kmclr": (51.1, 52.1)}
    runs = [
        run(name, 50 * (name == "kmclr"), seed, top1) for name, two in figures.items() for seed, top1 in enumerate(two)
    ]
    rows, _ = summarise(runs)
    found = difference(rows[1], rows[0], "test/linear_top1")
    assert (found.mean, found.pairs) == (pytest.approx(1), 2)
    assert math.isnan(found.half_width)


def test_rows_of_as_many_but_other_seeds_say_so():
    one, other = [run("nnclr", 0, seed) for seed in (0, 1)], [run("kmclr", 50, seed) for seed in (2, 3)]
    assert "the rows differ in their seeds" in summarise([*one, *other])[1]
    same = [run("kmclr", 50, seed) for seed in (0, 1)]
    assert "the rows differ in their seeds" not in summarise([*one, *same])[1]


def test_seeds_that_only_one_of_two_rows_has_are_no_pair():
    rows, _ = summarise(
        [run("nnclr", 0, 0, 50), run("nnclr", 0, 1, 90), run("kmclr", 50, 0, 52), run("kmclr", 50, 2, 0)]
    )
    found = difference(rows[1], rows[0], "test/linear_top1")
    assert (found.mean, found.pairs) == (2, 1)
    assert math.isnan(found.half_width)
    assert difference(rows[1], rows[0], "of nobody").pairs == 0


def test_beside_a_teacher_the_control_is_byol():
    def taught(method, support, **more):
        settings = {"support.name": support, "objective.name": "teacher", "objective.momentum": "0.99"}
        return run(method, **settings, **more)

    runs = [taught("byol", "none"), taught("mnn", "queue", **{"objective.neighbours": "5"}), run("kmclr", 50)]
    rows, _ = summarise([*runs, taught("mine", "none", **{"method._target_": "mine.Method"}), run("simclr")])
    controls = {row.name: getattr(control_of(row, rows), "name", None) for row in rows}
    assert controls == {"BYOL": None, "MNN": "BYOL", "KMCLR": None, "mine": None, "SimCLR": None}


def test_the_control_of_a_relation_is_the_relation_to_nothing():
    def beside_a_teacher(method, loss, support):
        return run(method, **{"objective.name": loss, "support.name": support})

    byol, nothing = (
        beside_a_teacher("byol", "teacher", "none"),
        beside_a_teacher("relation_nothing", "relation", "none"),
    )
    stored = beside_a_teacher("relation_queue", "relation", "queue")
    rows, _ = summarise([byol, nothing, stored])
    controls = {row.name: getattr(control_of(row, rows), "name", None) for row in rows}
    assert controls == {"BYOL": None, "Relation, nothing stored": None, "Relation, queue": "Relation, nothing stored"}
    rows, _ = summarise([byol, stored])
    assert [control_of(row, rows) for row in rows] == [None, None]


def test_the_settings_of_a_row_are_gathered_once_however_many_rows_there_are(monkeypatch):
    runs = [run(*each, **{"optimizer.lr": f"0.{n:02}"}) for n in range(20) for each in (("nnclr", 0), ("kmclr", 50))]
    asked = []
    monkeypatch.setattr(
        "src.reporting.rows.compared_settings", lambda each: asked.append(each) or compared_settings(each)
    )
    rows, _ = summarise([*runs, run("simclr")])
    found = [control_of(row, rows) for row in rows]
    assert sum(control is not None for control in found) == 20
    assert len(asked) == len(rows)


def test_a_note_says_that_no_row_tells_what_storing_is_worth_and_how_to_add_one():
    stored = [run("kmclr", 50), run("kmclr", 400), run("simclr")]
    assert summarise(stored)[1] == [NO_CONTROL]
    assert "include runs with support=none" in NO_CONTROL
    assert NO_CONTROL in summarise([*stored, run("nnclr", 0, epochs="9")])[1], "with other settings it is no control"
    assert NO_CONTROL not in summarise([*stored, run("nnclr", 0)])[1]
    assert NO_CONTROL not in summarise([*stored, run("nnclr", 64, epochs="9"), run("nnclr", 0, epochs="9")])[1]
    assert summarise([run("simclr")])[1] == []


def test_a_note_names_few_of_many_runs():
    moved = {TAG_CONDITIONS_CHANGED: "threads was 1 and is 2 from step 9 on"}
    runs = [replace(run("nnclr", 0, seed), tags=moved) for seed in range(100)]
    _, notes = summarise([*runs, *(run("nnclr", 64, seed, status="FAILED") for seed in range(100))])
    assert len(notes) == 2
    assert notes[0].endswith("nnclr-64-seed19 (failed), and 80 more")
    assert notes[1].startswith(
        "continued under other conditions (threads was 1 and is 2 from step 9 on): nnclr-0-seed0, "
    )
    assert notes[1].endswith("nnclr-0-seed19, and 80 more")


def test_how_a_queue_is_searched_keeps_no_control_from_it():
    """The control stores nothing, so it may have other settings of the search."""
    own = {"objective.support_weight": "0.5", "objective.predictor_hidden": "0"}
    lists = {"search.name": "ivf", "search.index": "IVF64,Flat", "search.nprobe": "4", "search.refresh_every": "50"}
    rows, _ = summarise([run("nnclr", 0, **own, **{"search.name": "auto"}), run("nnclr", 400, **own, **lists)])
    assert control_of(rows[1], rows) is rows[0]


def test_the_control_does_the_same_but_for_what_it_stores():
    def weighed(method, size, weight):
        more = {"method.support_weight": weight, "method.predictor_hidden": "0"}
        return run(method, size, **more, **{"method.same_prototype": "mask"} if method == "kmclr" else {})

    runs = [
        weighed(*each, weight) for weight in ("0.5", "0.3") for each in (("nnclr", 0), ("nnclr", 400), ("kmclr", 50))
    ]
    rows, _ = summarise([*runs, run("simclr"), weighed("kmclr", 50, "0.1")])
    found = {row.title: control_of(row, rows) for row in rows}
    assert found["NNCLR 400, support_weight=0.3"].label == found["KMCLR 50, support_weight=0.3"].label
    assert found["NNCLR 400, support_weight=0.5"].label != found["KMCLR 50, support_weight=0.3"].label
    assert found["KMCLR 50, support_weight=0.1"] is None  # no such control was run
    assert found["SimCLR"] is None  # either of two rows could be meant
    (one, two), _ = summarise([weighed("nnclr", 0, "0.5"), run("simclr")])
    assert control_of(one, [one, two]) is two
    assert control_of(two, [one, two]) is None
    negative = run("kmclr", 50, **{"method.support_weight": "0.5", "method.same_prototype": "negative"})
    later = run("nnclr", 0, **{"method.support_weight": "0.5", "method.same_prototype": "mask"})
    rows, _ = summarise([negative, later])
    assert control_of(rows[1], rows) is rows[0]  # masking makes no difference where nothing is stored
    rows, _ = summarise([weighed("nnclr", 0, "0.5"), run("simclr", epochs="9")])
    assert control_of(rows[0], rows) is None  # it has another number of epochs


@pytest.mark.parametrize(("key", "value"), [("data.limit", "100"), ("origin", "a1b2"), ("backbone.stem", "small")])
def test_a_setting_that_only_one_of_two_rows_has_keeps_the_control_from_it(key, value):
    """A row is no control if only one of the two has a setting, such as a limit of images."""
    other, control, stored = run("nnclr", 0, **{key: value}), run("nnclr", 0), run("nnclr", 128)
    rows, _ = summarise([other, stored])
    assert control_of(rows[1], rows) is None
    rows, _ = summarise([control, replace(stored, params=stored.params | {key: value})])
    assert control_of(rows[1], rows) is None
    rows, _ = summarise([other, control, stored])
    found = control_of(rows[-1], rows)
    assert found.runs[0].run_id == control.run_id


def test_weights_that_were_not_trained_here_are_named_by_init():
    """The digest of the weights tells rows apart, and their file's name is what people see."""
    first = run("simclr", epochs="0", origin="a1b2", init="first-0.20251105.pt")
    second = run("simclr", epochs="0", origin="c3d4", init="second.pt")
    moved = run("simclr", epochs="0", origin="c3d4", init="elsewhere/second.pt", seed="1")
    rows, notes = summarise([first, second, moved])
    assert [row.name for row in rows] == ["not trained here"] * 2
    labels = {row.label.removeprefix("not trained here, init="): len(row.runs) for row in rows}
    assert labels in ({"first-0.20251105.pt": 1, name: 2} for name in ("second.pt", "elsewhere/second.pt"))
    assert notes[0] == "the runs also differ in init: each combination has its own row"


def test_other_weights_at_the_same_place_have_rows_of_their_own():
    runs = [run("simclr", epochs="0", origin=8 * digit, init="start.pt", seed="0") for digit in "12"]
    rows, _ = summarise([*runs, run("simclr", epochs="0", origin="33333333", init="other.pt")])
    assert [row.label.split("init=")[1] for row in rows] == ["other.pt", "start.pt (11111111)", "start.pt (22222222)"]


def test_one_encoder_from_elsewhere_beside_a_study_is_named():
    given = run("simclr", epochs="0", origin="a1b2", init="dino.safetensors")
    rows, notes = summarise([run("simclr"), run("nnclr", 0), run("kmclr", 50), given])
    (label,) = [row.label for row in rows if row.name == "not trained here"]
    assert label == "not trained here, init=dino.safetensors and 1 more"  # its epochs
    assert "with init go epochs" in notes
    assert len({row.colour for row in rows}) == 4


def test_a_note_names_the_method_of_runs_that_train_nothing():
    settings = {"epochs": "0", "origin": "a1b2", "init": "start.pt"}
    runs = [run("simclr", seed=seed, **settings | {"method.temperature": "0.1"}) for seed in (0, 1)]
    _, notes = summarise([*runs, run("simclr", **settings | {"method.temperature": "0.5"})])
    assert "where a row does not say otherwise: SimCLR's temperature=0.1" in notes


def test_simclrs_control_has_its_temperature_and_its_decorrelation():
    def both(**settings):
        own = {"objective.support_weight": "0.5", "objective.predictor_hidden": "4096"}  # of which SimCLR has neither
        return run("simclr", **settings), run("nnclr", 0, **settings, **own)

    cold, warm = ({"objective.temperature": temperature} for temperature in ("0.1", "0.5"))
    rows, _ = summarise([both(**warm)[0], both(**cold)[1]])
    assert control_of(rows[0], rows) is None
    rows, _ = summarise([*both(**warm), *both(**cold)])
    found = {row.title: control_of(row, rows).title for row in rows if row.method == "simclr"}
    assert found == {f"SimCLR, temperature={t}": f"nothing stored, temperature={t}" for t in ("0.1", "0.5")}
    rows, _ = summarise([both(**cold)[0], both(**cold, **{"objective.decorrelation": "0.02"})[1]])
    assert control_of(rows[0], rows) is None


def test_a_label_has_three_digits_of_a_long_fraction():
    rows, _ = summarise([run("simclr", **{"optimizer.lr": lr}) for lr in ("0.123456", "1.2345678e-05", "0.5")])
    assert {row.label for row in rows} == {f"SimCLR, optimizer.lr={lr}" for lr in ("0.123", "1.23e-05", "0.5")}


def test_simclrs_control_is_no_method_of_ones_own():
    same = {"support.name": "none", "objective.name": "nt_xent", "objective.temperature": "0.2"}
    one = run("mine", **same)
    del one.params["method.temperature"]
    (simclr, mine), _ = summarise([run("simclr"), one])
    assert mine.is_control
    assert mine.shared_with_control[1] == simclr.shared_with_control[1]
    assert control_of(simclr, [simclr, mine]) is None


def test_a_number_of_vectors_that_changes_is_that_of_the_end():
    """The size of a support set that grows and shrinks is its size at the end, as a mean over the seeds."""
    runs = [run("evolving", 400, seed) for seed in (0, 1)]
    for each, in_use, peak in zip(runs, (150.0, 153.0), (210.0, 180.0), strict=True):
        each.metrics.update({"support/size": in_use, "support/peak_size": peak})
    rows, notes = summarise([*runs, run("kmclr", 400)])
    assert [(row.method, row.size, len(row.runs)) for row in rows] == [("kmclr", 400, 1), ("evolving", 152, 2)]
    (note,) = [each for each in notes if "in use" in each]
    assert note.startswith("the vectors of evolving are those in use at the end")
    assert "ever more than 210," in note


def test_rows_with_room_for_different_numbers_of_vectors_say_so_where_as_many_are_in_use():
    runs = [run("evolving", size, seed, **{"support.size": str(size)}) for size in (400, 800) for seed in (0, 1)]
    for each in runs:
        each.metrics["support/size"] = 150.0
    assert [row.title for row in summarise(runs)[0]] == ["evolving 150, size=400", "evolving 150, size=800"]
    assert [row.title for row in summarise(runs[:2])[0]] == ["evolving 150"]


def test_characters_that_a_terminal_would_obey_are_not_printed():
    name, data, tag = "a\x1b]0;title\x07b", "set\x1b[2J\ud800\u202e", "rows\nof another"
    tagged = replace(run("kmclr", 50, name=name, **{"data.name": data}), tags={TAG_CONDITIONS_CHANGED: tag})
    rows, notes = summarise([tagged, run("simclr", name=name, status="FAILED")])
    shown = [rows[0].runs[0].params["data.name"], rows[0].runs[0].name, *notes]
    assert shown[:2] == ["set�[2J��", "a�]0;title�b"]
    assert all(text.isprintable() for text in shown)


def own(support, size=0, seed=0, **settings):
    """A run of a user's method, which works with any support set."""
    params = {"method._target_": "mine.Method", "support.name": support} | settings
    params |= {"support_set_size": str(size), "support.precision": "float32"} if size else {}
    return run("mine", size, seed, **params)


def test_the_control_of_ones_own_method_has_the_methods_settings():
    rows, _ = summarise([
        own("none", **{"method.margin": "0.5"}), own("none", **{"method.margin": "0.2"}),
        own("queue", 256, **{"method.margin": "0.2"}),
    ])  # fmt: skip
    by = {(row.size, row.runs[0].params["method.margin"]): row for row in rows}
    stored, control, other = by[256, "0.2"], by[0, "0.2"], by[0, "0.5"]
    assert control_of(stored, rows) is control
    assert control_of(stored, [stored, other]) is None


def test_rows_of_ones_own_method_are_named_by_the_support_set():
    rows, notes = summarise([own("none"), own("queue", 64), own("reservoir", 64), own("kmeans", 64)])
    assert [row.label for row in rows] == ["mine, kmeans", "mine, none", "mine, queue", "mine, reservoir"]
    assert notes[0] == "the runs also differ in support.name: each combination has its own row"
