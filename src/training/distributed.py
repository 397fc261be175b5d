"""Training of one run on several devices, by one process (a rank) for each of them, started by ``torchrun``.

The encoder works on the rank's own rows of the batch, and its features are gathered. From there on every rank does the
same arithmetic on the whole batch: heads, lookup, loss, support set and online classifier are the same everywhere, and
methods and support sets need not know that there are ranks. Since every rank computes the complete loss, the gradient
of its own rows is exact, and the sum over the ranks is the encoder's gradient.

In a single process that no launcher has started, nothing is exchanged.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function

from src import build
from src.config.schema import Config, KMeans, ReSSL, Stored
from src.data.splits import Split
from src.errors import RankLost, RunFailed, UsageError
from src.evaluation.probes import FrozenEncoder
from src.support.sharded import Shard, in_shards
from src.system.collectives import LOST, all_gather, all_reduce_sum_, raising_rank_lost
from src.system.environment import is_rank
from src.system.redact import one_line
from src.training.batch_norm import replace_batch_norms

T = TypeVar("T")
_left = threading.Event()  # set when this rank no longer needs the others

# Collectives hardly ever time out, because one rank may decode images for an hour: `_Pulse` notices a rank that died.
COLLECTIVE_TIMEOUT = timedelta(days=7)
BEAT_SECONDS, SILENT_BEATS = 2.0, 10


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, seen from one of them."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    group: dist.ProcessGroup | None = None  # for tensors on the CPU and objects; None: there is one process
    _pending: list[tuple[Any, Tensor]] = field(default_factory=list)

    @property
    def first(self) -> bool:
        """Whether this is the rank that prints, logs, holds the run's directory and saves."""
        return self.rank == 0

    @property
    def part(self) -> tuple[int, int]:
        """This rank's part of a batch: its index and the number of equal parts."""
        return self.rank, self.world_size

    @property
    def shard(self) -> Shard:
        """This rank's slots of a support set in shards."""
        return Shard(self.rank, self.world_size)

    def rows(self, batch_size: int) -> slice:
        """This rank's rows of a batch."""
        rows = batch_size // self.world_size
        return slice(rows * self.rank, rows * (self.rank + 1))

    def refuse_unsupported(self, cfg: Config) -> None:
        """Refuse settings that several ranks do not support.

        Raises:
            UsageError: the batch does not divide equally, batch norm is split, the networks are to be compiled or
                fine-tuned, or a setting needs all vectors of a support set that is in shards.
        """
        if self.world_size == 1:
            return
        if cfg.batch_size % self.world_size:
            raise UsageError(f"batch_size={cfg.batch_size}: has no {self.world_size} equal shares; choose a multiple")
        if cfg.backbone.bn_splits > 1:
            raise UsageError(
                f"backbone.bn_splits={cfg.backbone.bn_splits}: works in one process only; choose backbone.bn_splits=1"
            )
        if cfg.compile:
            raise UsageError("compile=true: works in one process only; choose compile=false")
        if cfg.evaluation.finetune is not None:
            raise UsageError(
                "evaluation=finetune: works in one process only; choose evaluation=linear, and type when the run is "
                "finished: python -m src.evaluate run=NAME evaluation=finetune"
            )
        if isinstance(cfg.support, Stored) and cfg.support.shards == "ranks":
            self._refuse_unsupported_shards(cfg)

    def _refuse_unsupported_shards(self, cfg: Config) -> None:
        name, size = ("k", cfg.k) if cfg.k is not None else ("queue_size", cfg.queue_size or 0)
        if size % self.world_size:
            raise UsageError(f"{name}={size}: has no {self.world_size} equal shards; choose a multiple")
        needs_all = {
            "search=ivf": cfg.search.name == "ivf",
            "support.refit=faiss": isinstance(cfg.support, KMeans) and cfg.support.refit == "faiss",
            "objective=relation": isinstance(cfg.objective, ReSSL),
        }
        if asked := [setting for setting, is_set in needs_all.items() if is_set]:
            raise UsageError(f"{asked[0]}: needs all stored vectors on every rank; choose support.shards=none")

    def parallelize(self, encoder: nn.Module) -> nn.Module:
        """Make an encoder take this rank's rows and, in training mode, return the features of the whole batch.

        Its batch norms use the statistics of the whole batch. The keys of its state dict stay the same.

        Raises:
            UsageError: the encoder has a batch norm that cannot span several CPU processes.
        """
        if self.group is None:
            return encoder
        if self.device.type == "cuda":
            from timm.layers import convert_sync_batchnorm  # torch's own would drop the activation in BatchNormAct2d

            encoder = convert_sync_batchnorm(encoder)
        else:
            replace_batch_norms(encoder)
        encoder.register_forward_hook(_gather_features)  # copies of the encoder, such as a teacher, keep the hook
        return encoder

    def sum_gradients(self, encoder: nn.Module) -> None:
        """Sum the encoder's gradients, each of one rank's rows, so that every rank has that of the whole batch."""
        if self.group is None:
            return
        gradients = [p.grad for p in encoder.parameters() if p.grad is not None]
        total = all_reduce_sum_(torch.cat([each.flatten() for each in gradients]))
        for each, summed in zip(gradients, total.split([each.numel() for each in gradients]), strict=True):
            each.copy_(summed.view_as(each))

    def max_status(self, status: int, *, wait: bool = False) -> int:
        """The highest status of all ranks, the same on each of them, so that they stop at the same step.

        Args:
            status: the status of this rank.
            wait: whether to wait for the result of this call. Otherwise that of the previous call is returned, so that
                no step waits for the other ranks.
        """
        if self.group is None:
            return status
        with raising_rank_lost():
            highest = torch.tensor(status)
            self._pending.append((dist.all_reduce(highest, dist.ReduceOp.MAX, self.group, async_op=True), highest))
            known = 0
            while len(self._pending) > (0 if wait else 1):
                work, highest = self._pending.pop(0)
                work.wait()
                known = max(known, int(highest))
        return known

    def broadcast(self, value: T) -> T:
        """The value of the first rank, on every rank."""
        if self.group is None:
            return value
        values = [value]
        with raising_rank_lost():
            dist.broadcast_object_list(values, group=self.group, group_src=0)
        return values[0]

    def full_state_dict(self, module: nn.Module) -> dict[str, Any]:
        """A module's state dict, which on the first rank has the shards of all ranks. Every rank must call it."""
        state = module.state_dict()
        for key in in_shards(module):
            state[key] = self._gather_shards(state[key].cpu())
        return state

    def _gather_shards(self, own: Tensor) -> Tensor:
        """Gather the rows of all slots on the first rank, shard by shard in host memory: a device may be too small."""
        with raising_rank_lost():
            if not self.first:
                dist.send(own, 0, self.group)
                return own
            whole = own.new_empty(self.world_size * len(own), *own.shape[1:])
            part = own
            for rank in range(self.world_size):
                if rank:
                    part = torch.empty_like(own)
                    dist.recv(part, rank, self.group)
                whole[rank :: self.world_size] = part
            return whole

    @contextmanager
    def one_at_a_time(self) -> Iterator[None]:
        """Run the block on one rank after another, because all ranks at once would need too much of a host's memory."""
        for turn in range(self.world_size):
            if turn == self.rank:
                yield
            if self.group is not None:
                with raising_rank_lost():
                    dist.barrier(self.group)

    def check_same(self, *modules: nn.Module, **values: object) -> None:
        """Refuse to go on if the ranks would not do the same arithmetic.

        Args:
            modules: modules whose weights, statistics and stored vectors have to be the same on all ranks.
            values: other values that have to be the same; the message calls them by their keywords.

        Raises:
            RunFailed: a rank differs from the first one.
        """
        if self.group is None:
            return
        found: list[Any] = [None] * self.world_size
        with raising_rank_lost():
            dist.all_gather_object(found, values | {"weights and support set": checksum(*modules)}, self.group)
        for rank, theirs in enumerate(found):
            for name, value in theirs.items():
                if value != found[0][name]:
                    raise RunFailed(
                        f"rank {rank} differs from rank 0 in its {name} ({value}, not {found[0][name]}): "
                        "all ranks need the same code, images, folders and kind of device"
                    )

    def final_barrier(self) -> None:
        """Wait until all ranks have saved: when one exits with a status, torchrun ends the others."""
        if self.group is not None:
            with raising_rank_lost():
                dist.barrier(self.group)
            _left.set()

    def frozen(self, encoder: nn.Module, mean: list[float], std: list[float], dtype: torch.dtype) -> FrozenEncoder:
        """Wrap the encoder for evaluation. Several ranks share the work, so all of them must ask for the features."""
        kind = FrozenEncoder if self.group is None else _SharedEncoder
        return kind(encoder, mean, std, self.device, dtype)


class _SharedEncoder(FrozenEncoder):
    """A frozen encoder of several ranks, which encode blocks of images in turn; each rank gets all features."""

    def _encoded(self, split: Split, batch_size: int) -> Tensor:
        blocks, world_size = list(split.blocks(batch_size)), dist.get_world_size()
        found: list[Tensor] = []
        for start in range(0, len(blocks), world_size):
            turn = blocks[start : start + world_size]
            mine = super()._encoded(turn[min(dist.get_rank(), len(turn) - 1)], batch_size)
            whole = mine.new_zeros(batch_size, mine.shape[1])
            whole[: len(mine)] = mine
            found += [
                x_NF[: len(block)] for x_NF, block in zip(_Gather.apply(whole).split(batch_size), turn, strict=False)
            ]
        return torch.cat(found)


def checksum(*modules: nn.Module) -> int:
    """CRC-32 of everything that ranks must have in common: weights, statistics, and stored vectors not in shards."""
    total = 0
    for module in modules:
        own = in_shards(module)
        for key, value in module.state_dict().items():
            if key in own:
                continue
            if isinstance(value, Tensor):
                content: Any = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            else:
                content = repr(value).encode()
            total = zlib.crc32(content, zlib.crc32(key.encode(), total))
    return total


def join(device: str) -> Ranks:
    """Join the other ranks of this run; a process that no launcher has started is the only rank.

    With ``cuda`` or ``auto`` each rank takes the GPU that has its local rank as number. All ranks but the first stop
    printing, and log errors only.

    Raises:
        UsageError: the requested GPU does not exist, or the variables of ``torchrun`` are invalid.
    """
    if not is_rank():
        return Ranks(build.device(device))
    try:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size}")
        _store()
    except ValueError as error:
        raise UsageError(
            f"RANK, WORLD_SIZE, MASTER_PORT: are not as torchrun sets them ({one_line(error)}); unset them"
        ) from None
    wanted = build.device(device)
    if wanted.type == "cuda":
        # If a launcher has bound each process to one GPU, the process sees it as GPU 0, whatever its number.
        is_bound = torch.cuda.device_count() == 1 and "CUDA_VISIBLE_DEVICES" in os.environ
        wanted = build.device(f"cuda:{0 if is_bound else os.environ.get('LOCAL_RANK', 0)}")
    if not dist.is_initialized():
        backend = "nccl" if wanted.type == "cuda" else "gloo"
        with raising_rank_lost():
            dist.init_process_group(
                backend, store=_store(), rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT
            )
        _Pulse(rank, world_size).start()
        atexit.register(dist.destroy_process_group)
    if rank:
        logging.disable(logging.WARNING)
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - it stays open as long as the process lives
    with raising_rank_lost():
        group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
    assert isinstance(group, dist.ProcessGroup)
    return Ranks(wanted, rank, world_size, group)


def is_first_to_say() -> bool:
    """Whether no rank has said yet why the run ends; True for the first caller only, which then has to say it."""
    try:
        return _store().add("said", 1) == 1
    except (RuntimeError, ValueError):  # the store has ended with the rank that kept it, or has never existed
        return True


@contextmanager
def announcing_rank_lost() -> Iterator[None]:
    """Print why the run ends as soon as another rank is lost.

    ``torchrun`` then sends the others SIGTERM. Use this inside a `Stopper`, which only records the signal, so that the
    line is printed first.
    """
    try:
        yield
    except RankLost:
        _announce_rank_lost()
        raise


def _announce_rank_lost() -> None:
    if is_first_to_say():
        print(f"error: {LOST}", file=sys.stderr, flush=True)


@cache
def _store() -> Any:
    return next(dist.rendezvous("env://", timeout=timedelta(minutes=5)))[0]


class _Pulse(threading.Thread):
    """Notices within 30 seconds that another rank is gone, even if a device's collective would wait for ever.

    Every rank increments its own counter in the store that they share. The first rank watches all counters, and the
    others watch the first rank's. Whoever sees one stand still marks the run as lost, for all ranks to see.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__(daemon=True, name="pulse")
        self.rank, self.watched = rank, range(world_size) if rank == 0 else range(1)
        self.store = _store().clone()

    def run(self) -> None:
        seen = dict.fromkeys(self.watched, (0, 0))  # a rank's counter, and for how many beats it has stood still
        while not _left.wait(BEAT_SECONDS):
            try:
                self.store.add(f"pulse/{self.rank}", 1)
                for each, (before, beats) in seen.items():
                    number = self.store.add(f"pulse/{each}", 0)
                    seen[each] = (number, beats + 1 if number == before else 0)
                    if seen[each][1] >= SILENT_BEATS:
                        self.store.add("lost", 1)
                lost = self.store.add("lost", 0) > 0
            except RuntimeError:
                lost = True
            if lost and not _left.is_set():
                _announce_rank_lost()
                os._exit(RankLost.status)  # the main thread may wait in a collective for ever


class _Gather(Function):
    """The rows of all ranks, in the order of the ranks. The backward pass keeps the gradient of this rank's rows."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:  # noqa: ARG004
        return torch.cat(all_gather(own))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ARG004
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def _gather_features(encoder: nn.Module, _: Any, features: Tensor) -> Tensor:
    return _Gather.apply(features) if encoder.training else features
