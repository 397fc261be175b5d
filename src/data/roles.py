"""Which split of a data set is trained on, which validates, which tests: the same rules for every source."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import compress

import numpy as np

from src.data.decoding import NOTHING, UNLABELLED, Contents, LazyImage, Part
from src.errors import UsageError

# Sources that ship without a test split get this one, which no option changes, so that results stay comparable.
TEST_FRACTION = 0.2
TEST_SEED = 0

TRAIN, VALIDATION, TEST, UNLABELLED_SPLIT = "train", "validation", "test", "unlabeled"
SPELLINGS = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("validation", "valid", "val", "dev"), VALIDATION),
    **dict.fromkeys(("test", "testing"), TEST),
    **dict.fromkeys(("unlabeled", "unlabelled", "unsupervised"), UNLABELLED_SPLIT),
}


def split_name(written: str) -> str:
    """The name under which a split is known here; splits of other names keep theirs."""
    return SPELLINGS.get(written.lower(), written)


class Rows:
    """Some of the images of an iterable that can be read more than once, without holding the others."""

    def __init__(self, images: Iterable[LazyImage], kept: np.ndarray) -> None:
        self.images, self.kept = images, kept

    def __iter__(self) -> Iterator[LazyImage]:
        return compress(self.images, self.kept)


def used_splits(names: Iterable[str], train: str | None, test: str | None) -> list[str]:
    """The splits that have a role: first the one that is trained on, and then those whose classes would count.

    Args:
        names: of the splits that there are.
        train: what ``data.train_split`` says.
        test: what ``data.test_split`` says.

    Raises:
        UsageError: there is no such split, the two are one, or none is the training split.
    """
    there = list(names)
    for key, split in (("data.train_split", train), ("data.test_split", test)):
        if split is not None and split_name(split) not in there:
            instead = f"choose one of {', '.join(there)}" if there else "there is none at all; set data.root"
            raise UsageError(f"{key}={split}: there is no such split; {instead}")
    candidates = [split_name(train)] if train else [TRAIN, UNLABELLED_SPLIT]
    training = next((name for name in candidates if name in there), None)
    if training is None:
        raise UsageError(f"no split is called train; set data.train_split to one of {', '.join(there)}")
    if test and split_name(test) == training:
        raise UsageError(f"data.test_split={test}: is the training split too; name another one")
    roles = (training, TRAIN, VALIDATION, TEST, *([split_name(test)] if test else []))
    return [name for name in dict.fromkeys(roles) if name in there]


def arrange(classes: list[str], splits: Mapping[str, Part], train: str | None, test: str | None) -> Contents:
    """Give each split its role.

    The test split is ``data.test_split``, or else the first that has labels of test and validation, or else a fixed,
    stratified fifth of the labelled images. Labelled validation images that are not the test validate. Where the
    training images have no labels, other labelled images stand in for them wherever labels are needed.

    Args:
        classes: of the labelled splits.
        splits: by name; their images can be read more than once.
        train: what ``data.train_split`` says; None: train, or else unlabeled.
        test: what ``data.test_split`` says.

    Raises:
        UsageError: a split that is named does not exist, or cannot play its role.
    """
    training, testing = used_splits(splits, train, test)[0], split_name(test) if test else None
    if not splits[training].labels:
        raise UsageError(f"no images in the training split ({training}); set data.train_split, or add images")
    notes = []
    labelled = {name: part for name, part in splits.items() if part.labelled and name != training}
    if testing is not None and testing not in labelled:
        raise UsageError(
            f"data.test_split={test}: its images have no labels to test with, or only one class; choose another split"
        )
    candidates = [name for name in (TEST, VALIDATION) if name in labelled]
    testing = testing or next(iter(candidates), None)
    hidden = TEST in splits and training != TEST
    lacking = "the test split has no labels, or only one class" if hidden else "no test split"
    if testing == VALIDATION and hidden and test is None:
        notes.append(f"{lacking}: the validation split is the test (data.test_split chooses)")
    others = {name: part for name, part in labelled.items() if name != testing}

    if splits[training].labelled:
        if testing is not None:
            return Contents(classes, splits[training], splits[testing], others.get(VALIDATION, NOTHING), notes=notes)
        rest, held_out = hold_out_test(splits[training])
        notes.append(f"{lacking}: a fixed fifth of the training images ({len(held_out.labels)}) is the test")
        return Contents(classes, rest, held_out, notes=notes)

    probing = next((name for name in (TRAIN, VALIDATION) if name in others), testing)
    if probing is None:
        notes.append("no image has a label: accuracy, and whatever else needs labels, is left out")
        return Contents([], splits[training], NOTHING, notes=notes)
    if testing in (None, probing):
        probe, tested = hold_out_test(splits[probing])
    else:
        probe, tested = splits[probing], splits[testing]
    notes.append(f"the training images have no labels: the probes learn from the split {probing}")
    return Contents(classes, splits[training], tested, probe=probe, notes=notes)


def hold_out_test(part: Part) -> tuple[Part, Part]:
    """What remains, and a fixed, stratified fifth."""
    import torch

    from src.data.splits import stratified_split

    labels = np.asarray(part.labels, np.int64)
    assert UNLABELLED not in labels
    tested = np.zeros(len(labels), bool)
    tested[stratified_split(torch.from_numpy(labels), TEST_FRACTION, TEST_SEED)[1].numpy()] = True
    rest, held_out = (Part(labels[kept].tolist(), Rows(part.images, kept)) for kept in (~tested, tested))
    return rest, held_out
