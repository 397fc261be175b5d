"""Exact nearest neighbours: one call, two back ends.

Shapes: B queries, N bank vectors, D dimensions, K neighbours. Everything is float32. The only file that imports faiss.
"""

from __future__ import annotations

import importlib.util
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from src.errors import UsageError

Metric = Literal["cosine", "euclidean"]
# A block of the torch back end's B x N matrix holds at most this many numbers (256 MiB).
BLOCK = 2**26


def require_faiss(asked: str, instead: str) -> None:
    """Check for faiss before any work starts.

    Raises:
        UsageError: it is not installed; the line repeats what was asked for and offers what works without.
    """
    if importlib.util.find_spec("faiss") is None:
        raise UsageError(f"{asked}: faiss is not installed; run `make setup`, or choose {instead}")


def has_faiss_gpu() -> bool:
    """Whether a faiss is installed that searches on GPUs."""
    if importlib.util.find_spec("faiss") is None:
        return False
    import faiss

    return hasattr(faiss, "StandardGpuResources")


class Search(Protocol):
    """Finds neighbours. For ``cosine`` the caller gives unit vectors; the larger the score, the nearer."""

    def __call__(
        self, queries_BD: Tensor, bank_ND: Tensor, k: int = 1, metric: Metric = "cosine"
    ) -> tuple[Tensor, Tensor]:
        """Return scores [B, K] (cosine similarity or minus the squared distance) and ids [B, K], nearest first."""
        ...


class TorchSearch:
    """Matrix products and top-k; on a CPU usually the fastest exact search for a batch of queries."""

    def __call__(
        self, queries_BD: Tensor, bank_ND: Tensor, k: int = 1, metric: Metric = "cosine"
    ) -> tuple[Tensor, Tensor]:
        blocks = [self._block(block, bank_ND, k, metric) for block in queries_BD.split(max(1, BLOCK // len(bank_ND)))]
        return torch.cat([scores for scores, _ in blocks]), torch.cat([ids for _, ids in blocks])

    @staticmethod
    def _block(queries_BD: Tensor, bank_ND: Tensor, k: int, metric: Metric) -> tuple[Tensor, Tensor]:
        if metric == "cosine":
            scores_BN = queries_BD @ bank_ND.T
        else:
            # -|q-b|^2; the queries' own norms come after the selection, where they cost B numbers instead of B x N.
            scores_BN = torch.addmm(bank_ND.square().sum(1), queries_BD, bank_ND.T, beta=-1, alpha=2)
        scores_BK, ids_BK = scores_BN.max(1, keepdim=True) if k == 1 else scores_BN.topk(k, dim=1)
        if metric == "euclidean":
            scores_BK = scores_BK - queries_BD.square().sum(1, keepdim=True)
        return scores_BK, ids_BK


class FaissSearch:
    """``faiss.knn`` on the CPU, ``faiss.knn_gpu`` on the GPU; the bank stays a torch tensor and is not copied.

    Raises:
        UsageError: faiss is not installed, or its build has no GPU support and the vectors are on one.
    """

    def __init__(self, device: torch.device) -> None:
        require_faiss("search=faiss", "search=torch")
        import faiss

        self._resources: Any = None  # one an object: it reserves scratch memory on the GPU
        if device.type == "cuda":
            if not has_faiss_gpu():
                raise UsageError(
                    "search=faiss: this faiss has no GPU support; install faiss-gpu, or choose search=torch"
                )
            with torch.cuda.device(device):
                self._resources = faiss.StandardGpuResources()

    def __call__(
        self, queries_BD: Tensor, bank_ND: Tensor, k: int = 1, metric: Metric = "cosine"
    ) -> tuple[Tensor, Tensor]:
        import faiss

        kind = faiss.METRIC_INNER_PRODUCT if metric == "cosine" else faiss.METRIC_L2
        queries_BD, bank_ND = queries_BD.contiguous(), bank_ND.contiguous()
        if queries_BD.is_cuda:
            import faiss.contrib.torch_utils  # lets faiss take torch tensors where they lie

            with torch.cuda.device(queries_BD.device):
                scores, ids = faiss.knn_gpu(self._resources, queries_BD, bank_ND, k, metric=kind)
        else:
            found = faiss.knn(queries_BD.numpy(), bank_ND.numpy(), k, metric=kind)
            scores, ids = (torch.as_tensor(each) for each in found)
        return (scores if metric == "cosine" else -scores), ids


def cluster(
    window_ND: Tensor, k: int, *, spherical: bool, seed: int, initial_KD: Tensor | None = None, iterations: int = 10
) -> tuple[Tensor, Tensor]:
    """Re-cluster vectors with ``faiss.Kmeans``, from given centroids if there are any.

    Returns:
        centroids [K, D] and how many of the vectors belong to each [K] (int64).
    """
    import faiss

    window = window_ND.float().cpu().numpy()
    kmeans = faiss.Kmeans(
        window.shape[1],
        k,
        niter=iterations,
        spherical=spherical,
        seed=seed,
        gpu=window_ND.is_cuda and faiss.get_num_gpus() > 0,
        # faiss's own limits would drop vectors silently, or warn of few.
        min_points_per_centroid=1,
        max_points_per_centroid=window.shape[0],
    )
    kmeans.train(window, init_centroids=None if initial_KD is None else initial_KD.float().cpu().numpy())
    _, ids = kmeans.assign(window)
    centroids = torch.as_tensor(kmeans.centroids, device=window_ND.device)
    return centroids, torch.bincount(torch.as_tensor(ids, device=window_ND.device).long(), minlength=k)
