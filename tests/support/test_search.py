import importlib.util

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from src.errors import UsageError
from src.support import search
from src.support.search import FaissSearch, TorchSearch, cluster

CPU = torch.device("cpu")


def brute_force(queries, bank, k, metric):
    if metric == "cosine":
        scores = torch.stack([torch.stack([(q.double() * b.double()).sum() for b in bank]) for q in queries])
    else:
        scores = torch.stack([torch.stack([-(q.double() - b.double()).square().sum() for b in bank]) for q in queries])
    return scores.sort(dim=1, descending=True).values[:, :k], scores.argsort(dim=1, descending=True)[:, :k]


@pytest.mark.parametrize("make", [TorchSearch, lambda: FaissSearch(CPU)], ids=["torch", "faiss"])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@settings(max_examples=20)
@given(batch=st.integers(1, 7), size=st.integers(1, 20), k=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_both_back_ends_agree_with_loops(make, metric, batch, size, k, seed):
    k = min(k, size)
    torch.manual_seed(seed)
    queries, bank = torch.randn(batch, 6), torch.randn(size, 6)
    if metric == "cosine":
        queries, bank = F.normalize(queries, dim=1), F.normalize(bank, dim=1)
    scores, ids = make()(queries, bank, k, metric)
    expected_scores, expected_ids = brute_force(queries, bank, k, metric)
    assert ids.dtype == torch.int64
    torch.testing.assert_close(scores.double(), expected_scores, atol=1e-4, rtol=1e-4)
    assert torch.equal(ids, expected_ids)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_autocast_does_not_round_the_scores(metric):
    queries, bank = F.normalize(torch.randn(2, 400, 16), dim=2)
    expected = TorchSearch()(queries, bank, 3, metric)
    with torch.autocast("cpu", torch.bfloat16):
        scores, ids = TorchSearch()(queries, bank, 3, metric)
    assert torch.equal(scores, expected[0])
    assert torch.equal(ids, expected[1])


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("k", [1, 3, 11])
def test_tiles_do_not_change_the_answer(monkeypatch, metric, k):
    queries, bank = torch.randn(50, 4), torch.randn(30, 4)
    whole = TorchSearch()(queries, bank, k, metric)
    monkeypatch.setattr(search, "TILE_QUERIES", 7)
    monkeypatch.setattr(search, "TILE_VECTORS", {"cpu": 8})
    tiled = TorchSearch()(queries, bank, k, metric)
    assert torch.equal(whole[1], tiled[1])
    torch.testing.assert_close(whole[0], tiled[0])


def test_faiss_missing_is_one_line_with_the_remedy(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"search=faiss: faiss is not installed.*search=torch"):
        FaissSearch(CPU)


def test_cluster_ends_with_the_means_of_its_members_and_repeats_itself():
    window = torch.tensor([[9.0, 0, 0], [0, 9, 0], [0, 0, 9]]).repeat_interleave(40, 0) + 0.1 * torch.randn(120, 3)
    found, members = cluster(window, 3, spherical=False, seed=1, initial_KD=window[[0, 1, 119]])
    assert members.tolist() == torch.cdist(window, found).argmin(1).tolist()
    means = torch.stack([window[members == each].mean(0) for each in range(3)])
    torch.testing.assert_close(found, means)
    again, _ = cluster(window, 3, spherical=False, seed=1, initial_KD=window[[0, 1, 119]])
    assert torch.equal(found, again)


@pytest.mark.parametrize("spherical", [True, False])
def test_cluster_is_lloyds_algorithm_on_all_vectors(spherical):
    """There are more than 256 vectors a centroid, which is the most that FAISS uses by default."""
    window = torch.randn(900, 4) + torch.tensor([1.0, 0, 0, 0])
    window = F.normalize(window, dim=1) if spherical else window
    found, members = cluster(window, 3, spherical=spherical, seed=0, initial_KD=window[:3])
    centres = window[:3]
    for _ in range(10):
        ids = torch.cdist(window, centres).argmin(1)
        means = torch.stack([window[ids == each].mean(0) for each in range(3)])
        centres = F.normalize(means, dim=1) if spherical else means
    ids = torch.cdist(window, centres).argmin(1)
    assert torch.equal(members, ids)
    torch.testing.assert_close(found, torch.stack([window[ids == each].mean(0) for each in range(3)]))


def test_cluster_starts_from_the_given_centroids():
    centres = F.normalize(torch.eye(4) + 0.01, dim=1)
    window = F.normalize(centres.repeat(30, 1) + 0.05 * torch.randn(120, 4), dim=1)
    found, members = cluster(window, 4, spherical=True, seed=0, initial_KD=centres)
    assert (found * centres).sum(1).min() > 0.99  # same order as given: prototypes keep their ids
    # They are the means of unit vectors, which are shorter than 1.
    torch.testing.assert_close(found, torch.stack([window[members == each].mean(0) for each in range(4)]))


@pytest.mark.gpu
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_gpu_agrees_with_cpu(metric):
    queries, bank = torch.randn(64, 32), torch.randn(1000, 32)
    if metric == "cosine":
        queries, bank = F.normalize(queries, dim=1), F.normalize(bank, dim=1)
    _, expected = TorchSearch()(queries, bank, 5, metric)
    _, found = TorchSearch()(queries.cuda(), bank.cuda(), 5, metric)
    assert (found.cpu() == expected).float().mean() > 0.99
    if importlib.util.find_spec("faiss"):
        _, found = FaissSearch(torch.device("cuda"))(queries.cuda(), bank.cuda(), 5, metric)
        assert (found.cpu() == expected).float().mean() > 0.99
