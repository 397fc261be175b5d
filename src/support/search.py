"""Nearest neighbours: exact ones in one call with two back ends, and approximate ones of a queue.

Shapes: Q queries, N bank vectors, D dimensions, K neighbours. Queries and scores are float32, under autocast too; a
bank may be bfloat16, and is then searched in bfloat16. The only file that imports faiss.
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
# The torch back end makes Q x N scores in tiles, which on a CPU stay in its cache and on a GPU are 256 MiB at most.
TILE_QUERIES = 2**9
TILE_VECTORS = {"cpu": 2**12, "cuda": 2**17}
TRAINING_VECTORS = 256  # vectors a list to train on, the most that FAISS uses
VECTORS_AT_ONCE = 2**16  # vectors listed at a time, so that a bfloat16 ring is never whole in float32


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
    # -|q-b|^2 without the queries' own norms, which change no order and come after the selection.
    return torch.addmm(tile_ND.square().sum(1), queries_QD, tile_ND.T, beta=-1, alpha=2)


def _top(scores_QN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return scores_QN.max(1, keepdim=True) if k == 1 else scores_QN.topk(k, dim=1)


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
        self, queries_QD: Tensor, bank_ND: Tensor, k: int = 1, metric: Metric = "cosine"
    ) -> tuple[Tensor, Tensor]:
        import faiss

        kind = faiss.METRIC_INNER_PRODUCT if metric == "cosine" else faiss.METRIC_L2
        queries_QD, bank_ND = queries_QD.contiguous(), bank_ND.contiguous()
        if queries_QD.is_cuda:
            import faiss.contrib.torch_utils  # lets faiss take torch tensors where they lie

            queries_QD = queries_QD.to(bank_ND.dtype)
            with torch.cuda.device(queries_QD.device):
                scores, ids = faiss.knn_gpu(self._resources, queries_QD, bank_ND, k, metric=kind)
        else:
            found = faiss.knn(queries_QD.numpy(), bank_ND.float().numpy(), k, metric=kind)
            scores, ids = (torch.as_tensor(each) for each in found)
        return (scores if metric == "cosine" else -scores), ids


class InvertedLists:
    """Approximate nearest neighbours in a ring of unit vectors, by cosine.

    Coarse centroids divide the space; each vector is listed under its nearest one, and a query searches the lists of
    its ``nprobe`` nearest centroids. Vectors enter as they come, under running numbers; those that the ring has
    overwritten since the last training stay listed and are passed over. ``trained`` is all that has to be saved: with
    the ring's vectors it gives the same answers again.

    Source: Jegou et al., "Product Quantization for Nearest Neighbor Search", TPAMI 2011, section IV, as in FAISS.

    Args:
        size: of the ring.
        dim: D.
        factory: FAISS's string for the index, ``IVF1024,Flat`` say.
        nprobe: lists searched for each query.

    Raises:
        UsageError: faiss is not installed, the string is not one of an inverted-file index, or the ring holds fewer
            vectors than the index has lists.
    """

    def __init__(self, size: int, dim: int, factory: str, nprobe: int) -> None:
        require_faiss("search=ivf", "search=torch")
        import faiss

        self.size = size
        self.dim = dim
        self.factory = factory
        self.nprobe = nprobe
        self.trained: Tensor | None = None  # centroids and quantizers, without vectors, as FAISS's bytes
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
        """Of a ringful of listed vectors, their numbers, and the coarse centroids; overwritten ones are not counted."""
        return self.size * (self.index.code_size + 8) + self.index.nlist * self.dim * 4

    def train(self, ring: RingBuffer) -> None:
        """Find the centroids anew, from vectors evenly spaced over the ring, and list all that it holds."""
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
        """Take over another's ``trained``; the vectors come with `fill`."""
        import faiss

        self.trained = trained
        self.index = self._untrained() if trained is None else faiss.deserialize_index(trained.cpu().numpy())

    def fill(self, ring: RingBuffer) -> None:
        """List all that the ring holds."""
        self.add(ring, len(ring.filled_ND))

    def add(self, ring: RingBuffer, new: int) -> None:
        """List the ring's ``new`` newest vectors, oldest first."""
        for first in range(ring.total - new, ring.total, VECTORS_AT_ONCE):
            numbers = torch.arange(first, min(first + VECTORS_AT_ONCE, ring.total))
            rows = ring.rows_ND[(numbers % self.size).to(ring.rows_ND.device)]
            self.index.add_with_ids(rows.float().cpu().numpy(), numbers.numpy())

    def nearest(self, queries_QD: Tensor, total: int) -> Tensor:
        """The slot of each query's nearest listed vector [Q]; -1 where its lists hold none that is still in the ring.

        Args:
            queries_QD: unit vectors.
            total: vectors ever written to the ring.
        """
        import faiss

        parameters: Any = faiss.SearchParametersIVF  # FAISS's own types do not know what it takes
        wanted = parameters(sel=faiss.IDSelectorRange(total - self.size, total), nprobe=self.nprobe)
        _, numbers = self.index.search(queries_QD.cpu().numpy(), 1, params=wanted)
        ids_Q = torch.as_tensor(numbers[:, 0])
        return torch.where(ids_Q < 0, ids_Q, ids_Q % self.size).to(queries_QD.device)

    def _untrained(self) -> Any:
        import faiss

        index = faiss.index_factory(self.dim, self.factory, faiss.METRIC_INNER_PRODUCT)
        if isinstance(index, faiss.IndexIVF):
            # Else FAISS prints a warning at every training on fewer than 39 a list.
            index.cp.min_points_per_centroid = 1
        return index


def cluster(
    window_ND: Tensor, k: int, *, spherical: bool, seed: int, initial_KD: Tensor, iterations: int = 10
) -> tuple[Tensor, Tensor]:
    """Re-cluster vectors with ``faiss.Kmeans``, from given centroids.

    Returns:
        the means of the clusters' members [K, D], which are shorter than unit vectors where ``spherical``, and which
        cluster each vector belongs to [N] (int64). A cluster without members keeps FAISS's centroid.
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
    kmeans.train(window, init_centroids=initial_KD.float().cpu().numpy())
    _, ids = kmeans.assign(window)
    means_KD, ids_N = torch.as_tensor(kmeans.centroids).clone(), torch.as_tensor(ids).long()
    # On the host, where a sum has a fixed order.
    sums_KD = torch.zeros_like(means_KD).index_add_(0, ids_N, torch.as_tensor(window))
    members_K = torch.bincount(ids_N, minlength=k)
    means_KD[members_K > 0] = (sums_KD / members_K[:, None])[members_K > 0]
    return means_KD.to(window_ND.device), ids_N.to(window_ND.device)
