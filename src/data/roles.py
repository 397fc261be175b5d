"""The roles of a data set's splits, training, validation and test, by rules that are the same for every source."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import compress

import numpy as np

from src.data.decoding import NOTHING, UNLABELLED, Contents, LazyImage, Part
from src.errors import UsageError

# The test split of sources that come without one. No option changes it, so that results stay comparable.
TEST_FRACTION = 0.2
TEST_SEED = 0

TRAIN, VALIDATION, TEST, UNLABELLED_SPLIT = "train", "validation", "test", "unlabeled"
NUMBERED = "numbered"  # the split of shards that neither their own names nor a folder's name assign to one
SPELLINGS = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("validation", "valid", "val", "dev"), VALIDATION),
    **dict.fromkeys(("test", "testing"), TEST),
    **dict.fromkeys(("unlabeled", "unlabelled", "unsupervised"), UNLABELLED_SPLIT),
}


def split_name(written: str) -> str:
    """Map the usual spellings of a split's name to one name; other names stay as they are."""
    return SPELLINGS.get(written.lower(), written)


class Rows:
    """A selection from an iterable of images, made anew at each iteration so that no image is held.

    Args:
        images: an iterable that can be iterated over more than once.
        kept: [N] bool, which images to select.
    """

    def __init__(self, images: Iterable[LazyImage], kept: np.ndarray) -> None:
        self.images, self.kept = images, kept

    def __iter__(self) -> Iterator[LazyImage]:
        return compress(self.images, self.kept)


def used_splits(names: Iterable[str], train: str | None, test: str | None) -> list[str]:
    """List the splits that can have a role: the training split, then the others in the order that decides the classes.

    Args:
        names: the names of all splits.
        train: the value of ``data.train_split``; None: train, or else unlabeled. ``numbered`` is the training split if
            there are none but validation and test beside it.
        test: the value of ``data.test_split``.

    Raises:
        UsageError: a named split does not exist, both name the same split, or there is no training split.
    """
    there = list(names)
    for key, split in (("data.train_split", train), ("data.test_split", test)):
        if split is not None and split_name(split) not in there:
            instead = f"choose one of {', '.join(there)}" if there else "there is none at all; set data.root"
            raise UsageError(f"{key}={split}: there is no such split; {instead}")
    numbered = [NUMBERED] if set(there) <= {NUMBERED, VALIDATION, TEST} else []
    candidates = [split_name(train)] if train else [TRAIN, UNLABELLED_SPLIT, *numbered]
    training = next((name for name in candidates if name in there), None)
    if training is None:
        raise UsageError(f"no split is called train; set data.train_split to one of {', '.join(there)}")
    if test and split_name(test) == training:
        raise UsageError(f"data.test_split={test}: is the training split too; name another one")
    roles = (training, TRAIN, VALIDATION, TEST, *([split_name(test)] if test else []))
    return [name for name in dict.fromkeys(roles) if name in there]


def arrange(classes: list[str], splits: Mapping[str, Part], train: str | None, test: str | None) -> Contents:
    """Give each split its role.

    The test split is ``data.test_split``, or else the test or validation split, whichever has labels first, or else a
    fixed, stratified fifth of the labelled images. A labelled validation split that is not the test is used for
    validation. If the training images have no labels, another labelled split is used to fit the probes.

    Args:
        classes: the names of the classes in the labelled splits.
        splits: the splits by name; their images can be iterated over more than once.
        train: the value of ``data.train_split``; None: `used_splits` chooses it.
        test: the value of ``data.test_split``.

    Raises:
        UsageError: a named split does not exist, or cannot play its role.
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
    """Hold out a fixed, stratified fifth as the test; return the remaining images and those held out."""
    import torch

    from src.data.splits import stratified_split

    labels = np.asarray(part.labels, np.int64)
    assert UNLABELLED not in labels
    tested = np.zeros(len(labels), bool)
    tested[stratified_split(torch.from_numpy(labels), TEST_FRACTION, TEST_SEED)[1].numpy()] = True
    rest, held_out = (Part(labels[kept].tolist(), Rows(part.images, kept)) for kept in (~tested, tested))
    return rest, held_out
