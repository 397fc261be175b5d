import json

import pytest
from matplotlib import rc_context

from src.reporting import curves
from src.reporting.curves import NEIGHBOUR, RIGHT_POSITIVES, Course, compare, over_epochs


def write(directory, values, metric="val/knn_top1"):
    directory.mkdir()
    rows = [{"step": 5 * i, "time": 0, "metrics": {metric: value}} for i, value in enumerate(values)]
    rows.append({"step": 20, "time": 0, "metrics": {"train/loss": 1.0}})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def points(course, metric):
    return over_epochs(course, [metric])[metric]


def course(title, size, directories, colour="blue", cycle=1, method=None):
    method = method or title.split()[0]
    return Course(title, method, size, colour, 8, directories, cycle, has_queue=method == "NNCLR")


def test_a_course_is_the_mean_over_seeds_where_all_of_them_have_a_value(tmp_path):
    folders = (write(tmp_path / "0", [10, 20, 30]), write(tmp_path / "1", [12, 26]))
    both = course("SimCLR", 0, folders)
    assert points(both, "val/knn_top1") == [(0, 11, pytest.approx(2**0.5)), (2, 23, pytest.approx(18**0.5))]
    assert points(both._replace(directories=folders[:1]), "val/knn_top1") == [(0, 10, 0), (2, 20, 0), (4, 30, 0)]
    assert points(both, NEIGHBOUR) == []


def test_the_untrained_encoder_is_a_level_over_all_epochs(tmp_path):
    folders = tuple(write(tmp_path / str(i), [value], "untrained/val/knn_top1") for i, value in enumerate((10, 12)))
    untrained = course("untrained", 0, folders)._replace(is_untrained=True)
    deviation = pytest.approx(2**0.5)
    assert points(untrained, "val/knn_top1") == [(0, 11, deviation), (8, 11, deviation)]
    assert points(untrained._replace(is_untrained=False), "val/knn_top1") == []


def test_prototypes_that_are_reset_are_compared_where_they_are_oldest(tmp_path):
    folder = (write(tmp_path / "0", [0.1, 0.2, 0.3, 0.4, 0.5], "support/purity"),)  # measured every second epoch
    reset = course("KMCLR 50", 50, folder, cycle=4)
    assert [epoch for epoch, _, _ in points(reset, "support/purity")] == [4, 8]  # 0 is before the first epoch
    assert [epoch for epoch, _, _ in points(reset._replace(cycle=1), "support/purity")] == [0, 2, 4, 6, 8]


def test_prototypes_that_are_never_measured_where_they_are_oldest_are_drawn_all_the_same(tmp_path):
    """As in 20 epochs with the default settings: a validation every ten epochs, and a reset every three."""
    (tmp_path / "run").mkdir()
    rows = [{"step": step, "time": 0, "metrics": {RIGHT_POSITIVES: step}} for step in (10, 20)]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    short = course("KMCLR 50", 50, (tmp_path / "run",), cycle=3)._replace(epochs=20)
    assert points(short, RIGHT_POSITIVES) == [(10, 10, 0), (20, 20, 0)]


def test_the_rows_of_a_run_are_read_once_for_all_panels(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(curves, "read", lambda directory, read=curves.read: asked.append(directory) or read(directory))
    folders = tuple(write(tmp_path / str(seed), [0.1, 0.2], RIGHT_POSITIVES) for seed in range(3))
    assert compare([course("KMCLR 50", 50, folders)]).axes
    assert asked == list(folders)


@pytest.mark.parametrize(
    ("agreement", "own", "expected"), [(0.8, 0.7, 1 / 3), (0.3, 0.0, 0.3), (0.3, None, None), (1.0, 1.0, None)]
)
def test_the_anchors_own_image_is_no_neighbour(agreement, own, expected):
    """Self-hits are taken out of the label agreement."""
    metrics = {"support/label_agreement": agreement} | ({} if own is None else {"support/self_hit": own})
    found = curves.neighbour_agreement(metrics)
    assert found == ({} if expected is None else {NEIGHBOUR: pytest.approx(expected)})
    assert curves.neighbour_agreement({"train/loss": 1.0}) == {}


def test_a_few_courses_share_their_panels_and_what_stores_nothing_has_no_nearest_entry(tmp_path):
    none, small, large, own = (
        (write(tmp_path / name, [0.1, 0.2], metric),)
        for name, metric in zip("abcd", ["val/knn_top1", NEIGHBOUR, NEIGHBOUR, "support/self_hit"], strict=True)
    )
    some = [course("SimCLR", 0, none, "black"), course("NNCLR 50", 50, small), course("NNCLR 4,096", 4096, large)]
    accuracy, agreement = compare(some).axes
    assert [line.get_label() for line in accuracy.lines] == ["SimCLR"]
    assert [line.get_label() for line in agreement.lines] == ["NNCLR 50", "NNCLR 4,096"]
    assert len({tuple(line.get_color()) for line in agreement.lines}) == 2
    assert list(agreement.lines[0].get_ydata()) == pytest.approx([10, 20])  # a fraction, in percent
    assert list(agreement.lines[0].get_xdata()) == [0, 2]
    assert "own image" in compare([course("NNCLR 9", 9, own, "red"), *some]).axes[-1].get_ylabel()


def of_class(folder, method, metrics):
    """A run's curve of metrics that are 0.1 throughout."""
    rows = [{"step": i, "time": 0, "metrics": dict.fromkeys(metrics, 0.1)} for i in range(3)]
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return course(f"{method} {folder.name}", 50, (folder,), method=method)


def test_right_positives_of_validation_images_replace_the_agreement_in_training_where_all_runs_have_them(tmp_path):
    new = of_class(tmp_path / "new", "NNCLR", [RIGHT_POSITIVES, NEIGHBOUR])
    old = of_class(tmp_path / "old", "NNCLR", [NEIGHBOUR])
    assert [axes.get_ylabel().split("\n")[0] for axes in compare([new]).axes] == ["right positives of"]
    both = compare([new, old]).axes
    assert [len(axes.lines) for axes in both] == [1, 2]
    assert list(both[0].lines[0].get_ydata()) == [0.1, 0.1, 0.1]  # in percent, as it was logged


def test_the_agreement_in_training_is_drawn_of_queues_only_because_it_flatters_prototypes(tmp_path):
    queue = of_class(tmp_path / "queue", "NNCLR", ["val/knn_top1", NEIGHBOUR])
    prototypes = of_class(tmp_path / "prototypes", "KMCLR", ["val/knn_top1", NEIGHBOUR])
    accuracy, agreement = compare([queue, prototypes]).axes
    assert [len(axes.lines) for axes in (accuracy, agreement)] == [2, 1]
    assert agreement.lines[0].get_label() == queue.title
    assert "from other images" in agreement.get_ylabel()
    (accuracy,) = compare([prototypes]).axes
    assert "kNN" in accuracy.get_ylabel()


LONG = "with a number of settings that need several lines in a legend, since each is named by its whole key and value"


@pytest.mark.parametrize("courses", [3, 7])
def test_one_legend_below_the_panels_has_each_name_once_and_takes_no_room_from_them(tmp_path, courses):
    folders = [(write(tmp_path / str(i), [10, 20 + i, 25]),) for i in range(courses)]
    methods = ["KMCLR", "NNCLR"] * courses  # many curves are drawn in a column for each method
    titles = ["SimCLR", *(f"{methods[i]} {i}, {LONG}" for i in range(1, courses))]
    some = [course(title, i, folders[i]) for i, title in enumerate(titles)]
    with rc_context({"font.size": 9}):  # the font size of a report
        figure, short = compare(some), compare([each._replace(title=each.title[:8]) for each in some])
        for each in (figure, short):
            each.draw_without_rendering()
    (legend,) = figure.legends
    assert sorted(text.get_text()[:7] for text in legend.texts) == sorted(title[:7] for title in titles)
    box = legend.get_window_extent()
    assert figure.bbox.x0 <= box.x0
    assert box.x1 <= figure.bbox.x1
    assert figure.bbox.y0 <= box.y0
    assert all(box.y1 < axes.get_window_extent().y0 for axes in figure.axes)
    heights = [each.axes[0].get_window_extent().height for each in (figure, short)]
    assert heights[0] == pytest.approx(heights[1], rel=0.05)


def test_the_legend_shows_a_name_as_it_is_in_the_first_panel(tmp_path):
    """With markers, which the many points of the second panel lack."""
    folder = write(tmp_path / "a", [10, 20])
    with (folder / "metrics.jsonl").open("a") as file:
        for step in range(20):
            file.write(json.dumps({"step": step, "time": 0, "metrics": {"support/self_hit": 0.1}}) + "\n")
    figure = compare([course("NNCLR 9", 9, (folder,))])
    (handle,) = figure.legends[0].get_lines()
    assert [axes.lines[0].get_marker() for axes in figure.axes] == ["o", ""]
    assert handle.get_marker() == "o"


def test_panels_beside_each_other_end_at_the_same_epoch(tmp_path):
    """The last point of prototypes that are reset comes earlier than that of the other panel."""
    folder = write(tmp_path / "a", [10, 20, 30, 40, 50])
    with (folder / "metrics.jsonl").open("a") as file:
        for step in (5, 10, 15):
            file.write(json.dumps({"step": step, "time": 0, "metrics": {RIGHT_POSITIVES: 10}}) + "\n")
    first, second = compare([course("KMCLR 50", 50, (folder,), cycle=2)]).axes
    assert first.get_xlim() == second.get_xlim()
    assert first.get_xlim()[0] == 0
    assert first.get_xlim()[1] > 8


def test_runs_that_validate_on_nothing_have_no_picture_together(tmp_path):
    some = [course(f"SimCLR {i}", 0, (write(tmp_path / str(i), []),)) for i in range(7)]
    assert compare(some[:1]) is None
    assert compare(some) is None
    assert compare([]) is None


def test_runs_without_epochs_have_no_picture_together(tmp_path):
    some = [course(f"SimCLR {i}", 0, (write(tmp_path / str(i), [50.0]),))._replace(epochs=0) for i in range(2)]
    assert compare(some) is None


def test_many_courses_have_a_column_a_method_and_only_the_best_of_a_crowd_has_a_name(tmp_path):
    folders = [(write(tmp_path / str(i), [10, 20 + i % 7]),) for i in range(20)]
    many = [course(f"KMCLR {i}", i, folders[i], method="KMCLR") for i in range(1, 13)]
    few = [course(f"NNCLR {i}", i, folders[i], "red") for i in (13, 14)]
    left, right = compare([course("SimCLR", 0, folders[0], "black"), *few, *many]).axes
    assert (left.get_title(), right.get_title()) == ("NNCLR", "KMCLR")
    named = [axes.get_legend_handles_labels()[1] for axes in (left, right)]
    assert named == [["SimCLR", "NNCLR 13", "NNCLR 14"], ["SimCLR", "KMCLR 6, best kNN of 12"]]
    (legend,) = left.figure.legends
    assert [text.get_text() for text in legend.texts] == [*named[0], named[1][1]]
    assert len(right.lines) == 13  # the control and all of the crowd


def test_the_first_panel_of_a_line_that_is_drawn_has_its_name(tmp_path):
    """The first column's method has no self-hits and no panel of them, so the second column's panel has the name."""
    folders = [write(tmp_path / str(i), [10, 20]) for i in range(6)]
    for folder in folders[3:]:
        row = {"step": 5, "time": 0, "metrics": {"support/self_hit": 0.5}}
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    some = [course(f"KMCLR {i}", 1 + i, (folders[i],), method="KMCLR") for i in range(3)]
    some += [course(f"MNN {i}", 1 + i, (folders[i],), "red", method="MNN") for i in range(3, 6)]
    first, second, self_hits = compare(some).axes
    assert [axes.get_ylabel() != "" for axes in (first, second, self_hits)] == [True, False, True]
    assert all(label.get_visible() for label in self_hits.get_yticklabels())


@pytest.mark.parametrize("keys", [("train/loss", "val/knn_top1", "support/dead"), ("train/loss",)])
def test_curves_are_read_in_order_and_drawn(tmp_path, keys):
    rows = [{"step": step, "time": 0, "metrics": dict.fromkeys(keys, step / 2)} for step in range(4)]
    rows[3]["metrics"]["train/loss"] = "nan"  # as the tracker writes what JSON cannot
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = curves.read(tmp_path)
    assert read.keys() == set(keys)
    steps, losses = read["train/loss"]
    assert steps == [0, 1, 2, 3]
    assert losses[:3] == [0.0, 0.5, 1.0]
    assert losses[3] != losses[3]
    assert curves.plot(tmp_path).read_bytes().startswith(b"\x89PNG")
