"""Image data sets in the Hugging Face hub's parquet layouts, where a shard's name or folder names its split.

An image is an encoded file in a binary cell, or in the field ``bytes`` of a struct. A label is an integer, a string, a
boolean or a whole number stored as a float; an empty cell or -1 means that the image has no label.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from src.data.decoding import UNLABELLED, Contents, LazyImage, Part, Source, open_bytes, stamp, state
from src.data.folders import files_below, settled
from src.data.roles import NUMBERED, SPELLINGS, arrange, split_name, used_splits
from src.errors import UsageError

if TYPE_CHECKING:
    import pyarrow

MANY = 100  # shards; so many are opened only after they or their folders have changed, as opening them takes minutes
ROWS_AT_ONCE = 256  # bounds memory: a shard holds many thousands of encoded images
NO_LABELS = "none"  # the value of data.label_column for images without labels
USUAL_LABELS = ("label", "labels", "fine_label")
OF = re.compile(r"-of-(\d+)")
NUMBERING = re.compile(r"[-_.]?\d+(-of-\d+)?(-[0-9a-f]+)?$")
KNOWN_SPLIT = re.compile(rf"(?:partial-)?({'|'.join(SPELLINGS)})(?=[-.]|$)", re.IGNORECASE)


def parquet(
    root: Path,
    image_column: str | None,
    label_column: str | None,
    config: str | None = None,
    train_split: str | None = None,
    test_split: str | None = None,
) -> Source:
    """The source of all parquet shards at any depth below ``root``.

    Args:
        root: the folder.
        image_column: the images' column; None: `find_columns` finds it.
        label_column: the labels' column, or ``none``; None: `find_columns` finds it. Only ``label``, the default of the
            command line, may be missing or unreadable where no other column could hold labels.
        config: the configuration to use, if there are several below the root.
        train_split: the split to train on; None: `src.data.roles.arrange` chooses it.
        test_split: the split to test on; None: `src.data.roles.arrange` chooses it.

    Raises:
        UsageError: there are no shards, several configurations and none is chosen, a named split does not exist, a
            shard cannot be read, a column is missing or has the wrong type, or two shards name a class differently.
    """
    seen, began = set[str](), time.time()
    names = [path for path in files_below(root, seen) if path.endswith(".parquet")]
    if not names:
        raise UsageError(f"data.root={root}: no parquet files (train-*.parquet, ...) in or below that folder")
    splits = shards_of_splits((PurePath(name).relative_to(root) for name in names), config)
    used = {name: [root / shard for shard in splits[name]] for name in used_splits(splits, train_split, test_split)}
    shards = [shard for each in used.values() for shard in each]
    folders = settled(seen, began) if len(shards) >= MANY else {}
    watched = {str(shard): state(shard) for shard in shards} | folders if folders else {}
    files = stamp(shards)  # read after what is watched and before a shard is opened, so that no change goes unnoticed
    asked = label_column
    image_column, label_column, notes = find_columns([each[0] for each in used.values()], image_column, label_column)
    schemas = {shard: _schema(shard) for shard in shards}
    others = {(each.name, each.type) for schema in schemas.values() for each in schema if each.name != image_column}
    if label_column == USUAL_LABELS[0] and not any(_holds_labels(kind) for _, kind in others):
        label_column = NO_LABELS  # a column of another name is one that the user has named: `_check_columns` wants it
    if label_column == NO_LABELS != asked:
        unread = [f"{name} holds {kind}" for name, kind in others if name in USUAL_LABELS and not _holds_labels(kind)]
        notes += [f"{each}, which is read as no label; convert it to integers or strings" for each in sorted(unread)]
    labelled = [name for name, each in used.items() if any(label_column in schemas[shard].names for shard in each)]
    # If no split has the column, it is probably misspelt: `_check_columns` refuses it.
    columns = {name: label_column if name in labelled or not labelled else NO_LABELS for name in used}
    for name, each in used.items():
        for shard in each:
            _check_columns(shard, schemas, image_column, columns[name])
    _check_class_names(schemas, label_column)
    notes += [f"{each}, and the others are not here" for each in lacking(used)]

    def read() -> Contents:
        classes, parts = _read(used, image_column, columns)
        contents = arrange(classes, parts, train_split, test_split)
        return contents._replace(notes=[*notes, *contents.notes])

    return Source(f"{image_column} {label_column}\n{files}", read, watched)


def shards_of_splits(shards: Iterable[PurePath], config: str | None) -> dict[str, list[PurePath]]:
    """Group shards by split, in order, according to the hub's layouts.

    The split is in the shard's name (``data/train-00000-of-00002.parquet``, ``train.parquet``), or in its folder's name
    if the shard's is only a number (``default/train/0000.parquet``, ``split=train/0.parquet``), or else ``numbered``
    (``0000.parquet``). The folders above name the configuration.

    Args:
        shards: paths relative to the data set's root.
        config: the configuration to use; None: the only one.

    Raises:
        UsageError: there is no such configuration, there are several and none is chosen, or the folders partition the
            shards by a column other than ``split``.
    """
    configs: dict[str, dict[str, list[PurePath]]] = defaultdict(lambda: defaultdict(list))
    for shard in sorted(shards):
        split, folder = _split_and_folder(shard)
        configs["/".join(part for part in folder.parts if part != "data") or "default"][split].append(shard)
    names = ", ".join(configs)
    if config is not None:
        if config not in configs:
            raise UsageError(f"data.config={config}: there is no such configuration; choose one of {names}")
        return dict(configs[config])
    if len(configs) > 1:  # the test images of one may be training images of another
        raise UsageError(
            f"several configurations of one data set: {names}; choose one with data.config=NAME, or move the shards of "
            "all splits into one folder"
        )
    return dict(next(iter(configs.values()), {}))


def lacking(splits: Mapping[str, Sequence[PurePath]]) -> list[str]:
    """Describe each split with fewer shards than their names (``-of-N``) announce; a download may be incomplete."""
    found = []
    for name, shards in splits.items():
        said = {int(each[1]) for shard in shards if (each := OF.search(shard.stem))}
        if len(said) == 1 and len(shards) < (total := said.pop()):
            found.append(f"{name} has {len(shards)} of {total} shards")
    return found


def _split_and_folder(shard: PurePath) -> tuple[str, PurePath]:
    """The name of a shard's split, and the folder that holds all splits of its configuration."""
    stem, folder = NUMBERING.sub("", shard.stem), shard.parent
    above = folder.name.removeprefix("split=")  # the name of a partition folder in Spark and polars
    if known := KNOWN_SPLIT.match(shard.stem):
        stem = known[1]
    elif in_folder := KNOWN_SPLIT.fullmatch(above):
        return split_name(in_folder[1]), folder.parent
    elif above and (not stem or above != folder.name):
        if "=" in above:
            raise UsageError(
                f"{shard}: names no split, and its folder is a partition by another column; name the shards by their "
                "splits, or write that column into them and leave its folders out"
            )
        return split_name(above), folder.parent
    if KNOWN_SPLIT.fullmatch(above):  # for example train/train-0000.parquet
        folder = folder.parent
    return split_name(stem or NUMBERED), folder


@contextmanager
def _readable(shard: Path) -> Iterator[None]:
    """Turn the many kinds of error that pyarrow raises for a damaged file into one line."""
    try:
        if not shard.is_file():  # opening a pipe would wait for a writer
            raise UsageError(f"{shard}: not a regular file; remove it")
        yield
    except UsageError:
        raise
    except Exception as error:
        # In the cache of the hub's library a shard is a link, and the file behind it is what would be found again.
        file = shard.resolve() if shard.is_symlink() else "it"
        raise UsageError(
            f"{shard}: not a readable parquet file (cut short, or a pointer to one?); remove {file}, and fetch it "
            "again, which the same command does with data=hub"
        ) from error


def find_columns(shards: Sequence[Path], image: str | None, label: str | None) -> tuple[str, str, list[str]]:
    """Find the columns of images and labels, with a note for the user if other columns could be the labels too.

    Args:
        shards: one shard of each split, beginning with the training split.
        image: the images' column; None: the only column of the first shard that holds encoded images.
        label: the labels' column; None: the only ``ClassLabel`` column, or else one with a usual name, in the first
            shard that has either, or ``none`` if no shard has.

    Raises:
        UsageError: no column or several columns hold images, or several are class labels and none has a usual name.
    """
    if image is None:
        schema = _schema(shards[0])
        images = [each.name for each in schema if _holds_images(each.type)]
        if len(images) != 1:
            found = f"{len(images)} columns hold encoded images ({', '.join(images)})" if images else "no column does"
            raise UsageError(f"{shards[0]}: {found}; set data.image_column to one of {', '.join(schema.names)}")
        [image] = images
    if label is not None:
        return image, label, []
    chosen, seen = NO_LABELS, dict[str, None]()
    for shard in shards:
        schema = _schema(shard)
        with _readable(shard):
            features = _features(schema)
        labels = [each.name for each in schema if _holds_labels(each.type) and each.name != image]
        declared = [name for name in labels if (features.get(name) or {}).get("_type") == "ClassLabel"]
        candidates = declared if len(declared) == 1 else [name for name in USUAL_LABELS if name in labels]
        if not candidates and declared:
            raise UsageError(f"{shard}: set data.label_column to one of {', '.join(declared)} (none: no labels)")
        seen |= dict.fromkeys(labels)
        if candidates:
            chosen = candidates[0]
            break
    others = [name for name in seen if name != chosen]
    notes = (
        [f"the labels are: {chosen} (data.label_column chooses; there is also {', '.join(others)})"] if others else []
    )
    return image, chosen, notes


def _features(schema: pyarrow.Schema) -> dict[str, Any]:
    """The hub's description of the columns in the schema's metadata; empty if the hub did not write the shard."""
    noted = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features: dict[str, Any] = (noted.get("info") or {}).get("features") or {}
    return features


def _schema(shard: Path) -> pyarrow.Schema:
    import pyarrow.parquet as pq

    with _readable(shard):
        return pq.read_schema(shard)


def _check_columns(shard: Path, schemas: Mapping[Path, pyarrow.Schema], image_column: str, label_column: str) -> None:
    schema = schemas[shard]
    for column in (image_column, *([label_column] if label_column != NO_LABELS else [])):
        if column not in schema.names:
            remedy = "use data=parquet with data.image_column and data.label_column (none: no labels)"
            if others := [other for other in schemas if column in schemas[other].names]:
                remedy = f"add or rename one, as {others[0]} has it, or remove this shard"
            raise UsageError(f"{shard}: no column {column}; it has {', '.join(schema.names)}: {remedy}")
    if not _holds_images(image := schema.field(image_column).type):
        raise UsageError(f"{shard}: column {image_column} holds {image}, not encoded images; set data.image_column")
    if label_column != NO_LABELS and not _holds_labels(label := schema.field(label_column).type):
        raise UsageError(
            f"{shard}: column {label_column} holds {label}, not integers or strings; convert it, or set "
            "data.label_column to another (none: no labels)"
        )


def _check_class_names(schemas: Mapping[Path, pyarrow.Schema], label_column: str) -> None:
    """Refuse a number that is one class in one shard and another class in another one.

    Only the numbers that occur matter. They are read only if the lists of names differ by more than a longer end.
    """
    holding = {shard: schema for shard, schema in schemas.items() if label_column in schema.names}
    named = {shard: _class_names(shard, schema, label_column) for shard, schema in holding.items()}
    longest = max(named.values(), key=len, default=[])
    if all(names == longest[: len(names)] for names in named.values()):
        return
    seen: dict[int, tuple[str, Path]] = {}
    for shard, names in named.items():
        for label in sorted(set(range(len(names))) & set(_values(shard, label_column))):
            name, other = seen.setdefault(label, (names[label], shard))
            if name != names[label]:
                raise UsageError(
                    f"{shard}: {label_column}={label} is {names[label]}, but {name} in {other}; write both shards with "
                    "one list of class names"
                )


def _holds_images(kind: pyarrow.DataType) -> bool:
    import pyarrow.types as types

    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return types.is_binary(kind) or types.is_large_binary(kind)


def _holds_labels(kind: pyarrow.DataType) -> bool:
    import pyarrow.types as types

    if types.is_dictionary(kind):  # for example a pandas categorical
        kind = kind.value_type
    tests = (types.is_integer, types.is_floating, types.is_boolean, types.is_null)
    return any(test(kind) for test in (*tests, types.is_string, types.is_large_string, types.is_string_view))


def _read(
    splits: dict[str, list[Path]], image_column: str, columns: dict[str, str]
) -> tuple[list[str], dict[str, Part]]:
    """Read the labels; return the names of the classes, and the images and labels of each split.

    The classes are the ``ClassLabel`` names, or else the values, of the first split with two or more different labels.

    Args:
        splits: the shards of each split.
        image_column: the images' column in all shards.
        columns: the labels' column of each split.
    """
    values = {
        name: {shard: _values(shard, columns[name]) for shard in shards if columns[name] != NO_LABELS}
        for name, shards in splits.items()
    }
    found = {name: {value for each in shards.values() for value in each} - {None} for name, shards in values.items()}
    telling = {name: each for name, each in found.items() if len(each) > 1}
    first = next(iter(telling), None)
    if first and len(kinds := {type(value).__name__ for value in found[first]}) > 1:
        raise UsageError(
            f"{splits[first][0].parent}: {columns[first]} holds {' and '.join(sorted(kinds))} in one split; give all "
            "labels one type, or set data.label_column to another"
        )
    names = _class_names(splits[first][0], _schema(splits[first][0]), columns[first]) if first else []
    there = sorted(found[first]) if first else []
    known = range(len(names)) if names else there
    index = {value: label for label, value in enumerate(known)}

    def labels(name: str) -> list[int]:
        if name not in telling:
            return [UNLABELLED] * sum(map(_row_count, splits[name]))
        for shard, each in values[name].items():
            if strange := [(row, value) for row, value in enumerate(each) if value not in index]:
                row, value = strange[0]
                what = "no label" if value is None else f"{columns[name]}={value} is none of the {len(index)} classes"
                raise UsageError(
                    f"{shard} row {row}: {what}, while other rows have one; remove or mend the row, or leave out all "
                    "labels with data.label_column=none"
                )
        return [index[value] for each in values[name].values() for value in each]

    parts = {name: Part(labels(name), _ShardImages(shards, image_column)) for name, shards in splits.items()}
    return names or [str(value) for value in known], parts


def _values(shard: Path, column: str) -> list[Any]:
    """The labels of a shard, one for each row; None for a row without a label."""
    import pyarrow.parquet as pq

    with _readable(shard):
        values = pq.read_table(shard, columns=[column])[column].to_pylist()
    return [_label(value, f"{shard} row {row}: {column}") for row, value in enumerate(values)]


def _label(value: Any, where: str) -> Any:
    if isinstance(value, float):
        if value != value:  # NaN, with which pandas marks a missing number
            return None
        if not value.is_integer():
            raise UsageError(f"{where}={value}: a class is no fraction; set data.label_column (none: no labels)")
        value = int(value)
    return None if not isinstance(value, bool) and value == UNLABELLED else value


def _row_count(shard: Path) -> int:
    import pyarrow.parquet as pq

    with _readable(shard):
        return pq.read_metadata(shard).num_rows


def _class_names(shard: Path, schema: pyarrow.Schema, label_column: str) -> list[str]:
    """The class names in the ``ClassLabel`` feature of the schema's metadata; empty if there is none."""
    with _readable(shard):
        names = (_features(schema).get(label_column) or {}).get("names") or []
        if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise ValueError("the class names are no list of texts")
    if doubles := [name for name, times in Counter(names).items() if times > 1]:
        raise UsageError(f"{shard}: two classes are called {doubles[0]!r}; rename one")
    return names


class _ShardImages:
    """The images in some shards, in order, read from the disk at each iteration."""

    def __init__(self, shards: list[Path], column: str) -> None:
        self.shards, self.column = shards, column

    def __iter__(self) -> Iterator[LazyImage]:
        import pyarrow.parquet as pq

        for shard in self.shards:
            row = 0
            with _readable(shard):
                for batch in pq.ParquetFile(shard).iter_batches(ROWS_AT_ONCE, columns=[self.column]):
                    for cell in batch.column(0).to_pylist():
                        encoded = cell["bytes"] if isinstance(cell, dict) else cell
                        yield LazyImage(f"{shard} row {row}", partial(open_bytes, encoded or b""))
                        row += 1
