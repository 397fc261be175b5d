from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from src.errors import UsageError
from src.models import ResNetTiny
from src.runs.record import Record
from src.support.kmeans import KMeans
from src.support.search import TorchSearch
from src.training.checks import (
    _refuse_idle_refit,
    refuse_large_batch,
    refuse_unfillable,
    refuse_unset_gradients,
    warn_of_doubtful_settings,
    warn_of_late_filling,
)
from tests.composing import parsed


def test_doubtful_settings_are_warned_of(run, caplog):
    run("method=nnclr", "queue_size=201", "epochs=2", directory="large")
    assert "queue_size=201: more than the 200 training images" in caplog.text
    run("method=kmclr", "k=201", "epochs=2", directory="other")
    assert "k=201: more prototypes than the 200 training images" in caplog.text
    run("method=kmclr", "k=7", "epochs=1", directory="short")
    assert "schedule.warmup_epochs=2: not shorter than epochs=1" in caplog.text


@pytest.mark.parametrize(
    ("overrides", "images", "warns"),
    [
        (["method=nnclr", "queue_size=200"], 199, True),
        (["method=nnclr", "queue_size=200"], 200, False),
        (["method=kmclr", "k=200"], 199, True),
        (["method=kmclr", "k=200"], 200, False),
        (["method=simclr", "epochs=5", "schedule.warmup_epochs=5"], 200, True),
        (["method=simclr", "epochs=5", "schedule.warmup_epochs=4.9"], 200, False),
        (["method=simclr", "batch_size=200"], 199, True),
        (["method=simclr", "batch_size=200"], 200, False),
    ],
)
def test_settings_are_doubtful_from_an_exact_bound_on(caplog, overrides, images, warns):
    warn_of_doubtful_settings(parsed("batch_size=64", *overrides), images)
    assert bool(caplog.text) == warns


REFIT = ["method=kmclr", "k=7", "batch_size=64", "epochs=6", "support.refit=faiss", "support.forget_every=2"]
REFIT += ["support.refit_every=1"]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["support.refit_window=640"], ""),  # 2 epochs of 5 batches
        (["support.refit_window=641"], r"\(640 embeddings are seen in support.forget_every=2\)"),
        (["support.refit_window=641", "support.forget=none"], ""),
        (["support.refit_window=1921", "support.forget=none"], r"\(1920 embeddings are seen in epochs=6\)"),
        (["support.refit_window=1920", "support.forget_every=7"], ""),
        (["support.refit_window=64", "support.refit_every=30"], ""),
        (["support.refit_window=64", "support.refit_every=31"], "support.refit_every=31 would re-cluster"),
        (["support.refit_window=1280", "support.forget=none", "support.refit_every=16"], "is not full at any step"),
        (["support.refit_window=1280", "support.forget=none", "support.refit_every=15"], ""),  # full from step 20 on
        (["support.refit_window=16384", "support.refit=online"], ""),
    ],
)
def test_a_window_of_which_nothing_is_ever_re_clustered_is_refused(overrides, says):
    """Otherwise the vectors of the window would be reported as stored, though none is ever used."""
    cfg = parsed(*REFIT, *overrides)
    with pytest.raises(UsageError, match=says) if says else nullcontext():
        refuse_unfillable(cfg, 383)


def test_a_window_that_came_with_the_weights_need_not_be_filled():
    refuse_unfillable(parsed(*REFIT, "support.refit_window=1921", "support.forget=none"), 383, filled=True)
    with pytest.raises(UsageError, match=r"support.refit_window=641"):  # but a reset empties it
        refuse_unfillable(parsed(*REFIT, "support.refit_window=641"), 383, filled=True)


WITH_WINDOW = parsed("method=kmclr", "k=2", "support.refit=faiss")


@given(forget=st.sampled_from(["none", "reset"]), numbers=st.tuples(*[st.integers(1, 6)] * 6))
def test_it_is_refused_if_and_only_if_prototypes_never_re_cluster(forget, numbers):
    """Those of a run of a few steps, in the order of the training loop."""
    epochs, steps, batch_size, window, every, cycle = numbers
    batch_size, window = batch_size + 1, 3 * window
    settings = {"refit_window": window, "refit_every": every, "forget": forget, "forget_every": cycle}
    support = replace(WITH_WINDOW.support, **settings)
    cfg = replace(WITH_WINDOW, support=support, epochs=epochs, batch_size=batch_size)
    resets = {"reset_every": cycle if forget == "reset" else 0}
    kmeans, done = KMeans(2, 2, 1, TorchSearch(), refit_window=window, refit_every=every, **resets), []
    kmeans._refit = lambda *_: done.append(1)
    rows = torch.arange(batch_size)
    for epoch in range(epochs):
        kmeans.start_epoch(epoch)
        for _ in range(steps):
            kmeans.update(torch.rand(batch_size, 2), rows, 0 * rows)
    with nullcontext() if done else pytest.raises(UsageError, match=r"support.refit_window"):
        _refuse_idle_refit(cfg, steps * batch_size, filled=False)


def test_an_idle_window_is_refused_before_anything_is_written(run, tmp_path):
    with pytest.raises(UsageError, match=r"support.refit_window=16384: is not full at any .* support.refit=online"):
        run("method=kmclr", "k=7", "epochs=1", "support.refit=faiss", directory="refit")
    assert not (tmp_path / "refit").exists()


def test_a_batch_shrinks_to_the_images_whether_its_size_is_typed_or_not(run, monkeypatch, caplog, capsys):
    few = ["method=simclr", "data.limit=50", "epochs=1"]
    directory = run(*few)
    assert "batch_size=64: more than the 50 training images, so each step takes all of them" in caplog.text
    assert Record.load(directory).params["batch_size"] == "50"
    monkeypatch.setattr("sys.argv", ["src.train", "batch_size=64"])
    capsys.readouterr()
    run(*few)
    assert capsys.readouterr().out.startswith("run: finished")


def test_a_batch_of_equal_parts_or_of_a_single_image_is_refused():
    data, single = SimpleNamespace(train=range(180)), SimpleNamespace(train=range(1))
    refuse_large_batch(parsed(), data)
    refuse_large_batch(parsed("batch_size=180", "backbone.bn_splits=4"), data, ranks=2)
    for cfg, ranks in ((parsed(), 2), (parsed("backbone.bn_splits=8"), 1)):
        with pytest.raises(UsageError, match="batch_size=256 is larger than the 180 training images"):
            refuse_large_batch(cfg, data, ranks)
    with pytest.raises(UsageError, match="batch_size=256 is larger than the 1 training images"):
        refuse_large_batch(parsed(), single)


def test_images_that_are_left_over_in_every_epoch_fill_no_support_set():
    settings = ["method=nnclr", "batch_size=100", "epochs=4"]
    refuse_unfillable(parsed(*settings, "queue_size=300"), 150)
    with pytest.raises(UsageError, match=r"queue_size=301: is never filled, because only 300 embeddings"):
        refuse_unfillable(parsed(*settings, "queue_size=301"), 150)


@pytest.mark.parametrize(("size", "stem", "warns"), [(224, "small", True), (224, "large", False), (64, "small", False)])
def test_a_stem_that_keeps_every_pixel_of_a_large_image_is_warned_of(caplog, size, stem, warns):
    warn_of_doubtful_settings(parsed(f"data.image_size={size}", f"backbone.stem={stem}"), 50_000)
    assert ("backbone.stem=small: keeps all 224 x 224 pixels, 16 times the work" in caplog.text) == warns


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["method=nnclr", "queue_size=321"],
            "queue_size=321: is never filled, because only 320 embeddings are seen before the last batch of epochs=2",
        ),
        (
            ["method=kmclr", "k=129", "support.forget_every=1"],
            "k=129: .* prototypes start anew every epoch .*, and only 128 embeddings are seen in that time",
        ),
        (["epochs=1", "batch_size=200", "k=5"], "only 0 embeddings .*; set batch_size lower or epochs higher"),
        (["method=kmclr", "k=321", "support.forget_every=5"], "k=321: is never filled"),
        (["method=kmclr", "k=321", "support.forget=none"], "k=321: is never filled"),
        (["method=kmclr", "k=321", "support.forget_every=2"], "before the last batch of epochs=2"),
        (["support=evolving", "support.start=321"], "support.start=321: is never filled"),
    ],
)
def test_a_support_set_that_is_never_filled_is_refused(run, tmp_path, overrides, says):
    """200 images make three batches of 64, so in two epochs 320 embeddings are seen before the last batch."""
    with pytest.raises(UsageError, match=says):
        run(*overrides)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "largest", [["method=nnclr", "queue_size=320"], ["method=kmclr", "k=128", "support.forget_every=1"]]
)
def test_a_support_set_that_is_filled_in_the_last_moment_is_used(run, largest):
    assert 1 <= Record.load(run(*largest)).metrics["support/perplexity"] <= 64  # of the last batch's lookups


def test_a_support_set_that_is_filled_in_less_than_half_of_the_steps_is_warned_of(caplog):
    """In two epochs of three batches of 64, 192 entries are filled after three of the six steps, 193 after four."""
    for overrides, warns in {
        ("method=nnclr", "queue_size=192"): False,
        ("method=nnclr", "queue_size=193"): True,
        ("method=kmclr", "k=65", "support.forget_every=1"): True,
        ("method=simclr",): False,
    }.items():
        caplog.clear()
        warn_of_late_filling(parsed("epochs=2", "batch_size=64", *overrides), 200, filled=False)
        assert bool(caplog.text) == warns
    warn_of_late_filling(parsed("epochs=2", "batch_size=64", "method=nnclr", "queue_size=193"), 200, filled=False)
    line = "queue_size=193: is filled after 4 of the 6 steps of epochs=2; until then the positive is the other view"
    assert line in caplog.text
    caplog.clear()
    warn_of_late_filling(parsed("epochs=2", "batch_size=64", "method=nnclr", "queue_size=193"), 200, filled=True)
    assert not caplog.text


def test_a_strided_convolution_of_one_pixel_is_refused_where_its_gradient_is_not_computed():
    """Torch returns uninitialised memory as that gradient: nan or, worse, arbitrary numbers."""
    encoder, cpu = ResNetTiny("large"), torch.device("cpu")
    with pytest.raises(UsageError, match=r"data.image_size=16: one pixel .*, or data.image_size higher$"):
        refuse_unset_gradients(encoder, 16, cpu, torch.bfloat16)
    assert encoder.training
    assert not any(module._forward_pre_hooks for module in encoder.modules())
    refuse_unset_gradients(encoder, 32, cpu, torch.bfloat16)
    refuse_unset_gradients(encoder, 16, cpu, torch.float32)
    refuse_unset_gradients(ResNetTiny("small"), 8, cpu, torch.bfloat16)


def test_for_looking_at_one_image_nothing_is_compiled():
    """`refuse_unset_gradients` passes one image through the encoder, which must not make torch compile it."""
    encoder, compiled = ResNetTiny("small"), []
    encoder.compile(backend=lambda graph, _: compiled.append(graph) or graph.forward)
    refuse_unset_gradients(encoder, 8, torch.device("cpu"), torch.bfloat16)
    assert compiled == []
