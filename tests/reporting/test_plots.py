"""The plot of support-set size against accuracy."""

import errno
import math
import os
from dataclasses import replace
from itertools import pairwise

import pytest

from src.config.names import colour_of
from src.reporting import plots
from src.reporting.plots import by_size, caption, dots, marker_of, plot, to_svg
from src.reporting.rows import summarise
from tests.made_up_runs import STUDY, run, with_right_positives, with_untrained, without


def drawn(axes):
    """{title of a row: (place on the axis, mean, length of its bar on one side)} for each point of a panel."""
    found = {}
    for each in axes.containers:
        ((place, mean),) = each.lines[0].get_xydata()
        bars = each.lines[2][0].get_segments()[0] if each.lines[2] else None
        found[each.get_label()] = (place, mean, (bars[1][1] - bars[0][1]) / 2 if bars is not None else math.nan)
    return found


def test_the_caption_says_what_all_runs_share_in_words_for_people_and_how_many_seeds():
    rows, _ = summarise(STUDY)
    assert caption(rows) == "CIFAR-100, ResNet-18, 500 epochs, mean ± standard deviation over 3 seeds"
    rows, _ = summarise([run("simclr", epochs="5"), run("simclr")])
    assert caption(rows) == "CIFAR-100, ResNet-18, one seed"
    rows, _ = summarise(
        [run("simclr", epochs="5", **{"data.limit": "20000"}), run("simclr", **{"data.limit": "20000"})]
    )
    assert caption(rows) == "CIFAR-100, 20,000 training images, ResNet-18, one seed"
    rows, _ = summarise([run("simclr", epochs="1"), run("kmclr", 50, epochs="1"), run("kmclr", 50, 1, epochs="1")])
    assert caption(rows) == "CIFAR-100, ResNet-18, 1 epoch, mean ± standard deviation over 1 to 2 seeds"


def test_every_row_is_where_its_size_and_mean_are_with_a_bar_as_long_as_its_deviation():
    rows, _ = summarise(STUDY)
    (axes,) = plot(rows).axes
    points = drawn(axes)
    assert list(points) == [row.title for row in rows]
    ticks = dict(zip(axes.get_xticks(), (tick.get_text() for tick in axes.get_xticklabels()), strict=True))
    (zero,) = (place for place, text in ticks.items() if text == "0")
    low, high = axes.get_xlim()
    assert low < zero < 50 < 98304 < high  # 0 has a place of its own, left of the smallest size
    for row in rows:
        mean, std = row.mean("test/linear_top1"), row.std("test/linear_top1")
        assert points[row.title] == pytest.approx((row.size or zero, mean, std))
    (band,) = (patch for patch in axes.patches if patch.get_alpha())  # SimCLR's
    _, mean, std = points["SimCLR"]
    assert (band.get_y(), band.get_height()) == pytest.approx((mean - std, 2 * std))
    assert {text for text in ticks.values() if text} == {"0", "50", "400", "1,000", "4,096", "98,304"}
    assert axes.get_ylabel() == "Test linear top-1 accuracy (%)"


@pytest.mark.parametrize("draw", [by_size, dots])
def test_what_storing_is_worth_has_a_panel_of_its_own_with_the_intervals_of_the_table(draw):
    controls = [run("nnclr", 0, seed, 50 + seed) for seed in range(3)]
    gains = {("kmclr", 400): (2.0, 2.5, 1.5), ("nnclr", 4096): (0.5, -0.5, 0.0)}
    stored = [run(*each, seed, 50 + seed + gain) for each, some in gains.items() for seed, gain in enumerate(some)]
    stored.append(run("kmclr", 400, 3))  # of a seed that the control lacks
    rows, _ = summarise([run("simclr", seed=0, top1=49), *controls, *stored])
    figure = draw(rows)
    _, axes = figure.axes
    along = "y" if draw is by_size else "x"
    assert getattr(axes, f"get_{along}label")() == "Gain over the control (points;\npaired by seed, 95% intervals)"
    assert [0, 0] in [list(getattr(line, f"get_{along}data")()) for line in axes.lines]  # the controls' level
    half = 4.302653 * 0.5 / 3**0.5  # t of two degrees of freedom, and a deviation of half a point
    texts = {f"KMCLR 400: gain over control +2.00 ± {half:.2f}, 3 seeds"}
    texts |= {f"NNCLR 4,096: gain over control +0.00 ± {half:.2f}, 3 seeds"}
    texts |= {"SimCLR: gain over control -1.00, one seed"}
    assert {text for text in texts if f"<title>{text}</title>" in to_svg(figure)} == texts
    assert len(axes.containers) == 3  # not the control itself
    if draw is by_size:
        points = drawn(axes)
        assert points["KMCLR 400"][1:] == pytest.approx((2.0, half))
        assert not [patch for patch in axes.patches if patch.get_alpha()]  # SimCLR's interval is not drawn as a band


@pytest.mark.parametrize("draw", [by_size, dots])
def test_one_seed_has_no_panel_of_what_storing_is_worth_and_its_label_is_whole(draw):
    figure = draw(summarise([run("nnclr", 0), run("kmclr", 400, top1=52.0)])[0])
    (axes,) = figure.axes
    figure.draw_without_rendering()
    for label in (each for each in (axes.xaxis.label, axes.yaxis.label) if each.get_text()):
        extent = label.get_window_extent()
        assert extent.x0 >= 0
        assert extent.x1 <= figure.bbox.x1
        assert extent.y1 <= figure.bbox.y1


def test_how_many_positives_are_right_stands_beside_the_accuracy_where_it_is_known():
    sizes = {("nnclr", 4096): 12, ("nnclr", 98304): 30, ("kmclr", 400): 7}
    runs = [with_right_positives(run(*each), percent) for each, percent in sizes.items()]
    for method in (by_size, dots):
        rows, _ = summarise([run("simclr"), *runs])
        accuracy, right = method(rows).axes
        labels = {axes.get_ylabel() or axes.get_xlabel() for axes in (accuracy, right)} - {"Support-set size (vectors)"}
        assert {text for text in labels if "top-5" in text} == set()
        assert "Right positives of\nvalidation images (%)" in (right.get_ylabel(), right.get_xlabel())
    points = drawn(by_size(rows).axes[1])
    assert {title: mean for title, (_, mean, _) in points.items()} == pytest.approx(
        {"NNCLR 4,096": 12, "NNCLR 98,304": 30, "KMCLR 400": 7}
    )
    assert "<title>KMCLR 400: right positives 7.00, one seed</title>" in to_svg(by_size(rows))


def test_rows_that_are_dots_are_ranked_by_the_validation_images():
    best = replace(run("kmclr", 400), metrics={"val/linear_top1": 60.0, "test/linear_top1": 50.0})
    other = replace(run("nnclr", 400), metrics={"val/linear_top1": 50.0, "test/linear_top1": 60.0})
    names = [text.get_text() for text in dots(summarise([best, other])[0]).axes[0].get_yticklabels()]
    assert names == ["NNCLR 400", "KMCLR 400"]  # from the bottom up
    names = [
        text.get_text()
        for text in dots(summarise([best, without(other, "val/linear_top1")])[0]).axes[0].get_yticklabels()
    ]
    assert names == ["KMCLR 400", "NNCLR 400"]


@pytest.mark.parametrize("top1", [50.0, 99.95, 100.0])
def test_an_image_more_or_less_does_not_fill_a_panel(top1):
    """An axis spans at least `MIN_SPAN`, so that the difference of a single image does not look large."""
    rows, _ = summarise(
        [run("simclr", top1=top1), run("kmclr", 50, top1=top1 - 0.05), run("nnclr", 50, top1=top1 - 0.05)]
    )
    low, high = by_size(rows).axes[0].get_ylim()
    assert low < top1 - 0.05
    assert top1 <= high <= max(100, top1)
    assert high - low >= plots.MIN_SPAN - 1e-9


def test_methods_of_ones_own_that_share_a_colour_differ_in_their_marks():
    names = ("moco", "dino", "soft_knn")
    assert len({colour_of({"method.name": name}) for name in names}) == 1
    assert len({marker_of(name) for name in names}) == 3


def test_the_untrained_encoder_leaves_the_plot_its_scale():
    rows, _ = summarise([with_untrained(each, test_linear_top1=9.5) for each in STUDY])
    assert drawn(plot(rows).axes[0]) == drawn(plot(summarise(STUDY)[0]).axes[0])


def test_only_sizes_of_one_method_are_joined_and_what_stores_nothing_is_a_level():
    runs = [run("simclr"), run("nnclr", 0), run("nnclr", 400), run("kmclr", 50), run("kmclr", 400)]
    rows, _ = summarise(runs)
    assert [row.title for row in rows] == ["SimCLR", "nothing stored", "NNCLR 400", "KMCLR 50", "KMCLR 400"]
    figure = plot(rows)
    axes = figure.axes[0]
    joined = {line.get_label(): line.get_xdata() for line in axes.lines if len(line.get_xdata()) > 1}
    assert len(joined["KMCLR"]) == 2
    assert "NNCLR" not in joined
    levels = [line for line in axes.lines if list(line.get_xdata()) == [0, 1]]
    assert len(levels) == 2
    handles = dict(
        zip((text.get_text() for text in figure.legends[0].texts), figure.legends[0].legend_handles, strict=True)
    )
    assert handles["NNCLR"].get_linestyle() == "None"  # a single point has no line in the legend
    assert handles["KMCLR"].get_linestyle() == "-"
    places = {title: place for title, (place, _, _) in drawn(axes).items()}
    assert places["NNCLR 400"] != places["KMCLR 400"]  # beside each other, so that no bar hides another
    assert places["NNCLR 400"] * places["KMCLR 400"] == pytest.approx(400**2)
    assert places["SimCLR"] != places["nothing stored"]


def test_a_method_looks_the_same_alone_and_among_others():
    alone = plot(summarise([run("kmclr", 50)])[0]).axes[0].containers[0].lines[0]
    among = plot(summarise(STUDY)[0]).axes[0].containers[-1].lines[0]
    assert (alone.get_marker(), alone.get_color()) == (among.get_marker(), among.get_color())
    assert len({marker_of(method) for method in ("simclr", "nothing_stored", "nnclr", "kmclr", "byol")}) == 5


def test_one_seed_has_no_bar_and_axes_end_at_100_percent():
    axes = plot(summarise([run("simclr", top1=99.5), run("kmclr", 50, top1=98)])[0]).axes[0]
    assert all(math.isnan(bar) for _, _, bar in drawn(axes).values())
    assert axes.get_ylim()[1] <= 100
    assert not any(each.lines[0].get_clip_on() for each in axes.containers)  # a marker at 100% is not cut off


def test_dots_end_at_100_percent_too():
    runs = [run("kmclr", k, top1=100 - k % 7, **{"optimizer.lr": f"0.{k}"}) for k in range(50, 70)]
    axes = plot(summarise(runs)[0]).axes[0]
    assert axes.get_xlim()[1] <= 100
    assert not any(each.lines[0].get_clip_on() for each in axes.containers)


@pytest.mark.parametrize("sizes", [(50, 400, 1600, 4096, 4496, 16384, 300000), (1, 2, 3, 4), (50,), (98304, 100000)])
def test_labels_of_sizes_do_not_run_into_each_other(sizes):
    figure = plot(summarise([run("simclr"), *(run("kmclr", size) for size in sizes)])[0])
    figure.draw_without_rendering()
    for axes in figure.axes:
        shown = [tick for tick in axes.get_xticklabels() if tick.get_text()]
        assert len(shown) > 1
        if shown[0].get_rotation():  # apart by more than a line's height, measured across the slanted lines
            places = sorted(axes.transData.transform((tick.get_position()[0], 0))[0] for tick in shown)
            height = shown[0].get_fontsize() * figure.dpi / 72
            assert all((right - left) * math.sin(math.pi / 4) > height for left, right in pairwise(places))
        else:
            boxes = sorted((tick.get_window_extent() for tick in shown), key=lambda box: box.x0)
            assert all(left.x1 < right.x0 for left, right in pairwise(boxes))


def test_each_variant_is_one_line_of_the_plot_and_differs_from_the_others():
    runs = [run("kmclr", k, **{"method.forget": forget}) for k in (50, 400) for forget in ("reset", "decay")]
    axes = plot(summarise(runs)[0]).axes[0]
    lines = [line for line in axes.lines if len(line.get_xdata()) == 2 and line.get_label().startswith("KMCLR")]
    assert [line.get_label() for line in lines] == ["KMCLR, forget=decay", "KMCLR, forget=reset"]
    assert len({line.get_linestyle() for line in lines}) == 2


@pytest.mark.parametrize("method", ["kmclr", "nnclr", "somebodys"])
def test_as_many_variants_as_are_drawn_as_lines_have_a_marker_each_where_there_is_no_line(method):
    runs = [run(method, 400, **{"optimizer.lr": f"0.{number}"}) for number in range(plots.MAX_LINES)]
    marks = [each.lines[0] for each in plot(summarise(runs)[0]).axes[0].containers]
    assert len({(mark.get_marker(), mark.get_markerfacecolor()) for mark in marks}) == plots.MAX_LINES


def test_a_label_that_is_wider_than_the_picture_is_not_cut_by_its_edges():
    rows, _ = summarise([run("kmclr", 50), run("kmclr", 400)])
    figure = plot([replace(row, label=f"{row.name}, {'optimizer.lr=0.4, ' * 7}number={row.size}") for row in rows])
    figure.draw_without_rendering()
    extent = figure.legends[0].get_window_extent()
    assert extent.x0 >= 0
    assert extent.x1 <= figure.bbox.x1
    assert all("number=" in text.get_text() for text in figure.legends[0].texts)


def test_many_variants_are_dots_sorted_by_accuracy_and_none_is_lost():
    runs = [run("kmclr", k, top1=40 + k % 7, **{"support.revive_after": str(k)}) for k in range(50, 70)] + [
        run("nnclr", 0)
    ]
    rows, _ = summarise(runs)
    axes = plot(rows).axes[0]
    points = sorted((place, mean) for mean, place in (tuple(each.lines[0].get_xydata()[0]) for each in axes.containers))
    assert [place for place, _ in points] == list(range(len(rows)))
    assert [mean for _, mean in points] == sorted(row.mean("test/linear_top1") for row in rows)
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert sorted(labels) == sorted(row.title for row in rows)
    assert len(control_lines(axes)) == len(rows) - 1


def control_lines(axes):
    """{place of a row: its control's mean} for each vertical line that marks a control."""
    found = [line.get_xydata() for line in axes.lines if len(line.get_xdata()) == 2]
    return {(low[1] + high[1]) / 2: low[0] for low, high in found if low[0] == high[0] and high[1] - low[1] == 1}


def test_the_line_of_a_control_is_beside_its_own_rows_only():
    long = [run("kmclr", k, top1=60, **{"support.revive_after": str(k)}) for k in range(50, 60)]
    short = [run("kmclr", 50, top1=20, epochs="5"), run("nnclr", 0, top1=10, epochs="5")]
    rows, _ = summarise([*long, *short])
    axes = plot(rows).axes[0]
    assert control_lines(axes) == {1: 10}


def test_the_best_are_counted_among_the_rows_that_have_a_figure():
    rows, _ = summarise([run("kmclr", 400, **{"optimizer.lr": f"0.{number:03}"}) for number in range(90)])
    assert plot(rows).get_suptitle().endswith("; the 80 best of 90")
    unmeasured = [replace(row, runs=(without(row.runs[0], "test/linear_top1"),)) for row in rows[:20]]
    assert "best" not in plot([*unmeasured, *rows[20:]]).get_suptitle()


def test_the_dots_of_the_best_rows_are_drawn_with_their_deviations(monkeypatch):
    monkeypatch.setattr(plots, "MAX_DOTS", 3)
    accuracies = [(top1, seed) for top1 in range(50, 60) for seed in (0, 1)]
    rows, _ = summarise(
        [run("kmclr", 400, seed, top1 + seed, **{"optimizer.lr": f"0.{top1}"}) for top1, seed in accuracies]
    )
    marks = dots(rows).axes[0].containers
    assert [each.lines[0].get_xdata()[0] for each in marks] == [57.5, 58.5, 59.5]
    for each in marks:
        (low, _), (high, _) = each.lines[2][0].get_segments()[0]
        assert (high - low) / 2 == pytest.approx(0.5**0.5)


@pytest.mark.parametrize("runs", [[run("simclr")], [run("kmclr", 50)], [without(run("simclr"), "test/linear_top1")]])
def test_small_experiments_are_drawn_too(runs, tmp_path):
    plot(summarise(runs)[0]).savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_a_picture_that_does_not_fit_leaves_the_one_before(tmp_path, monkeypatch):
    path = tmp_path / "plot.png"
    plots.write_png(plot(summarise(STUDY)[0]), path, dpi=20)
    before = path.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"plot\.png"):
        plots.write_png(plot(summarise(STUDY[:3])[0]), path, dpi=20)
    assert before.startswith(b"\x89PNG")
    assert path.read_bytes() == before
