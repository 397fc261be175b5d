import threading

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from src.data import batches
from src.data.batches import check_batch_size, epoch_batches, epoch_order
from src.data.splits import Split
from src.errors import UsageError

seeds = st.integers(0, 2**40)


def split_of(count: int) -> Split:
    rows = torch.arange(count)
    images = rows.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    return Split(images, rows % 7, aspects=rows / 8 + 1, crop_size=2)


@given(st.integers(1, 50), st.integers(1, 50), seeds, st.integers(0, 1000))
def test_an_epoch_visits_every_row_at_most_once_in_full_batches(count, batch_size, seed, epoch):
    assume(batch_size <= count)
    split = split_of(count)
    batches = list(epoch_batches(split, batch_size, seed, epoch, "cpu"))

    assert len(batches) == count // batch_size
    ids = torch.cat([batch.ids for batch in batches])
    assert len(ids.unique()) == len(ids) == count // batch_size * batch_size
    for images, labels, ids, aspects in batches:
        assert torch.equal(aspects, split.aspects[ids])
        assert torch.equal(images, split.images[ids])
        assert torch.equal(labels, split.labels[ids])
        assert images.dtype == torch.uint8
        assert labels.dtype == ids.dtype == torch.int64


@given(st.integers(1, 200), seeds, st.integers(0, 1000))
def test_order_is_a_permutation_that_depends_on_nothing_else(count, seed, epoch):
    order = epoch_order(count, seed, epoch)
    torch.rand(3)  # the global generator moves on
    assert torch.equal(order, epoch_order(count, seed, epoch))
    assert torch.equal(order.sort().values, torch.arange(count))


def test_seeds_and_epochs_do_not_share_orders():
    orders = {tuple(epoch_order(20, seed, epoch).tolist()) for seed in range(30) for epoch in range(30)}
    assert len(orders) == 900  # (1, 0) and (0, 1), (1, 23) and (12, 3), ... all differ


def test_the_first_rows_are_spread_evenly():
    """Over many epochs each row comes first equally often: chi-squared with 9 degrees, 99.99% quantile 33.7."""
    first = torch.tensor([int(epoch_order(10, 0, epoch)[0]) for epoch in range(2000)]).bincount(minlength=10)
    assert float(((first - 200) ** 2 / 200).sum()) < 33.7


@given(st.integers(0, 6))
def test_start_resumes_inside_an_epoch(start):
    split = split_of(50)
    whole = list(epoch_batches(split, 8, 3, 5, "cpu"))
    rest = list(epoch_batches(split, 8, 3, 5, "cpu", start=start))
    assert len(rest) == len(whole) - start
    for resumed, original in zip(rest, whole[start:], strict=True):
        assert all(map(torch.equal, resumed, original))


def test_of_each_batch_only_the_wanted_images_are_read():
    """``rows`` selects the images that a rank reads; labels and ids are those of the whole batch."""
    whole = list(epoch_batches(split_of(50), 8, 3, 5, "cpu"))
    rest = list(epoch_batches(split_of(50), 8, 3, 5, "cpu", rows=slice(2, 5)))
    for part, batch in zip(rest, whole, strict=True):
        assert torch.equal(part.images, batch.images[2:5])
        assert torch.equal(part.labels, batch.labels)
        assert torch.equal(part.ids, batch.ids)


def test_streamed_batches_are_the_same(monkeypatch):
    """Batches are streamed when the device has no room for the split; they equal those that are not streamed."""
    split = split_of(50)
    direct = list(epoch_batches(split, 8, 3, 5, "cpu", start=1))
    monkeypatch.setattr(batches, "room", lambda device: 0)
    streamed = list(epoch_batches(split, 8, 3, 5, "cpu", start=1))
    assert len(streamed) == len(direct) == 5
    for one, other in zip(streamed, direct, strict=True):
        assert all(map(torch.equal, one, other))


def test_a_stream_that_is_left_early_leaves_no_thread(monkeypatch):
    monkeypatch.setattr(batches, "room", lambda device: 0)
    stream = epoch_batches(split_of(50), 8, 0, 0, "cpu")
    next(stream)
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("batches")]
    stream.close()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_what_goes_wrong_in_the_thread_is_raised_to_the_reader(monkeypatch):
    monkeypatch.setattr(batches, "room", lambda device: 0)
    split = split_of(50)
    with pytest.raises(IndexError):
        list(epoch_batches(Split(split.store[:40], split.labels), 8, 0, 0, "cpu"))


def test_a_batch_larger_than_the_split_is_refused_at_once():
    check_batch_size(5, split_of(5))
    with pytest.raises(UsageError, match="batch_size=6 is larger than the 5 training images"):
        epoch_batches(split_of(5), 6, 0, 0, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("home", ["cpu", "cuda"])
def test_batches_arrive_on_the_gpu_from_wherever_the_split_lives(home):
    split = split_of(50)
    for got, want in zip(
        epoch_batches(split.to(home), 8, 0, 0, "cuda"), epoch_batches(split, 8, 0, 0, "cpu"), strict=True
    ):
        assert all(tensor.is_cuda for tensor in got[:3])
        assert not got.aspects.is_cuda, "views are drawn on the CPU"
        assert all(torch.equal(a.cpu(), b) for a, b in zip(got, want, strict=True))
