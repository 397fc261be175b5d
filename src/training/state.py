"""The state of a run: everything that training changes, and how it is saved and restored."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from src import build
from src.config import identity
from src.config.schema import Config
from src.data import Dataset
from src.data.batches import images_a_step
from src.errors import Diverged, UsageError
from src.evaluation.encoder import read_weights
from src.evaluation.probes import FrozenEncoder
from src.runs import checkpoint
from src.support.sharded import in_shards, own_rows
from src.system.redact import one_line
from src.system.seeding import seed_everything
from src.training import optim
from src.training.distributed import Ranks


class TrainState:
    """A method, the online classifier beside it, their optimizers, and the number of steps that they have taken.

    Args:
        cfg: the run's config.
        data: gives the number of classes and the normalisation.
        ranks: the processes that train together; None: this one alone.
    """

    def __init__(self, cfg: Config, data: Dataset, ranks: Ranks | None = None) -> None:
        self.cfg = cfg
        self.batch_size = images_a_step(cfg.batch_size, len(data.train))
        self.ranks = ranks or Ranks(build.device(cfg.device))
        self.device = self.ranks.device
        self.dtype = build.precision(cfg.precision, self.device)
        self.search = build.search(cfg.search, self.device)
        seed_everything(cfg.seed)
        classes = len(data.classes) if data.labelled else 1  # images without labels count as one class
        self.method, features = build.method(
            cfg,
            classes,
            self.search,
            self.device,
            parallelize=self.ranks.parallelize,
            shard=self.ranks.shard,
        )
        self.classifier = nn.Linear(features, classes).to(self.device)
        self.optimizer = optim.build(cfg.optimizer, self.method, self.batch_size)
        # Separate from the method's optimizer: no weight decay, no adaptation, its own learning rate.
        self.classifier_optimizer = torch.optim.SGD(
            self.classifier.parameters(), lr=cfg.evaluation.online_lr, momentum=0.9
        )
        self.base_lrs = {
            each: [group["lr"] for group in each.param_groups] for each in (self.optimizer, self.classifier_optimizer)
        }
        self.frozen = self.ranks.frozen(self.method.encoder, data.mean, data.std, self.dtype)
        # For what the first rank does by itself, without the other ranks.
        self.frozen_here = FrozenEncoder(self.method.encoder, data.mean, data.std, self.device, self.dtype)
        self.step = 0
        self.support_used = False  # whether the support set has returned any positives
        self.validated = True  # False while a validation that is due after the last step has not ended
        self.seconds = 0.0  # spent on the steps of the current epoch
        self.support_seconds = 0.0

    def set_lr(self, steps_per_epoch: int) -> float:
        """Set every optimizer's learning rate for the current step; returns the method's."""
        factor = optim.schedule(
            self.cfg.schedule,
            self.step,
            total_steps=self.cfg.epochs * steps_per_epoch,
            warmup_steps=round(self.cfg.schedule.warmup_epochs * steps_per_epoch),
        )
        for optimizer, base_lrs in self.base_lrs.items():
            for group, base in zip(optimizer.param_groups, base_lrs, strict=True):
                group["lr"] = base * factor
        return self.optimizer.param_groups[0]["lr"]

    def grad_norm(self) -> Tensor:
        """Euclidean norm of the method's whole gradient; a scalar on the device."""
        return torch.nn.utils.get_total_norm([p.grad for p in self.method.parameters() if p.grad is not None])

    def weight_norm(self) -> float:
        """Euclidean norm of all weights of the method, including a teacher's."""
        return float(torch.nn.utils.get_total_norm([p.detach() for p in self.method.parameters()]))

    def diverged(self, loss: float, grad_norm: float) -> Diverged:
        """The error that says what is not finite at the current step, and what to do about it."""
        lr = self.optimizer.param_groups[0]["lr"]
        remedy = "lower optimizer.lr or raise schedule.warmup_epochs"
        if self.step == 0 and self.dtype != torch.float32:
            remedy = "before the first update, so no learning rate is the cause: set precision=float32"
        return Diverged(
            f"diverged at step {self.step}: loss {loss:.4g}, norm of the gradient {grad_norm:.4g}, of the weights "
            f"{self.weight_norm():.4g}, learning rate {lr:.4g}; {remedy} (the same settings end the same way; "
            "resume=never tries them again)"
        )

    def pop_times(self, steps: int) -> dict[str, float]:
        """Return the time metrics of the epoch's steps, without evaluation and checkpoints, and reset the clocks."""
        seconds, support_seconds = self.seconds, self._support_seconds()
        self.seconds = self.support_seconds = 0.0
        return {
            "time/epoch_seconds": seconds,
            "time/images_per_second": steps * self.batch_size / seconds,
            "time/support_fraction": support_seconds / seconds,
        }

    def _support_seconds(self) -> float:
        if self.method.support is not None:
            self.support_seconds += self.method.support.stopwatch.pop()
        return self.support_seconds

    def sizes(self) -> dict[str, int]:
        """Sizes of the batch, the support set and the encoder, for the tracker's params."""
        support = self.method.support
        return {
            "batch_size": self.batch_size,
            # A support set from another package may have any name for this setting.
            "support_set_size": support.stored_vectors if support is not None else 0,
            "support_bytes": support.stored_bytes if support is not None else 0,
            "encoder_parameters": sum(p.numel() for p in self.method.encoder.parameters()),
            "encoder_features": self.classifier.in_features,
        }

    def untrained(self) -> FrozenEncoder:
        """Rebuild the encoder as it was before the first step; it depends on the seed alone."""
        seed_everything(self.cfg.seed)
        encoder, _ = build.encoder(self.cfg.backbone, self.cfg.data.image_size)
        return self.frozen.of(encoder.to(self.device).to(memory_format=torch.channels_last))

    def teacher(self) -> FrozenEncoder:
        """The encoder of the teacher; the method must have one."""
        return self.frozen.of(self.method.get_submodule("teacher_encoder"))

    def encoder_weights(self) -> dict[str, Tensor]:
        """The encoder's state dict, on the CPU, contiguous."""
        return {key: value.cpu().contiguous() for key, value in self.method.encoder.state_dict().items()}

    def save(self, directory: Path, model: Mapping[str, Any], rows: tuple[int, str]) -> None:
        """Write a checkpoint of the state, with what an evaluation needs to know of the run.

        Args:
            directory: the folder of the checkpoints.
            model: the method's state dict (`src.training.distributed.Ranks.full_state_dict`).
            rows: size and SHA-256 of what ``metrics.jsonl`` holds now (`src.runs.tracker.Tracker.written`).
        """
        state = {
            "config": identity.without_neutral(self.cfg),
            "mean": self.frozen.mean,
            "std": self.frozen.std,
            "model": model,
            "classifier": self.classifier.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "classifier_optimizer": self.classifier_optimizer.state_dict(),
            "seconds": [self.seconds, self._support_seconds()],
            "rows": rows,
            "served": self.support_used,
            "validated": self.validated,
        }
        checkpoint.save(directory, self.step, state)

    def start_from(self, path: Path) -> str:
        """Load the weights of another run, or of an encoder's file; returns the names of the parts that were loaded.

        The encoder has to fit. Other parts of a checkpoint, such as projector and predictor, are loaded if they fit,
        and the support set only if that run had the same images, because its entries refer to their rows.

        Raises:
            UsageError: the file is damaged, or holds no encoder of this architecture.
        """
        taken = []
        with checkpoint.understood(path):
            if path.suffix == ".pt":
                state = checkpoint.load(path)
                weights = state["model"]
                if not identity.same_images(state["config"], self.cfg):
                    weights = {key: value for key, value in weights.items() if not key.startswith("support.")}
            else:
                try:
                    weights = {f"encoder.{key}": value for key, value in read_weights(path)[1].items()}
                except (OSError, SafetensorError) as error:
                    raise UsageError(
                        f"init={path}: not a safetensors file ({one_line(error)}); give a run of this project, "
                        "its .pt, or an encoder's .safetensors (docs/library.md: weights of another library)"
                    ) from None
            weights = own_rows(self.method, weights)
            remedy = f"init= takes an encoder of backbone={self.cfg.backbone.name}, with the keys of its state_dict"
            for name, part in self.method.named_children():
                own = checkpoint.part_of(weights, name)
                if name == "encoder" or checkpoint.fits(part, own):
                    checkpoint.restore(part, own, path, remedy)
                    taken.append(name)
        self.method.after_init(taken)
        return ", ".join(taken)

    def resume(self, directory: Path, rows: Path) -> bool:
        """Continue from the newest good checkpoint; returns whether there is one.

        The first rank chooses it, and sets damaged ones aside: on a file system that machines share, the other ranks
        may see an older state of the folder.

        Args:
            directory: the folder of the checkpoints.
            rows: the run's ``metrics.jsonl``.

        Raises:
            UsageError: the checkpoint is of another configuration, method or shape, is not a run's, or cannot be read
                by this rank.
        """
        path, state = None, None
        if self.ranks.first:
            path, state = checkpoint.load_latest(directory, rows) or (None, None)
            checkpoint.set_aside_after(directory, state["step"] if state else -1)
        path = self.ranks.broadcast(path)
        if path is None:
            return False
        with self.ranks.one_at_a_time() if in_shards(self.method) else nullcontext():
            self._take(path, state or self._read_chosen(path))
            del state  # frees its memory before the next rank reads the file
        return True

    def _read_chosen(self, path: Path) -> dict[str, Any]:
        """Read the checkpoint that the first rank has chosen, on another rank and perhaps another machine."""
        try:
            return checkpoint.load(path)
        except UsageError as error:
            where = f"rank {self.ranks.rank} on {socket.gethostname()}"
            raise UsageError(
                f"{where}: {error}; rank 0 can: the run's folder must be one that all machines share"
            ) from None

    def _take(self, path: Path, state: Mapping[str, Any]) -> None:
        with checkpoint.understood(path):
            identity.check_same(state["config"], self.cfg, path)
            checkpoint.restore(self.method, own_rows(self.method, state["model"]), path)
            checkpoint.restore(self.classifier, state["classifier"], path)
            self.optimizer.load_state_dict(state["optimizer"])
            self.classifier_optimizer.load_state_dict(state["classifier_optimizer"])
            self.step = state["step"]
            self.support_used = state.get("served", True)
            self.validated = state.get("validated", True)
            self.seconds, self.support_seconds = map(float, state["seconds"])
