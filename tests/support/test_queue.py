import io
import math
from collections import deque

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from src.errors import UsageError
from src.support import search
from src.support.queue import Queue
from src.support.search import InvertedLists, TorchSearch

DIM = 6


def make(size):
    return Queue(size, DIM, TorchSearch())


@settings(max_examples=50)
@given(size=st.integers(1, 20), batches=st.lists(st.integers(1, 30), min_size=1, max_size=8), seed=st.integers(0, 999))
def test_it_holds_what_a_bounded_deque_holds(size, batches, seed):
    torch.manual_seed(seed)
    queue, oracle, image = make(size), deque(maxlen=size), 0
    for batch in batches:
        rows, images = torch.randn(batch, DIM), torch.arange(image, image + batch)
        image += batch
        queue.update(rows, images, images % 3)
        oracle.extend(zip(F.normalize(rows, dim=1), images.tolist(), strict=True))
        stored = {int(i): row for i, row in zip(queue.images_N, queue.ring.rows_ND, strict=True) if i >= 0}
        assert stored.keys() == {i for _, i in oracle}
        for row, i in oracle:
            torch.testing.assert_close(stored[i], row)
        assert queue.ready == (image >= size)


@settings(max_examples=30)
@given(size=st.integers(1, 20), batch=st.integers(1, 30), seed=st.integers(0, 999))
def test_lookup_is_the_highest_cosine_of_the_filled_part(size, batch, seed):
    torch.manual_seed(seed)
    queue, rows = make(size), torch.randn(batch, DIM) * 5
    queue.update(rows, torch.arange(batch), torch.zeros(batch, dtype=torch.int64))
    queries = torch.randn(4, DIM)
    found = queue.lookup(queries)
    kept = rows[-min(size, batch) :]
    similarity = F.cosine_similarity(queries[:, None], kept[None], dim=2)
    torch.testing.assert_close(found.embeddings, F.normalize(kept[similarity.argmax(1)], dim=1))
    torch.testing.assert_close(found.embeddings.norm(dim=1), torch.ones(4))
    assert torch.equal(queue.images_of(found.ids), (similarity.argmax(1) + batch - len(kept)))


def test_lookup_changes_nothing_and_carries_no_gradient():
    queue = make(8)
    queue.update(torch.randn(8, DIM), torch.arange(8), torch.arange(8))
    before = {key: value.clone() for key, value in queue.state_dict().items() if torch.is_tensor(value)}
    found = queue.lookup(torch.randn(3, DIM, requires_grad=True))
    assert not found.embeddings.requires_grad
    after = queue.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_age_and_classes_are_of_the_entries_that_are_filled():
    queue = make(6)
    assert queue.age_steps() == 0
    for step, age in enumerate((0, 0.5, 1, 1)):
        queue.update(torch.randn(2, DIM), torch.arange(2), torch.tensor([step, 10 + step]))
        assert queue.age_steps() == age
    assert queue.labels_of(torch.arange(6)).tolist() == [3, 13, 1, 11, 2, 12]


def test_an_empty_queue_has_no_neighbours():
    with pytest.raises(ValueError, match="holds 0"):
        make(4).lookup(torch.randn(2, DIM))


def test_state_dict_carries_everything():
    queue, restored = make(10), make(10)
    for step in range(3):
        queue.update(torch.randn(7, DIM), torch.arange(7) + 7 * step, torch.arange(7))
    restored.load_state_dict(queue.state_dict())
    for each in (queue, restored):
        torch.manual_seed(5)
        each.update(torch.randn(4, DIM), torch.arange(4), torch.arange(4))
    assert restored.ready
    assert torch.equal(queue.ring.rows_ND, restored.ring.rows_ND)
    assert torch.equal(queue.written_N, restored.written_N)
    assert queue.age_steps() == restored.age_steps()


def test_stats_by_hand():
    queue = make(4)
    queue.update(torch.eye(DIM)[:2], torch.tensor([10, 11]), torch.tensor([0, 1]))
    queue.update(torch.eye(DIM)[2:4], torch.tensor([12, 13]), torch.tensor([0, 1]))
    ids = torch.tensor([0, 0, 1, 2])
    queue.record(ids, images_Q=torch.tensor([10, 12, 13, 12]), labels_Q=torch.tensor([0, 1, 1, 1]))
    stats = queue.stats()
    assert stats["support/label_agreement"] == 2 / 4
    assert stats["support/self_hit"] == 2 / 4
    assert stats["support/dead"] == 1
    entropy = -(0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25))
    assert stats["support/perplexity"] == pytest.approx(math.exp(entropy))
    assert stats["support/age_steps"] == 0.5
    queue.clear_stats()
    assert queue.stats() == {"support/age_steps": 0.5}
    queue.record(torch.tensor([3]), images_Q=torch.tensor([10]), labels_Q=torch.tensor([0]))
    assert queue.stats()["support/label_agreement"] == queue.stats()["support/self_hit"] == 0
    assert queue.stored_bytes == 4 * DIM * 4


def test_a_bfloat16_queue_takes_half_the_memory_and_loses_little():
    torch.manual_seed(0)
    rows = torch.randn(512, 64)
    whole, half = (Queue(512, 64, TorchSearch(), dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    for queue in (whole, half):
        queue.update(rows, torch.arange(512), torch.zeros(512, dtype=torch.int64))
    assert half.stored_bytes == whole.stored_bytes / 2
    queries = F.normalize(torch.randn(256, 64), dim=1)
    exact, found = whole.lookup(queries), half.lookup(queries)
    assert found.embeddings.dtype == torch.float32
    lost = ((exact.embeddings - found.embeddings) * queries).sum(1)
    assert lost.mean() < 0.002
    assert lost.max() < 0.02


def listed(size, nprobe, factory="IVF8,Flat", refresh_every=4):
    pytest.importorskip("faiss")
    lists = InvertedLists(size, 16, factory, nprobe)
    return Queue(size, 16, TorchSearch(), lists=lists, refresh_every=refresh_every)


def batch_of(step, rows=50):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(rows, 16, generator=generator), torch.arange(rows) + rows * step, torch.arange(rows) % 5


@pytest.mark.parametrize("at_once", [64, 2**16])
def test_all_lists_searched_is_exact_search_whatever_has_been_overwritten(monkeypatch, at_once):
    monkeypatch.setattr(search, "VECTORS_AT_ONCE", at_once)
    exact, queue = Queue(180, 16, TorchSearch()), listed(180, nprobe=8)
    queries = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    for step in range(15):  # three trainings; the ring is overwritten four times
        for each in (exact, queue):
            each.update(*batch_of(step))
        assert torch.equal(queue.lookup(queries).ids, exact.lookup(queries).ids)
        assert torch.equal(queue.lookup(queries).embeddings, exact.lookup(queries).embeddings)


def test_several_neighbours_are_searched_exactly():
    exact, queue = Queue(180, 16, TorchSearch()), listed(180, nprobe=1)
    for step in range(5):
        for each in (exact, queue):
            each.update(*batch_of(step))
    queries = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    assert torch.equal(queue.nearest(queries, 3).ids, exact.nearest(queries, 3).ids)


def test_lists_are_trained_when_the_queue_is_full_and_anew_every_so_many_steps():
    queue, trained = listed(180, nprobe=1, refresh_every=4), []
    for step in range(13):
        queue.update(*batch_of(step))
        trained.append(queue.refreshed)
    assert trained == [0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12]


def test_few_lists_find_most_neighbours():
    exact, queue = Queue(2000, 16, TorchSearch()), listed(2000, nprobe=4, factory="IVF16,Flat")
    for step in range(42):
        for each in (exact, queue):
            each.update(*batch_of(step))
    queries = torch.randn(400, 16, generator=torch.Generator().manual_seed(1))
    agreeing = (queue.lookup(queries).ids == exact.lookup(queries).ids).float().mean()
    assert 0.5 < agreeing < 1


def test_a_query_whose_lists_are_empty_is_searched_exactly():
    exact, queue = Queue(100, 16, TorchSearch()), listed(100, nprobe=1, factory="IVF64,Flat", refresh_every=10**6)
    for step in range(4):  # no vector that trained the lists is left
        for each in (exact, queue):
            each.update(*batch_of(step))
    queries = F.normalize(batch_of(0)[0][:40], dim=1)  # near centroids whose members are gone
    lost = queue.lists.nearest(queries, queue.ring.total) < 0
    assert lost.any()
    assert torch.equal(queue.lookup(queries).ids[lost], exact.lookup(queries).ids[lost])


@pytest.mark.parametrize("stopped_at", [2, 5, 6, 9])
def test_lists_resume_to_the_same_neighbours(stopped_at):
    unbroken, before, after = (listed(180, nprobe=1) for _ in range(3))
    queries = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    for step in range(12):
        unbroken.update(*batch_of(step))
        if step < stopped_at:
            before.update(*batch_of(step))
            continue
        if step == stopped_at:
            saved = io.BytesIO()
            torch.save(before.state_dict(), saved)
            saved.seek(0)
            after.load_state_dict(torch.load(saved, weights_only=True))
            if before.ready:
                assert torch.equal(after.lookup(queries).ids, before.lookup(queries).ids)
        after.update(*batch_of(step))
        if after.ready:
            assert torch.equal(after.lookup(queries).ids, unbroken.lookup(queries).ids)


def test_lists_count_as_memory():
    queue = listed(200, nprobe=1)
    for step in range(4):
        queue.update(*batch_of(step))
    vectors, numbers, centroids = 200 * 16 * 4, 200 * 8, 8 * 16 * 4
    assert queue.stored_bytes == vectors + (vectors + numbers + centroids)


@pytest.mark.parametrize(
    ("factory", "size", "says"),
    [("nonsense", 100, "FAISS refuses"), ("Flat", 100, "not an inverted-file"), ("IVF64,Flat", 50, "more lists than")],
)
def test_an_index_that_cannot_serve_is_refused(factory, size, says):
    pytest.importorskip("faiss")
    with pytest.raises(UsageError, match=f"search.index={factory}.*{says}"):
        InvertedLists(size, 16, factory, 1)


def test_an_index_that_so_few_vectors_cannot_train_is_refused_when_they_are_there():
    queue = listed(128, nprobe=1, factory="IVF4,PQ8")
    queue.update(*batch_of(0, 100))
    with pytest.raises(UsageError, match=r"search.index=IVF4,PQ8: FAISS cannot find its centroids from 128 vectors"):
        queue.update(*batch_of(1, 100))
