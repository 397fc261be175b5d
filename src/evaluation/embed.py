"""Write features of images to a parquet file, for viewers such as Embedding Atlas: ``python -m src.embed run=NAME``.

Shapes: F features, M images on the map, N images.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import compress, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor
from yaml import YAMLError

from src import build
from src.config import schema
from src.config.parse import chooses_data, chosen_data, parse_data
from src.data import Dataset, load
from src.data.cache import fingerprint
from src.data.decoding import UNLABELLED
from src.data.splits import Split
from src.errors import RunFailed, UsageError
from src.evaluation.encoder import Run, finished_run
from src.evaluation.probes import FrozenEncoder
from src.runs import directory as run_directory
from src.runs.record import CONFIG
from src.system.atomic_write import cannot_write, whole, write_whole
from src.system.redact import one_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EMBEDDINGS = "embeddings.parquet"  # in a run's folder
ROWS_AT_ONCE = 4096  # images in a row group, and the most that memory holds at a time
MIN_MAP_IMAGES = 3  # fewest images of which t-SNE makes a map


class NamedSplit(NamedTuple):
    """Images to embed, with their names."""

    split: Split  # images without a label have the label `UNLABELLED`
    names: Iterator[tuple[str, str]]  # for each image the name of its split and its own


def main(
    composed: DictConfig,
    choose: Callable[[Tensor, int], Tensor],
    draw: Callable[[Tensor, Tensor, Sequence[str]], Figure],
) -> Path:
    """Write the features of images to a file, and a map of some of them beside it; print where both are.

    The features are those of `src.evaluation.encoder.load_encoder`, computed in float32, one block of images after
    another.

    Args:
        composed: the composed config, which names the run, the images and the file.
        choose: returns the rows [M] of the images on the map, given labels [N] and the number of classes.
        draw: returns the map, given vectors [M, F], labels [M] and the names of the classes.

    Raises:
        UsageError: there is no such run or folder, the run has no encoder, or the images cannot be read.
        RunFailed: images have disappeared since they were counted.
        Diverged: a feature is not finite.
        CannotWrite: the disk is full, read-only or broken.
    """
    run = finished_run(composed.run)
    path = run.directory / EMBEDDINGS if composed.out is None else _output_path(str(composed.out))
    cfg = _data(composed, run)
    device = build.device(composed.device)
    data = load(cfg)
    parts = _named_splits(data, cfg, everything=chooses_data(composed))
    labels_N = torch.cat([part.split.labels for part in parts])
    shown_N = torch.zeros(len(labels_N), dtype=torch.bool)
    shown_N[choose(labels_N, len(data.classes))] = True

    backbone = run.encoder.backbone.to(device).to(memory_format=torch.channels_last)
    frozen = FrozenEncoder(backbone, run.facts["mean"], run.facts["std"], device, torch.float32)
    said = {"run": run.record.name, "data": data.name, "fingerprint": data.fingerprint}
    with run_directory.exclusive(run.directory) if composed.out is None else nullcontext(), _disk_errors(path):
        with whole(path) as file:
            shown_MF = _write(file, frozen, parts, data.classes, shown_N, said)
        print(path, f"{len(labels_N):,} images, {shown_MF.shape[1]} numbers each", sep="\n    ")
        if len(shown_MF) >= MIN_MAP_IMAGES:
            picture = io.BytesIO()
            draw(F.normalize(shown_MF, dim=1), labels_N[shown_N], data.classes).savefig(picture, dpi=120)
            write_whole(path.with_suffix(".png"), picture.getvalue())
            print(path.with_suffix(".png"))
    return path


def _write(
    file: BinaryIO,
    frozen: FrozenEncoder,
    parts: Sequence[NamedSplit],
    classes: Sequence[str],
    shown_N: Tensor,
    said: dict[str, str],
) -> Tensor:
    """Write a row group for each block of images, and return the features [M, F] of those on the map."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = pa.string()
    columns = pa.schema({"image": text, "split": text, "label": text, "vector": pa.list_(pa.float32())}, said)
    shown, row = [], 0
    with pq.ParquetWriter(file, columns) as table:
        for part in parts:
            for block in part.split.blocks(ROWS_AT_ONCE):
                x_NF = frozen.features(block).x_NF.cpu()
                named = list(islice(part.names, len(block)))
                if len(named) < len(block):
                    raise RunFailed("there are fewer images than there were a moment ago: run the command again")
                labels = [None if label == UNLABELLED else _utf8(classes[label]) for label in block.labels.tolist()]
                starts = torch.arange(len(x_NF) + 1, dtype=torch.int32) * x_NF.shape[1]
                vectors = pa.ListArray.from_arrays(starts.numpy(), x_NF.flatten().numpy())
                splits, names = zip(*(map(_utf8, each) for each in named), strict=True)
                arrays = [pa.array(each, text) for each in (names, splits, labels)]
                table.write_table(pa.Table.from_arrays([*arrays, vectors], schema=columns))
                shown.append(x_NF[shown_N[row : row + len(x_NF)]])
                row += len(x_NF)
    return torch.cat(shown)


def _utf8(name: str) -> str:
    """Replace each byte of a file's or folder's name that is not UTF-8 by a question mark, since Parquet refuses it."""
    return name.encode(errors="replace").decode()


def _named_splits(data: Dataset, cfg: schema.Data, everything: bool) -> list[NamedSplit]:
    """The test images or, with ``everything``, the images of all splits.

    Raises:
        UsageError: there are no such images.
    """
    test = {"test": data.test}
    splits = {"train": data.train, "val": data.val, **test, "probe": data.probe_only} if everything else test
    parts = []
    for name, split in splits.items():
        if split is not None and len(split):
            labelled = data.labelled if name == "train" else bool(data.classes)
            labels_N = split.labels if labelled else torch.full_like(split.labels, UNLABELLED)
            names = _validation_names(data, cfg) if name == "val" else data.names(cfg)[name]
            parts.append(NamedSplit(replace(split, labels=labels_N), _select_rows(names, split)))
    if not parts:
        raise UsageError("the run's data have no test images, because no image has a label: choose images with data=")
    return parts


def _validation_names(data: Dataset, cfg: schema.Data) -> Iterator[tuple[str, str]]:
    """The names of all images in the store of the validation images, with ``val`` as the name of their split."""
    assert data.val is not None
    names = data.names(cfg)["train" if data.val.store is data.train.store else "probe"]
    return (("val", name) for _, name in names)


def _select_rows(names: Iterator[Any], split: Split) -> Iterator[Any]:
    """Select the names of a split's images out of those of its store; the rows of the split must ascend."""
    if split.rows is None:
        return names
    taken = torch.zeros(len(split.store), dtype=torch.bool)
    taken[split.rows] = True
    return compress(names, taken.numpy())


def _data(composed: DictConfig, run: Run) -> schema.Data:
    """The config of the images to embed, at the encoder's size: the run's own, or those that the command line chooses.

    Only the run's own images keep their validation split, since k and the learning rate were chosen on it.

    Raises:
        UsageError: the run's configuration cannot be read, or the settings do not fit.
    """
    path, size = run.directory / CONFIG, run.encoder.image_size
    try:
        cfg = OmegaConf.create(path.read_text())
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        raise UsageError(f"{path} cannot be read ({one_line(error)}): run the training command again") from None
    if not (isinstance(cfg, DictConfig) and isinstance(cfg.get("data"), DictConfig)):
        raise UsageError(f"{path} is not the configuration of a run: run the training command again")
    if composed.data.image_size not in (None, size):
        raise UsageError(f"data.image_size={composed.data.image_size}: the encoder takes {size} pixels; leave it out")
    composed.data.image_size = None
    own = parse_data(cfg)
    cfg.data = chosen_data(composed, cfg.data)
    data = parse_data(cfg)
    if fingerprint(data) == own.fingerprint:
        return replace(data, final=own.final, val_fraction=own.val_fraction, split_seed=own.split_seed)
    return replace(data, final=True)


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from error


def _output_path(out: str) -> Path:
    """The path that ``out=`` gives.

    Raises:
        UsageError: no file can be written there.
    """
    path = Path(out).expanduser()
    if path.suffix != ".parquet":
        raise UsageError(f"out={out}: give a path that ends in .parquet")
    if not path.parent.is_dir():
        raise UsageError(f"out={out}: there is no folder {path.parent}; make it, or choose another one")
    if path.is_dir():
        raise UsageError(f"out={out}: is a folder; name a file")
    return path
