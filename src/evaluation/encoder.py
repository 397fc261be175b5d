"""The encoder that a run leaves: one file of weights that describes itself, and a module that needs nothing else.

A few lines compute features of images::

    from src.evaluation.encoder import load_encoder

    encoder = load_encoder("multirun/NAME")
    with torch.no_grad():
        features = encoder(images)  # [B, 3, S, S], uint8 or floats from 0 to 1, to [B, F] float32
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from src import build
from src.config import schema
from src.config.identity import without_neutral
from src.errors import UsageError
from src.runs import checkpoint
from src.runs.query import named_run
from src.runs.record import ENCODER, Record
from src.system.atomic_write import write_whole
from src.system.redact import one_line
from src.system.regular_file import open_regular

OVERSHOOT = 0.5  # how far pixels may lie beyond 0 and 1, as sharp edges do after a bicubic resizing


class Encoder(nn.Module):
    """A backbone that normalises its images itself.

    Args:
        backbone: normalised images [B, 3, S, S] to features [B, F].
        image_size: S, at which it was trained.
        mean, std: of each channel, for pixels from 0 to 1.
    """

    def __init__(self, backbone: nn.Module, image_size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.backbone = backbone
        self.image_size = image_size
        self.mean_C11: Tensor
        self.std_C11: Tensor
        self.register_buffer("mean_C11", torch.tensor(mean)[:, None, None])
        self.register_buffer("std_C11", torch.tensor(std)[:, None, None])

    def forward(self, images: Tensor | np.ndarray) -> Tensor:
        """Compute features [B, F] float32 of images [B, 3, S, S], uint8 from 0 to 255 or floats from 0 to 1.

        Raises:
            ValueError: the images have another shape, or are floats far outside 0 to 1.
        """
        images = torch.as_tensor(images)
        if remedy := _remedy(images.shape, self.image_size):
            size = self.image_size
            raise ValueError(f"images are {list(images.shape)}, and must be [B, 3, {size}, {size}]: {remedy}")
        if images.is_floating_point() and images.numel() and not torch.compiler.is_compiling():
            low, high = (bound.item() for bound in images.aminmax())
            if low < -OVERSHOOT or high > 1 + OVERSHOOT:
                raise ValueError(f"images are floats from {low:g} to {high:g}, and must be from 0 to 1, or uint8")
        return self.features(images)

    def features(self, images: Tensor) -> Tensor:
        """`forward` without its checks."""
        pixels = images if images.is_floating_point() else images / 255
        return self.backbone((pixels.to(self.mean_C11.dtype) - self.mean_C11) / self.std_C11).float()

    @torch.inference_mode()
    def predict(self, images: np.ndarray) -> np.ndarray:
        """`forward` for NumPy arrays, which MLflow calls."""
        return self(images).numpy()


def _remedy(shape: Sequence[int], size: int) -> str:
    """How to turn images of a shape into [B, 3, S, S]; empty if they have that shape."""
    if len(shape) == 3:
        return "give a batch, images[None]"
    if len(shape) != 4:
        return "reshape them"
    if shape[1] != 3 and shape[3] == 3:
        return "put the channels first, images.permute(0, 3, 1, 2)"
    if shape[1] == 1:
        return "repeat the grey channel, images.expand(-1, 3, -1, -1)"
    if shape[1] != 3:
        return "give three channels, red, green and blue"
    return "" if tuple(shape[2:]) == (size, size) else "resize them"


def save_encoder(
    path: Path,
    weights: Mapping[str, Tensor],
    cfg: schema.Config,
    mean: Sequence[float],
    std: Sequence[float],
    classes: Sequence[str],
    figures: Mapping[str, float],
    commit: str,
) -> None:
    """Write the backbone's weights, and in the file's metadata, as JSON, what else a user has to know.

    Args:
        classes: names of the classes of the training images, in the order of their labels.
        figures: the metrics of the encoder on validation and test images; accuracies are in percent.
        commit: commit of the code that trained it; empty if it is not known.
    """
    options = {key: value for key, value in without_neutral(cfg.backbone).items() if key != "name"}
    facts = {
        "architecture": cfg.backbone.name,
        "options": options,
        "image_size": cfg.data.image_size,
        "mean": list(mean),
        "std": list(std),
        "classes": list(classes),
        "figures": dict(figures),
        "commit": commit,
    }
    said = {key: json.dumps(value) for key, value in facts.items()}
    write_whole(path, _sorted_metadata(save(dict(weights), said | {"sha256": json.dumps(_digest(said, weights))})))


def _sorted_metadata(content: bytes) -> bytes:
    """Sort the metadata of a safetensors file, which the library shuffles, so that equal runs give equal files."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns what follows, as safetensors does
    return len(text).to_bytes(8, "little") + text + content[end:]


def read_weights(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read the metadata and the weights of a safetensors file, which need not come from a run.

    Raises:
        OSError: there is no such file, or it cannot be read.
        SafetensorError: the file has another format, or a run wrote it and it was altered since.
    """
    with open_regular(path):  # refuses a pipe, for whose writer safetensors would wait
        pass
    with safe_open(path, "pt") as file:
        said = {key: value for key, value in (file.metadata() or {}).items() if key != "format"}
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a mapping
    digest = said.pop("sha256", None)
    if digest is not None and digest != json.dumps(_digest(said, weights)):
        raise SafetensorError("it has been altered since a run wrote it")
    return said, weights


def _digest(said: Mapping[str, str], weights: Mapping[str, Tensor]) -> str:
    """The SHA-256 of a file's metadata and weights; safetensors has no checksum of its own."""
    digest = hashlib.sha256(json.dumps(dict(said), sort_keys=True).encode())
    for key in sorted(weights):
        digest.update(key.encode())
        digest.update(weights[key].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class Run:
    """What a finished run leaves: its folder, its record, its encoder, and the metadata of the encoder's file."""

    directory: Path
    record: Record
    encoder: Encoder
    facts: dict[str, Any]


def finished_run(name: str | None) -> Run:
    """Find the run that ``run=NAME`` names.

    Raises:
        UsageError: there is no such run, or it has no encoder.
    """
    if name is None:
        raise UsageError("give run=NAME, which is the name of the run's folder in multirun/")
    directory = named_run(str(name))
    record = Record.load(directory)
    if not (directory / ENCODER).exists():
        if record.status != "FINISHED":
            raise UsageError(f"run={name}: {record.unfinished('run its command again')}")
        raise UsageError(f"run={name}: the run has no {ENCODER} any more; with resume=never it trains anew")
    return Run(directory, record, *read_encoder(directory / ENCODER))


def load_encoder(path: str | Path) -> Encoder:
    """Load the encoder of a run, in evaluation mode on the CPU, with the normalisation that it was trained with.

    Args:
        path: the run's folder, or an ``encoder.safetensors``.

    Raises:
        UsageError: there is no such file, or it is not one that `save_encoder` wrote.
    """
    return read_encoder(path)[0]


def _load_pyfunc(path: str) -> Encoder:
    """Entry point of `mlflow.pyfunc.load_model`, which finds this module by its name in a logged model."""
    return load_encoder(path)


def is_of_timm(facts: Mapping[str, Any]) -> bool:
    """Whether the architecture is one of timm's."""
    return schema.Backbone(facts["architecture"], **facts["options"]).is_timm


def read_encoder(path: str | Path) -> tuple[Encoder, dict[str, Any]]:
    """Load the encoder as `load_encoder` does; returns it with the metadata that `save_encoder` has written.

    Raises:
        UsageError: as in `load_encoder`.
    """
    path = Path(path).expanduser()
    path = path / ENCODER if path.is_dir() else path
    try:
        said, weights = read_weights(path)
        facts = {key: json.loads(value) for key, value in said.items()}
        backbone_cfg = schema.Backbone(facts["architecture"], **facts["options"])
        size, mean, std = facts["image_size"], facts["mean"], facts["std"]
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no such file; give a run's folder or its {ENCODER}") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror or error}): choose another one") from None
    except SafetensorError as error:
        raise UsageError(f"{path} is not a safetensors file ({one_line(error)}): choose another one") from None
    except (ValueError, KeyError, TypeError):
        raise UsageError(
            f"{path} does not say what its weights are, as encoders of older versions do not: "
            "build it from its run's config.yaml, or train again"
        ) from None
    backbone, _ = build.encoder(backbone_cfg, size)
    checkpoint.restore(backbone, weights, path)
    return Encoder(backbone, size, mean, std).eval(), facts
