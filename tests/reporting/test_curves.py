import json

import pytest

from src.reporting import curves
from src.reporting.curves import Course, compare, over_epochs


def write(directory, values, metric="val/knn_top1", apart=5):
    directory.mkdir()
    rows = [{"step": apart * i, "time": 0, "metrics": {metric: value}} for i, value in enumerate(values)]
    rows.append({"step": 20, "time": 0, "metrics": {"train/loss": 1.0}})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def test_a_course_is_the_mean_over_seeds_where_all_of_them_have_a_value(tmp_path):
    folders = (write(tmp_path / "0", [10, 20, 30]), write(tmp_path / "1", [12, 26]))
    course = Course("SimCLR", 0, "black", 8, folders)
    assert over_epochs(course, "val/knn_top1") == [(0, 11, pytest.approx(2**0.5)), (2, 23, pytest.approx(18**0.5))]
    assert over_epochs(course._replace(directories=folders[:1]), "val/knn_top1") == [(0, 10, 0), (2, 20, 0), (4, 30, 0)]
    assert over_epochs(course, "support/label_agreement") == []


def test_the_untrained_encoder_is_a_level_over_all_epochs(tmp_path):
    folders = tuple(write(tmp_path / str(i), [value], "untrained/val/knn_top1") for i, value in enumerate((10, 12)))
    course = Course("untrained", 0, "black", 8, folders, is_untrained=True)
    deviation = pytest.approx(2**0.5)
    assert over_epochs(course, "val/knn_top1") == [(0, 11, deviation), (8, 11, deviation)]
    assert over_epochs(course._replace(is_untrained=False), "val/knn_top1") == []


def test_courses_are_lines_apart_in_colour_or_dashes_and_what_stores_nothing_has_no_nearest_vector(tmp_path):
    none, small, large = (
        (write(tmp_path / name, [0.1, 0.2], metric),)
        for name, metric in [("a", "val/knn_top1"), ("b", "support/label_agreement"), ("c", "support/label_agreement")]
    )
    figure = compare(
        [
            Course("SimCLR", 0, "black", 8, none),
            Course("KMCLR 50", 50, "blue", 8, small),
            Course("KMCLR 4,096", 4096, "blue", 8, large),
        ]
    )
    accuracy, agreement = figure.axes
    assert [line.get_label() for line in accuracy.lines] == ["SimCLR", "KMCLR 50", "KMCLR 4,096"]
    assert [line.get_label() for line in agreement.lines] == ["KMCLR 50", "KMCLR 4,096"]
    assert len({(line.get_color(), line.get_linestyle()) for line in accuracy.lines}) == 3
    many = [Course("KMCLR, support_weight=1 and 15 more", k, "blue", 8, none) for k in range(1, 31)]
    figure = compare(many)
    styles = {(line.get_linestyle(), line._dash_pattern[1] and tuple(line._dash_pattern[1]), line.get_marker())
              for line in figure.axes[0].lines}  # fmt: skip
    assert len(styles) == 30
    figure.canvas.draw()
    assert figure.legends[0].get_window_extent().width <= figure.bbox.width
    assert list(agreement.lines[0].get_ydata()) == [10, 20]  # a fraction, in percent
    assert list(agreement.lines[0].get_xdata()) == [0, 2]


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
