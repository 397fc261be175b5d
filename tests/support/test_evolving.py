"""Evolving prototypes merge as in scipy's Ward, split with the right odds, and are as many as there are clusters."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.hierarchy import fcluster, linkage

from src.errors import UsageError
from src.support.base import Space
from src.support.evolving import Evolving
from src.support.search import TorchSearch

DIM, CLASSES = 16, 3


def make(size=200, start=4, penalty=1e-3, every=20, dim=DIM):
    return Evolving(Space(dim, CLASSES, TorchSearch()), size, start, penalty, every)


def update(evolving, rows, first_image=0):
    images = torch.arange(first_image, first_image + len(rows))
    evolving.update(rows, images, images % CLASSES)


def clusters(count):
    """The centres [count, D] of tight clusters that lie well apart, and a function that draws a batch from them."""
    centres = torch.linalg.qr(torch.randn(DIM, DIM))[0][:count]

    def batch(size=256):
        return centres[torch.randint(count, (size,))] + 0.3 / DIM**0.5 * torch.randn(size, DIM)

    return centres, batch


def of_each(evolving, centres):
    """The number of prototypes in each cluster [count], and the number in none."""
    cosine = evolving.vectors_ND @ centres.T
    near = cosine.max(1).values > 0.8
    return torch.bincount(cosine.argmax(1)[near], minlength=len(centres)), int((~near).sum())


@pytest.mark.parametrize("start", [2, 10, 60])
def test_their_number_follows_that_of_the_clusters_from_too_few_and_from_too_many(start):
    centres, batch = clusters(10)
    evolving = make(start=start)
    for _ in range(20 * 12):
        update(evolving, batch())
    per_cluster, stray = of_each(evolving, centres)
    assert per_cluster.min() >= 1
    assert stray == 0
    assert evolving.seeded == 10 + 1  # the last one is on trial until the next merger
    for _ in range(19):
        update(evolving, batch())
    evolving._merge()
    assert evolving.seeded == 10
    assert torch.equal(of_each(evolving, centres)[0], torch.ones(10, dtype=torch.int64))


def test_it_follows_clusters_that_come_and_go():
    _, batch = clusters(12)
    evolving = make(start=12)
    _, fewer = clusters(4)
    for draw, expected in ((batch, 12), (fewer, 4), (batch, 12)):
        for _ in range(20 * 25):
            update(evolving, draw())
        assert expected + 1 <= evolving.seeded <= expected + 2
    assert evolving.stats()["support/peak_size"] >= 13


@settings(max_examples=30)
@given(count=st.integers(3, 25), penalty=st.floats(1e-4, 0.3), seed=st.integers(0, 999))
def test_merging_is_wards_agglomeration_cut_at_the_penalty(count, penalty, seed):
    torch.manual_seed(seed)
    rows = F.normalize(torch.randn(count, DIM), dim=1)
    evolving = make(start=count, penalty=penalty, every=10**6)
    update(evolving, rows)
    evolving._merge()
    scatter = count * (1 - rows.mean(0).square().sum().item())
    tree = linkage(rows.double().numpy(), "ward")  # whose heights are the root of twice what a union adds
    expected = fcluster(tree, (2 * penalty * scatter) ** 0.5, "distance")
    if expected.max() == 1:
        expected = fcluster(tree, 2, "maxclust")
    groups = [rows[torch.as_tensor(expected == each)] for each in set(expected)]
    means = torch.stack([group.mean(0) for group in groups])
    found = evolving.means_KD[: evolving.seeded]
    assert len(found) == len(means)
    matched = torch.cdist(means, found).argmin(1)
    torch.testing.assert_close(found[matched], means, atol=1e-5, rtol=1e-5)
    assert evolving.counts_K[matched].tolist() == [len(group) for group in groups]
    assert not evolving.means_KD[evolving.seeded :].any()


def test_a_prototype_whose_members_are_gone_vanishes_and_moves_nothing():
    evolving = make(start=3, every=5, penalty=0.01)
    axes = torch.eye(DIM)[:3]
    update(evolving, axes)
    for _ in range(200):
        update(evolving, axes[:2].repeat(8, 1))
    vectors = evolving.vectors_ND
    assert (vectors @ axes[2]).max() < 1e-6
    torch.testing.assert_close((vectors @ axes[:2].T).max(0).values, torch.ones(2))


def test_a_merger_brings_together_all_that_is_known_of_both():
    evolving = make(size=6, start=4, every=10**6, penalty=0.05)
    rows = torch.eye(DIM)[:4]
    rows[3] = rows[1] + 0.01
    evolving.update(rows, torch.tensor([7, 8, 9, 10]), torch.tensor([0, 1, 2, 2]))
    evolving.clear_stats()
    evolving.record(torch.tensor([0, 1, 3, 3]), torch.arange(4), torch.tensor([0, 1, 2, 1]))
    evolving.written_K[:4] = torch.tensor([6, 2, 3, 5])
    evolving._merge()
    assert evolving.seeded == 3
    assert evolving.counts_K.tolist() == [1, 2, 1, 0, 0, 0]
    assert evolving.images_K.tolist() == [7, -1, 9, -1, -1, -1]
    assert evolving.hits_N.tolist() == [1, 3, 0, 0, 0, 0]
    assert evolving.classes_KC[1].tolist() == [0, 1, 1]
    assert evolving.served_KC[1].tolist() == [0, 2, 1]
    assert evolving.written_K.tolist() == [6, 5, 3, 0, 0, 0]
    stats = evolving.stats()
    assert (stats["support/size"], stats["support/peak_size"], stats["support/dead"]) == (3, 4, 1)
    assert 0 <= stats["support/drift"] < 0.01
    update(evolving, rows[:1])
    assert evolving.ready
    assert evolving.stats()["support/peak_size"] == 4


def test_new_prototypes_are_drawn_by_their_squared_distance():
    axes = torch.eye(DIM)
    far, near = axes[2], F.normalize(axes[0] + 0.5 * axes[3], dim=0)
    batch = torch.stack([far, near, axes[0], axes[1]])
    odds = 1 / (1 + (1 - near[0]).item())  # the squared distances are 2 and 2 - 2 cos
    chosen = 0
    for seed in range(200):
        evolving = make(start=2)
        update(evolving, axes[:2])
        torch.manual_seed(seed)
        evolving._split(batch, torch.arange(4), torch.zeros(4, dtype=torch.int64))
        assert evolving.seeded == 3
        chosen += int(evolving.images_K[2] == 0)
        assert evolving.images_K[2] in (0, 1)
    assert abs(chosen / 200 - odds) < 4 * (odds * (1 - odds) / 200) ** 0.5


def test_there_are_never_more_than_the_slots_nor_fewer_than_two():
    evolving = make(size=7, start=3, penalty=1e-6, every=2)
    for _ in range(60):
        update(evolving, torch.randn(32, DIM))
        assert 2 <= evolving.seeded <= 7 or not evolving.ready
    assert evolving.seeded == 7
    assert evolving.vectors_ND.shape == (7, DIM)
    for _ in range(200):
        update(evolving, torch.ones(32, DIM))  # a collapse: there is nothing that two prototypes could tell apart
    assert evolving.means_KD.isfinite().all()
    assert 2 <= evolving.seeded <= 2 + 1


def test_prototypes_come_and_weights_halve_every_so_many_steps():
    evolving, sizes = make(start=4, penalty=1e-9, every=3), []
    for _ in range(7):
        update(evolving, torch.randn(4, DIM))
        sizes.append(evolving.seeded)
    assert sizes == [4, 4, 5, 5, 5, 6, 6]
    evolving = make(start=2, every=8)
    update(evolving, torch.eye(DIM)[:2])
    for _ in range(4):
        update(evolving, torch.eye(DIM)[:1])
    assert evolving.counts_K[1] == pytest.approx(0.5 ** (4 / 8))


def test_what_has_just_been_split_off_is_as_old_as_its_batch():
    evolving = make(start=4, penalty=1e-9, every=1)
    for _ in range(2):
        update(evolving, torch.randn(64, DIM))
    assert evolving.seeded > 4
    assert 0 <= evolving.stats()["support/age_steps"] < 1


def test_none_of_the_unused_slots_is_ever_found():
    evolving = make(size=50, start=4)
    update(evolving, F.normalize(torch.rand(4, DIM), dim=1))
    found = evolving.nearest(-torch.rand(30, DIM), 4)  # an unused slot, all zeros, would be nearer than any prototype
    assert found.ids.max() < 4
    torch.testing.assert_close(found.embeddings.norm(dim=2), torch.ones(30, 4))
    assert evolving.nearest(torch.rand(1, DIM), 5).ids.sort().values.tolist() == [[0, 1, 2, 3]]  # only four are in use


def test_more_at_the_start_than_at_most_is_refused():
    with pytest.raises(UsageError, match=r"support.start=9: more than support.size=8"):
        make(size=8, start=9)


def test_it_is_as_large_of_rounded_embeddings():
    """Embeddings in bfloat16 make as many prototypes as the same embeddings in float32."""
    _, batch = clusters(8)
    exact, rounded = make(start=20), make(start=20)
    for step in range(20 * 4):
        rows = batch()
        for each, given_rows in ((exact, rows), (rounded, rows.bfloat16())):
            torch.manual_seed(step)
            update(each, given_rows)
    assert exact.means_KD.dtype == rounded.means_KD.dtype == torch.float32
    assert exact.seeded == rounded.seeded


def test_state_dict_carries_everything_and_the_draws_are_the_steps():
    torch.manual_seed(5)
    evolving, restored = make(start=8, every=3, penalty=0.01), make(start=8, every=3, penalty=0.01)
    for _ in range(10):
        update(evolving, torch.randn(10, DIM))
    assert evolving.seeded != 8
    restored.load_state_dict(evolving.state_dict())
    for each in (evolving, restored):
        for step in range(9):
            torch.manual_seed(step)
            update(each, torch.randn(10, DIM))
    for key, value in evolving.state_dict().items():
        other = restored.state_dict()[key]
        assert torch.equal(value, other) if torch.is_tensor(value) else value == other
