"""Nearest-neighbour search: exact search with two back ends, torch and FAISS, and approximate search of a queue.

Shapes: Q queries, N bank vectors, D dimensions, K neighbours. Queries and scores are float32, under autocast too. A
bank may be bfloat16; it is then searched in bfloat16, except by FAISS on a CPU, which searches a float32 copy. This is
the only file that imports faiss.
"""

from __future__ import annotations

import importlib.util
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from src.errors import UsageError
from src.support.ring_buffer import RingBuffer
from src.system.redact import one_line

Metric = Literal["cosine", "euclidean"]
# The torch back end computes the Q x N scores in tiles, which fit a CPU's cache, and on a GPU are at most 256 MiB.
TILE_QUERIES = 2**9
TILE_VECTORS = {"cpu": 2**12, "cuda": 2**17}
TRAINING_VECTORS = 256  # vectors for each list to train on, the most that FAISS uses
VECTORS_AT_ONCE = 2**16  # vectors listed at a time, so that a bfloat16 ring never becomes float32 as a whole


def require_faiss(asked: str, instead: str) -> None:
    """Check for faiss before any work starts.

    Raises:
        UsageError: faiss is not installed; the message names the setting ``asked`` and the alternative ``instead``.
    """
    if importlib.util.find_spec("faiss") is None:
        raise UsageError(f"{asked}: faiss is not installed; run `make setup`, or choose {instead}")


def has_faiss_gpu() -> bool:
    """Whether faiss is installed and can search on GPUs."""
    if importlib.util.find_spec("faiss") is None:
        return False
    import faiss

    return hasattr(faiss, "StandardGpuResources")


class Search(Protocol):
    """Finds nearest neighbours. For ``cosine`` the caller passes unit vectors. A larger score means nearer."""

    def __call__(
        self, queries_QD: Tensor, bank_ND: Tensor, k: int = 1, metric: Metric = "cosine"
    ) -> tuple[Tensor, Tensor]:
        """Return scores [Q, K] (cosine similarity or minus the squared distance) and ids [Q, K], nearest first."""
        ...


class TorchSearch:
    """Matrix products and top-k; on a CPU usually the fastest exact search for a batch of queries."""

    def __call__(
        self, queries_QD: Tensor, bank_ND: Tensor, k: int = 1, metric: Metric = "cosine"
    ) -> tuple[Tensor, Tensor]:
        groups = queries_QD.to(bank_ND.dtype).split(TILE_QUERIES)
        with torch.autocast(bank_ND.device.type, enabled=False):
            found = [self._nearest(group, bank_ND, k, metric) for group in groups]
        return torch.cat([scores for scores, _ in found]).float(), torch.cat([ids for _, ids in found])

    @staticmethod
    def _nearest(queries_QD: Tensor, bank_ND: Tensor, k: int, metric: Metric) -> tuple[Tensor, Tensor]:
        first, *others = bank_ND.split(max(k, TILE_VECTORS[bank_ND.device.type]))
        scores_QK, ids_QK = _top(_scores(queries_QD, first, metric), k)
        seen = len(first)
        for tile in others:
            scores, ids = _top(_scores(queries_QD, tile, metric), min(k, len(tile)))
            scores_QK, columns = _top(torch.cat([scores_QK, scores], 1), k)
            ids_QK = torch.cat([ids_QK, ids + seen], 1).gather(1, columns)
            seen += len(tile)
        if metric == "euclidean":
            scores_QK = scores_QK - queries_QD.square().sum(1, keepdim=True)
        return scores_QK, ids_QK


def _scores(queries_QD: Tensor, tile_ND: Tensor, metric: Metric) -> Tensor:
    if metric == "cosine":
        return queries_QD @ tile_ND.T
    # -|q - b|^2 without |q|^2, which does not change the order and is subtracted after the selection.
    return torch.addmm(tile_ND.square().sum(1), queries_QD, tile_ND.T, beta=-1, alpha=2)


def _top(scores_QN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return scores_QN.max(1, keepdim=True) if k == 1 else scores_QN.topk(k, dim=1)


class FaissSearch:
    """``faiss.knn`` on the CPU, ``faiss.knn_gpu`` on the GPU; only a bfloat16 bank on a CPU is copied.

    Raises:
        UsageError: faiss is not installed, or its build has no GPU support and the device is a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        require_faiss("search=faiss", "search=torch")
        import faiss

        self._resources: Any = None  # made once, because it reserves scratch memory on the GPU
        if device.type == "cuda":
            if not has_faiss_gpu():
                raise UsageError(
                    "search=faiss: this faiss has no GPU support; install faiss-gpu, or choose search=torch"
                )
            with torch.cuda.device(device):
                self._resources = faiss.StandardGpuResources()

    def __call__(
        self, queries_QD: Tensor, bank_ND: Tensor, k: int = 1, metric: Metric = "cosine"
    ) -> tuple[Tensor, Tensor]:
        import faiss

        kind = faiss.METRIC_INNER_PRODUCT if metric == "cosine" else faiss.METRIC_L2
        queries_QD, bank_ND = queries_QD.contiguous(), bank_ND.contiguous()
        if queries_QD.is_cuda:
            import faiss.contrib.torch_utils  # lets faiss take torch tensors in place

            queries_QD = queries_QD.to(bank_ND.dtype)
            with torch.cuda.device(queries_QD.device):
                scores, ids = faiss.knn_gpu(self._resources, queries_QD, bank_ND, k, metric=kind)
        else:
            found = faiss.knn(queries_QD.numpy(), bank_ND.float().numpy(), k, metric=kind)
            scores, ids = (torch.as_tensor(each) for each in found)
        return (scores if metric == "cosine" else -scores), ids


class InvertedLists:
    """Approximate nearest neighbours, by cosine similarity, in a ring buffer of unit vectors.

    Coarse centroids divide the space. Each vector is listed under its nearest centroid, and a query searches the lists
    of its ``nprobe`` nearest centroids. Vectors are added as they arrive, under running numbers; vectors that the ring
    has overwritten since the last training stay listed, but searches skip them. A checkpoint only needs ``trained``,
    which together with the ring's vectors gives the same answers again.

    Source: Jegou et al., "Product Quantization for Nearest Neighbor Search", TPAMI 2011, section IV, as in FAISS.

    Args:
        size: number of slots of the ring.
        dim: D.
        factory: FAISS's factory string of the index, such as ``IVF1024,Flat``.
        nprobe: number of lists searched for each query.

    Raises:
        UsageError: faiss is not installed, the string does not describe an inverted-file index, or the index has more
            lists than the ring has slots.
    """

    def __init__(self, size: int, dim: int, factory: str, nprobe: int) -> None:
        require_faiss("search=ivf", "search=torch")
        import faiss

        self.size = size
        self.dim = dim
        self.factory = factory
        self.nprobe = nprobe
        self.trained: Tensor | None = None  # the trained index without vectors (centroids, quantizers), serialised
        try:
            self.index = self._untrained()
        except RuntimeError as error:
            raise UsageError(f"search.index={factory}: FAISS refuses it ({one_line(error)})") from None
        if not isinstance(self.index, faiss.IndexIVF):
            raise UsageError(
                f"search.index={factory}: is not an inverted-file index; try \"search.index='IVF1024,Flat'\""
            )
        if self.index.nlist > size:
            raise UsageError(f"search.index={factory}: more lists than queue_size={size} has vectors; use fewer")

    @property
    def empty(self) -> bool:
        return self.index.ntotal == 0

    @property
    def stored_bytes(self) -> int:
        """Bytes of the coarse centroids and of ``size`` codes with their numbers; overwritten vectors do not count."""
        return self.size * (self.index.code_size + 8) + self.index.nlist * self.dim * 4

    def train(self, ring: RingBuffer) -> None:
        """Train the centroids on vectors that are evenly spaced over the ring, and list all vectors of the ring.

        Raises:
            UsageError: FAISS cannot train the index on these vectors.
        """
        import faiss

        self.index = self._untrained()
        every = max(1, len(ring.filled_ND) // (TRAINING_VECTORS * self.index.nlist))
        sample = ring.filled_ND[::every].float().cpu().numpy()
        try:
            self.index.train(sample)
        except RuntimeError as error:
            raise UsageError(
                f"search.index={self.factory}: FAISS cannot find its centroids from {len(sample)} vectors "
                f"({one_line(error)}); use a coarser index, or search=auto"
            ) from None
        self.trained = torch.as_tensor(faiss.serialize_index(self.index))
        self.fill(ring)

    def restore(self, trained: Tensor | None) -> None:
        """Restore a saved ``trained``; `fill` then adds the vectors."""
        import faiss

        self.trained = trained
        self.index = self._untrained() if trained is None else faiss.deserialize_index(trained.cpu().numpy())

    def fill(self, ring: RingBuffer) -> None:
        """List all vectors of the ring."""
        self.add(ring, len(ring.filled_ND))

    def add(self, ring: RingBuffer, new: int) -> None:
        """List the ring's ``new`` newest vectors, oldest first."""
        for first in range(ring.total - new, ring.total, VECTORS_AT_ONCE):
            numbers = torch.arange(first, min(first + VECTORS_AT_ONCE, ring.total))
            rows = ring.rows_ND[(numbers % self.size).to(ring.rows_ND.device)]
            self.index.add_with_ids(rows.float().cpu().numpy(), numbers.numpy())

    def nearest(self, queries_QD: Tensor, total: int) -> Tensor:
        """Find the slot of each query's nearest vector [Q]; -1 if its lists hold no vector that is still in the ring.

        Args:
            queries_QD: unit vectors.
            total: number of vectors ever written to the ring.
        """
        import faiss

        parameters: Any = faiss.SearchParametersIVF  # FAISS's type stubs lack its arguments
        wanted = parameters(sel=faiss.IDSelectorRange(total - self.size, total), nprobe=self.nprobe)
        _, numbers = self.index.search(queries_QD.cpu().numpy(), 1, params=wanted)
        ids_Q = torch.as_tensor(numbers[:, 0])
        return torch.where(ids_Q < 0, ids_Q, ids_Q % self.size).to(queries_QD.device)

    def _untrained(self) -> Any:
        import faiss

        index = faiss.index_factory(self.dim, self.factory, faiss.METRIC_INNER_PRODUCT)
        if isinstance(index, faiss.IndexIVF):
            # Otherwise FAISS prints a warning at every training on fewer than 39 vectors for each list.
            index.cp.min_points_per_centroid = 1
        return index


def cluster(
    window_ND: Tensor, k: int, *, spherical: bool, seed: int, initial_KD: Tensor, iterations: int = 10
) -> tuple[Tensor, Tensor]:
    """Re-cluster vectors with ``faiss.Kmeans``, from given centroids.

    Returns:
        The mean of each cluster's members [K, D], shorter than a unit vector if ``spherical``, and the number of each
        vector's cluster [N] (int64). A cluster without members keeps FAISS's centroid.
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
        # FAISS's default limits would silently drop vectors, or warn of too few.
        min_points_per_centroid=1,
        max_points_per_centroid=window.shape[0],
    )
    kmeans.train(window, init_centroids=initial_KD.float().cpu().numpy())
    _, ids = kmeans.assign(window)
    means_KD, ids_N = torch.as_tensor(kmeans.centroids).clone(), torch.as_tensor(ids).long()
    # Summed on the host, where the order of additions is fixed.
    sums_KD = torch.zeros_like(means_KD).index_add_(0, ids_N, torch.as_tensor(window))
    members_K = torch.bincount(ids_N, minlength=k)
    means_KD[members_K > 0] = (sums_KD / members_K[:, None])[members_K > 0]
    return means_KD.to(window_ND.device), ids_N.to(window_ND.device)
