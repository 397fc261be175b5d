import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import MiniBatchKMeans
from sklearn.metrics import normalized_mutual_info_score
from torch.profiler import ProfilerActivity, profile

from src.support.kmeans import KMeans
from src.support.search import TorchSearch

DIM, CLASSES = 5, 3


def make(k, **options):
    return KMeans(k, DIM, CLASSES, TorchSearch(), **{"spherical": False} | options)


def update(kmeans, rows, first_image=0):
    images = torch.arange(first_image, first_image + len(rows))
    kmeans.update(rows, images, images % CLASSES)


def sculley(seeds, batches, normalised=False):
    """Algorithm 1 of Sculley 2010: assign a batch, then one step of rate 1 / count for each member in turn."""
    means, counts = seeds.double().clone(), np.ones(len(seeds))
    for batch in batches:
        rows = batch.double()
        compared = F.normalize(means, dim=1) if normalised else means
        nearest = [(row - compared).square().sum(1).argmin().item() for row in rows]
        for row, c in zip(rows, nearest, strict=True):
            counts[c] += 1
            means[c] += (row - means[c]) / counts[c]
    return means, counts


@settings(max_examples=30)
@given(k=st.integers(1, 6), sizes=st.lists(st.integers(1, 20), min_size=1, max_size=6), seed=st.integers(0, 999))
def test_euclidean_is_sculleys_algorithm(k, sizes, seed):
    torch.manual_seed(seed)
    kmeans, seeds, batches = make(k), torch.randn(k, DIM), [torch.randn(n, DIM) for n in sizes]
    update(kmeans, seeds)
    assert kmeans.ready
    for batch in batches:
        update(kmeans, batch)
    means, counts = sculley(seeds, batches)
    torch.testing.assert_close(kmeans.means_KD.double(), means, atol=1e-4, rtol=1e-4)
    assert kmeans.counts_K.tolist() == counts.tolist()


def test_spherical_is_the_same_on_unit_vectors_with_cosine():
    kmeans = make(4, spherical=True)
    seeds, batches = torch.randn(4, DIM) * 3, [torch.randn(16, DIM) * 9 for _ in range(5)]
    update(kmeans, seeds)
    for batch in batches:
        update(kmeans, batch)
    unit = [F.normalize(batch, dim=1) for batch in batches]
    means, counts = sculley(F.normalize(seeds, dim=1), unit, normalised=True)
    torch.testing.assert_close(kmeans.means_KD.double(), means, atol=1e-4, rtol=1e-4)
    assert kmeans.counts_K.tolist() == counts.tolist()


def test_it_agrees_with_scikit_learn():
    """MiniBatchKMeans (without re-assignment) gives its seeds no weight, so their counts are set to 0 here."""
    seeds, batches = torch.randn(6, DIM), [torch.randn(64, DIM) for _ in range(8)]
    kmeans = make(6)
    update(kmeans, seeds)
    kmeans.counts_K.zero_()
    oracle = MiniBatchKMeans(6, init=seeds.numpy(), n_init=1, reassignment_ratio=0)
    for batch in batches:
        update(kmeans, batch)
        oracle.partial_fit(batch.numpy())
    np.testing.assert_allclose(kmeans.means_KD.numpy(), oracle.cluster_centers_, atol=1e-4)


def test_it_is_seeded_by_the_first_k_embeddings_over_several_batches():
    kmeans, rows = make(10), torch.randn(12, DIM)
    update(kmeans, rows[:4])
    assert not kmeans.ready
    with pytest.raises(ValueError, match="4 of 10"):
        kmeans.lookup(rows)
    update(kmeans, rows[4:], first_image=4)
    assert kmeans.ready
    assert kmeans.counts_K.sum() == 12
    untouched = kmeans.counts_K == 1
    assert torch.equal(kmeans.means_KD[untouched], rows[:10][untouched])
    assert torch.equal(kmeans.images_K, torch.where(untouched, torch.arange(10), -1))


def test_in_the_batch_that_seeds_the_last_centroid_every_member_keeps_its_class():
    kmeans = make(2)
    update(kmeans, torch.tensor([0.0, 10.0, 10.0, 0.0])[:, None].expand(-1, DIM))  # of the classes 0, 1, 2 and 0
    assert kmeans.classes_KC.tolist() == [[2, 0, 0], [0, 1, 1]]


@pytest.mark.parametrize("spherical", [True, False])
def test_lookup_is_the_nearest_centroid_with_unit_norm(spherical):
    kmeans = make(8, spherical=spherical)
    for _ in range(4):
        update(kmeans, torch.randn(20, DIM) * 4)
    queries = torch.randn(30, DIM) * 2
    found = kmeans.lookup(queries)
    if spherical:
        nearest = F.cosine_similarity(queries[:, None], kmeans.means_KD[None], dim=2).argmax(1)
    else:
        nearest = torch.cdist(queries, kmeans.means_KD).argmin(1)
    assert torch.equal(found.ids, nearest)
    torch.testing.assert_close(found.embeddings, F.normalize(kmeans.means_KD[nearest], dim=1))
    torch.testing.assert_close(kmeans.vectors_ND, F.normalize(kmeans.means_KD, dim=1))


def test_decay_halves_a_members_weight_in_its_half_life():
    kmeans = make(1, half_life=4)
    update(kmeans, torch.ones(1, DIM))
    for _ in range(4):
        update(kmeans, torch.zeros(1, DIM))
    weights = 0.5 ** (torch.arange(5.0) / 4)  # newest first; the seed's, the oldest, has halved
    assert kmeans.counts_K.item() == pytest.approx(weights.sum().item(), rel=1e-5)
    assert kmeans.means_KD[0, 0].item() == pytest.approx((weights[4] / weights.sum()).item(), rel=1e-5)


def test_reset_seeds_anew_at_its_interval():
    kmeans = make(3, reset_every=2)
    update(kmeans, torch.randn(30, DIM))
    for epoch in (0, 1):
        kmeans.start_epoch(epoch)
        assert kmeans.ready
    kmeans.start_epoch(2)
    assert not kmeans.ready
    fresh = torch.randn(3, DIM)
    update(kmeans, fresh)
    assert torch.equal(kmeans.means_KD, fresh)
    assert kmeans.counts_K.tolist() == [1, 1, 1]


def test_a_dead_centroid_is_revived_whole():
    """It takes over an embedding with its image and its class, and starts with a count of 1."""
    kmeans = make(2, revive_after=5)
    update(kmeans, torch.stack([torch.zeros(DIM), torch.full((DIM,), 1e3)]))
    near_zero = torch.randn(4, DIM)
    update(kmeans, near_zero)
    update(kmeans, near_zero)
    assert kmeans.means_KD[1, 0] == 1e3  # idle for 8 embeddings, fewer than 5 * k = 10
    update(kmeans, near_zero, first_image=20)
    row = kmeans.images_K[1].item() - 20
    assert torch.equal(kmeans.means_KD[1], near_zero[row])
    assert kmeans.counts_K[1] == 1
    assert kmeans.idle_K[1] == 0
    assert kmeans.classes_KC[1].sum() == 1


def test_a_centroid_is_dead_once_it_was_passed_over_by_as_many_embeddings_as_that():
    """It is revived after being idle for exactly ``revive_after`` times k embeddings."""
    kmeans = make(2, revive_after=5)
    update(kmeans, torch.stack([torch.zeros(DIM), torch.full((DIM,), 1e3)]))
    for rows, far in ((9, 1e3), (1, 0)):  # idle for 9 embeddings, then for 10
        update(kmeans, torch.zeros(rows, DIM))
        assert kmeans.means_KD[1, 0] == far


def test_which_embedding_revives_a_centroid_is_drawn():
    taken = set()
    for seed in range(20):
        kmeans = make(2, revive_after=1)
        update(kmeans, torch.stack([torch.zeros(DIM), torch.full((DIM,), 1e3)]))
        torch.manual_seed(seed)
        update(kmeans, 0.01 * torch.arange(4.0)[:, None].expand(4, DIM))
        taken.add(kmeans.images_K[1].item())
    assert taken == {0, 1, 2, 3}


def test_of_a_centroid_that_is_revived_neither_members_nor_age_are_left():
    kmeans = make(2, revive_after=5)
    update(kmeans, torch.stack([torch.zeros(DIM), torch.full((DIM,), 1e3)]))
    update(kmeans, torch.full((3, DIM), 1e3))
    for _ in range(3):
        update(kmeans, torch.zeros(4, DIM))
    assert kmeans.counts_K.tolist() == [1 + 12, 1]
    assert kmeans.stats()["support/age_steps"] == 0


def test_more_dead_than_rows_revives_as_many_as_there_are():
    kmeans = make(50, revive_after=1)
    update(kmeans, torch.arange(50.0)[:, None] * 1e3 + torch.zeros(50, DIM))
    for _ in range(9):
        update(kmeans, torch.zeros(6, DIM))
    assert (kmeans.means_KD[:, 0] == 0).sum() == 7
    assert kmeans.means_KD.isfinite().all()


def test_refit_reclusters_the_window_and_keeps_the_order():
    centres = torch.eye(DIM)[:3]
    kmeans = make(3, spherical=True, refit_every=5, refit_window=60)
    for _ in range(5):
        update(kmeans, centres.repeat(8, 1) + 0.05 * torch.randn(24, DIM))
    assert kmeans.counts_K.sum() == kmeans.classes_KC.sum() == 60
    assert kmeans.stored_bytes == (3 + 60) * DIM * 4
    assert kmeans.stored_vectors == 3 + 60
    found = kmeans.lookup(centres)
    assert (found.embeddings * centres).sum(1).min() > 0.99


@pytest.mark.parametrize("spherical", [True, False])
def test_after_a_refit_each_mean_is_that_of_its_members_and_as_old_as_the_batch(spherical):
    """A unit vector with the weight of its members would let the next batch move it too little."""
    kmeans = make(3, spherical=spherical, refit_every=5, refit_window=60)
    centres = torch.eye(DIM)[:3].repeat(8, 1)
    for _ in range(5):
        update(kmeans, centres + torch.randn(24, DIM))
    window = kmeans.window.rows_ND
    ids = kmeans.lookup(window).ids
    counts = torch.bincount(ids, minlength=3)
    means = torch.stack([window[ids == each].mean(0) for each in range(3)])
    assert (counts - kmeans.counts_K).abs().max() <= 2  # a member may be nearer to the mean of another cluster
    torch.testing.assert_close(kmeans.means_KD.norm(dim=1), means.norm(dim=1), rtol=0.1, atol=0)
    assert kmeans.stats()["support/age_steps"] == 0


def test_a_refit_counts_the_classes_of_its_clusters():
    kmeans = make(3, spherical=True, refit_every=5, refit_window=60)
    centres, labels = torch.eye(DIM)[:3].repeat(8, 1), torch.arange(3).repeat(8)
    for _ in range(5):
        kmeans.update(centres + 0.05 * torch.randn(24, DIM), torch.arange(24), labels)
    assert kmeans.labels_of(kmeans.lookup(centres).ids).tolist() == labels.tolist()
    kmeans.classes_KC[1] = 0
    assert kmeans.labels_of(torch.arange(3)).tolist()[1] == -1  # a cluster without members has no class


def test_a_reset_empties_the_window_too_and_nothing_is_refitted_before_it_is_full_again():
    kmeans = make(3, reset_every=1, refit_every=1, refit_window=60)
    for _ in range(6):
        update(kmeans, 9 + torch.randn(12, DIM))
    kmeans.start_epoch(1)
    update(kmeans, torch.randn(12, DIM))
    assert kmeans.ready
    assert kmeans.means_KD.abs().max() < 7  # embeddings from before the reset lie near 9


def test_a_refit_leaves_none_idle_and_none_that_is_of_one_image():
    """After a re-clustering no prototype counts as idle, or as one whose members are all of one image."""
    kmeans = make(3, refit_every=5, refit_window=20)
    update(kmeans, torch.cat([9 * torch.eye(DIM)[:2], torch.full((1, DIM), 1e3)]))
    for _ in range(4):
        assert kmeans.images_of(torch.tensor([2])) == 2
        update(kmeans, 9 * torch.eye(DIM)[:2].repeat(4, 1))
    assert kmeans.idle_K.tolist() == [0, 0, 0]
    assert kmeans.images_K.tolist() == [-1, -1, -1]


def test_of_a_batch_longer_than_the_window_the_last_embeddings_keep_their_classes():
    kmeans = make(3, spherical=True, refit_every=1, refit_window=30)
    labels = torch.cat([torch.arange(3), torch.zeros(27, dtype=torch.int64), torch.arange(3).repeat(10)])
    kmeans.update(torch.eye(DIM)[labels] + 0.01 * torch.randn(60, DIM), torch.arange(60), labels)
    assert kmeans.classes_KC.sort(1).values.tolist() == [[0, 0, 10]] * 3


def test_after_a_reset_nothing_is_known_of_the_prototypes_before():
    kmeans = make(2, reset_every=1)
    update(kmeans, torch.stack([torch.zeros(DIM), torch.full((DIM,), 1e3)]))
    update(kmeans, torch.zeros(6, DIM))
    kmeans.clear_stats()
    kmeans.start_epoch(1)
    assert "support/drift" not in kmeans.stats()
    kmeans.clear_stats()
    update(kmeans, torch.eye(DIM)[:2])
    assert kmeans.idle_K.tolist() == [0, 0]
    assert kmeans.stats()["support/age_steps"] == 0
    assert "support/drift" not in kmeans.stats()


def test_classes_fade_as_the_members_do():
    kmeans = make(1, half_life=1)
    for label in (0, 0, 0, 1, 1):
        kmeans.update(torch.ones(1, DIM), torch.tensor([0]), torch.tensor([label]))
    assert kmeans.classes_KC[0].tolist() == [(4 + 2 + 1) / 16, 1 + 1 / 2, 0]
    assert kmeans.labels_of(torch.tensor([0])) == 1


def test_diagnostics_by_hand():
    kmeans = make(2)
    kmeans.update(torch.tensor([[0.0] * DIM, [10.0] * DIM]), torch.tensor([7, 8]), torch.tensor([0, 1]))
    assert kmeans.images_of(torch.tensor([0, 1])).tolist() == [7, 8]
    kmeans.update(torch.full((3, DIM), 9.0), torch.tensor([1, 2, 3]), torch.tensor([2, 2, 2]))
    assert kmeans.labels_of(torch.tensor([0, 1])).tolist() == [0, 2]
    assert kmeans.images_of(torch.tensor([0, 1])).tolist() == [7, -1]
    kmeans.record(torch.tensor([1, 1, 1, 0]), torch.tensor([1, 2, 3, 7]), torch.tensor([2, 2, 0, 0]))
    stats = kmeans.stats()
    assert stats["support/label_agreement"] == 3 / 4
    assert stats["support/self_hit"] == 1 / 4
    assert stats["support/dead"] == 0
    assert stats["support/age_steps"] == 0.5


def test_a_prototype_is_of_one_image_as_long_as_all_that_came_to_it_are():
    kmeans = make(2)
    for _ in range(3):
        kmeans.update(torch.eye(DIM)[[0, 1]], torch.tensor([7, 8]), torch.tensor([0, 1]))
    assert kmeans.images_of(torch.tensor([0, 1])).tolist() == [7, 8]
    kmeans.update(torch.eye(DIM)[[0, 1, 1]], torch.tensor([7, 8, 9]), torch.tensor([0, 1, 1]))
    kmeans.update(torch.eye(DIM)[[0, 1]], torch.tensor([7, 8]), torch.tensor([0, 1]))
    assert kmeans.images_of(torch.tensor([0, 1])).tolist() == [7, -1]


def test_a_step_makes_no_copy_of_the_classes_of_all_prototypes():
    def peak(classes):
        kmeans = KMeans(2000, DIM, classes, TorchSearch(), revive_after=1)
        for _ in range(9):
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
                update(kmeans, torch.randn(256, DIM))
                if kmeans.ready:
                    nobody = torch.zeros(8, dtype=torch.int64)
                    kmeans.record(kmeans.lookup(torch.randn(8, DIM)).ids, nobody, nobody)
                    kmeans.labels_of(nobody)
        return max(event.cpu_memory_usage for event in profiled.events())

    assert peak(classes=CLASSES) == peak(classes=1000) < 2000 * 1000 * 4


def test_prototypes_as_clusters_of_the_anchors_they_served():
    """Purity and NMI are those of the recorded anchors; drift is the mean cosine distance moved since `clear_stats`."""
    kmeans = make(2)
    update(kmeans, torch.eye(DIM)[:2])
    assert not kmeans.stats().keys() & {"support/purity", "support/nmi", "support/drift"}
    kmeans.clear_stats()
    kmeans.record(torch.tensor([0, 0, 0, 1]), torch.arange(4), torch.tensor([0, 0, 1, 1]))
    stats = kmeans.stats()
    assert stats["support/purity"] == 3 / 4
    assert stats["support/nmi"] == pytest.approx(normalized_mutual_info_score([0, 0, 0, 1], [0, 0, 1, 1]))
    assert stats["support/drift"] == pytest.approx(0, abs=1e-6)
    kmeans.means_KD[1] *= -3  # one of the two turned right round: cosine distance 2
    assert kmeans.stats()["support/drift"] == pytest.approx(1.0, abs=1e-6)
    kmeans.clear_stats()
    assert "support/purity" not in kmeans.stats()


@pytest.mark.parametrize("options", [{"reset_every": 2}, {"half_life": 10}, {"refit_every": 3, "refit_window": 32}])
def test_state_dict_carries_everything(options):
    kmeans, restored = make(8, revive_after=2, **options), make(8, revive_after=2, **options)
    for _ in range(4):
        update(kmeans, torch.randn(10, DIM))
    restored.load_state_dict(kmeans.state_dict())
    for each in (kmeans, restored):
        torch.manual_seed(3)
        for _ in range(3):
            update(each, torch.randn(10, DIM))
    for key, value in kmeans.state_dict().items():
        other = restored.state_dict()[key]
        assert torch.equal(value, other) if torch.is_tensor(value) else value == other
