"""Builds the objects that a config describes: encoder, support set, method, views and search back end."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import nn

from src import models
from src.config import schema
from src.config.outside import make, settings
from src.config.schema import Config
from src.data import Dataset
from src.data.augment import ViewMaker
from src.errors import UsageError
from src.methods.base import Method, Parts
from src.methods.contrast import Contrast
from src.methods.teacher import MNN, ReSSL
from src.support.base import Space, SupportSet
from src.support.kmeans import KMeans
from src.support.queue import Queue
from src.support.search import FaissSearch, InvertedLists, Search, TorchSearch, has_faiss_gpu, require_faiss
from src.support.sharded import Shard

# This mode uses CUDA graphs on a GPU (a CPU has none): the kernels of a ResNet-18 for a batch of 256 take a third of
# the time in which the host launches them one by one. A graph's outputs stay valid until the next step is marked.
COMPILE_MODE = "reduce-overhead"


def device(name: str) -> torch.device:
    """Return the device of a name; ``auto`` means the GPU if there is one, else the CPU.

    Raises:
        UsageError: the name is malformed, or that GPU does not exist.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"device={name}: write cuda:0, cuda:1, ...") from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device={name}: torch sees {torch.cuda.device_count()} GPUs here; choose device=cpu or auto")
    if chosen.index is not None and chosen.type == "cuda":
        torch.cuda.set_device(chosen)  # for code that uses the current device: events, FAISS, compiled kernels
    return chosen


def precision(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of a name; ``auto`` means bfloat16 if the hardware multiplies in it, else float32."""
    if name != "auto":
        return torch.bfloat16 if name == "bfloat16" else torch.float32
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def search(cfg: schema.Search, device: torch.device) -> Search:
    """Build the back end of exact search.

    ``auto``, and ``ivf`` for the searches that stay exact, means FAISS on a GPU that it can use, else torch.

    Raises:
        UsageError: faiss is requested but not installed.
    """
    wants_faiss = cfg.name == "faiss" or (cfg.name != "torch" and device.type == "cuda" and has_faiss_gpu())
    return FaissSearch(device) if wants_faiss else TorchSearch()


def views(cfg: Config, data: Dataset, part: tuple[int, int] = (0, 1)) -> tuple[ViewMaker, ViewMaker]:
    """Build the makers of view 1 and view 2, for whole batches or for one of their equal parts (`ViewMaker`)."""
    mode = COMPILE_MODE if cfg.compile else None
    rest = cfg.augment.interpolation, cfg.data.image_size, data.mean, data.std
    view1 = ViewMaker(cfg.augment.view1, *rest, part=part, compile_mode=mode)
    view2 = ViewMaker(cfg.augment.view2, *rest, part=part, compile_mode=mode)
    return view1, view2


def encoder(cfg: schema.Backbone, image_size: int) -> tuple[nn.Module, int]:
    """Build the backbone; returns it with its number of features."""
    if cfg._target_ is not None:
        model = make(cfg._target_, "backbone", nn.Module, **cfg.options)
    elif cfg.is_timm:
        model = models.timm_model(cfg.name, cfg.options)
    elif cfg.name == schema.RESNET_TINY:
        model = models.ResNetTiny(cfg.stem)  # type: ignore[arg-type]
    else:
        model = models.resnet(cfg.name, cfg.stem)  # type: ignore[arg-type]
    return model, models.feature_dim(model, image_size)


def method(
    cfg: Config,
    classes: int,
    search: Search,
    device: torch.device,
    parallelize: Callable[[nn.Module], nn.Module] = lambda encoder: encoder,
    shard: Shard | None = None,
) -> tuple[Method, int]:
    """Build the method with its networks and support set; returns it with the number of its encoder's features.

    Args:
        cfg: the run's config.
        classes: number of classes of the data set, for the support set's diagnostics.
        search: the search back end, shared with the evaluation, because on a GPU each one reserves memory.
        device: where the method is put.
        parallelize: makes an encoder work with those of other processes (`src.training.distributed.Ranks.parallelize`).
        shard: the slots that this process holds if ``support.shards=ranks``.
    """
    # The encoder draws its weights before anything else, so that a seed gives the same encoder to every method.
    backbone, features = encoder(cfg.backbone, cfg.data.image_size)
    if cfg.backbone.bn_splits > 1:
        models.split_batch_norms(backbone, cfg.backbone.bn_splits)
    backbone = parallelize(backbone)
    dim = cfg.projector.out
    projector = models.projector(features, cfg.projector.hidden, dim, final_norm=cfg.projector.final_norm)
    parts = Parts(backbone, projector, features, dim, support(cfg, Space(dim, classes, search), shard))
    model: Method
    if cfg.method._target_ is not None:
        model = make(cfg.method._target_, "method", Method, parts, **settings(cfg.method))  # type: ignore[type-abstract]
    elif isinstance(cfg.objective, schema.MomentumTeacher):
        model = (MNN if isinstance(cfg.objective, schema.MNN) else ReSSL)(parts, cfg.objective)
    else:
        model = Contrast(parts, cfg.objective)
    model.to(device).to(memory_format=torch.channels_last)
    if model.support is not None:
        model.support.stopwatch.device = device
    if cfg.compile:
        # torch.compile advises matrix products in TF32, which would round embeddings in lookups and losses.
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")
        for network in model.networks:
            network.compile(mode=COMPILE_MODE)
        torch.backends.cudnn.benchmark = True  # the graphs keep the fastest kernels; processes may differ by rounding
    return model, features


def support(cfg: Config, space: Space, shard: Shard | None = None) -> SupportSet | None:
    """Build the support set; None if nothing is stored.

    Raises:
        UsageError: the support set needs faiss, which is not installed or does not know the index.
    """
    match cfg.support:
        case theirs if theirs._target_ is not None:
            return make(theirs._target_, "support", SupportSet, space, **settings(theirs))  # type: ignore[type-abstract]
        case schema.Queue():
            assert cfg.queue_size is not None
            return queue(cfg.support, cfg.search, cfg.queue_size, space, shard)
        case schema.KMeans():
            assert cfg.k is not None
            return kmeans(cfg.support, cfg.k, space, shard)
    return None


def queue(settings: schema.Queue, cfg: schema.Search, size: int, space: Space, shard: Shard | None = None) -> Queue:
    """Build a queue that is searched exactly or by inverted lists."""
    lists = None
    if cfg.name == "ivf":
        assert cfg.index is not None
        assert cfg.nprobe is not None
        lists = InvertedLists(size, space.dim, cfg.index, cfg.nprobe)
    dtype = torch.bfloat16 if settings.precision == "bfloat16" else torch.float32
    return Queue(
        size,
        space.dim,
        space.search,
        dtype=dtype,
        lists=lists,
        refresh_every=cfg.refresh_every or 0,
        shard=shard if settings.shards == "ranks" else None,
    )


def kmeans(settings: schema.KMeans, k: int, space: Space, shard: Shard | None = None) -> KMeans:
    """Build prototypes from online k-means."""
    if settings.refit == "faiss":
        require_faiss("support.refit=faiss", "support.refit=online")
    return KMeans(
        k,
        space.dim,
        space.classes,
        space.search,
        spherical=settings.metric == "spherical",
        reset_every=settings.forget_every if settings.forget == "reset" else 0,
        half_life=settings.half_life if settings.forget == "decay" else 0,
        revive_after=settings.revive_after,
        refit_every=settings.refit_every if settings.refit == "faiss" else 0,
        refit_window=settings.refit_window,
        shard=shard if settings.shards == "ranks" else None,
    )
