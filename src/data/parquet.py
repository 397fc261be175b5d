"""Image data sets in the parquet layout of the Hugging Face hub: shards whose names start with the split's name.

An image is an encoded file, either a binary cell or a struct with a field ``bytes``; a label is an integer or a string.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from src.data.decoding import Contents, Part, Picture, Source, open_bytes, stamp
from src.data.folders import files_below
from src.errors import UsageError

if TYPE_CHECKING:
    import pyarrow

ROWS_AT_ONCE = 256  # bounds memory: a shard holds many thousand encoded images


def parquet(root: Path, image_column: str, label_column: str) -> Source:
    """The shards ``train-*`` and ``test-*`` (else ``validation-*`` or ``valid-*``) at any depth below ``root``.

    Raises:
        UsageError: If a split has no shards, a shard cannot be read, or a column is absent or of another type.
    """
    shards = [Path(path) for path in files_below(root, set()) if path.endswith(".parquet")]
    train, *tests = (
        sorted(shard for shard in shards if shard.name.startswith(f"{split}-"))
        for split in ("train", "test", "validation", "valid")
    )
    test = next(filter(None, tests), [])
    if not train:
        raise UsageError(f"data.root={root}: no shards train-*.parquet in or below that folder")
    if not test:
        raise UsageError(f"data.root={root}: no test split; add test-*.parquet or validation-*.parquet")
    for shard in train + test:
        _check_columns(shard, image_column, label_column)
    read = partial(_read, train, test, image_column, label_column)
    return Source(f"{image_column} {label_column}\n{stamp(train + test)}", read)


@contextmanager
def _readable(shard: Path) -> Iterator[None]:
    """Turns whatever pyarrow raises on a damaged file, which is many things, into one line."""
    try:
        if not shard.is_file():  # a pipe would be waited for
            raise UsageError(f"{shard}: not a regular file; remove it")
        yield
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(
            f"{shard}: not a readable parquet file (cut short, or a pointer to one?); fetch it again"
        ) from error


def _check_columns(shard: Path, image_column: str, label_column: str) -> None:
    import pyarrow.parquet as pq
    import pyarrow.types as types

    with _readable(shard):
        schema = pq.read_schema(shard)
    for column in (image_column, label_column):
        if column not in schema.names:
            raise UsageError(
                f"{shard}: no column {column}; it has {', '.join(schema.names)}: "
                "use data=parquet with data.image_column and data.label_column"
            )
    image, label = schema.field(image_column).type, schema.field(label_column).type
    if types.is_struct(image) and image.get_field_index("bytes") >= 0:
        image = image.field("bytes").type
    if not (types.is_binary(image) or types.is_large_binary(image)):
        raise UsageError(f"{shard}: column {image_column} holds {image}, not encoded images; set data.image_column")
    if not (types.is_integer(label) or types.is_string(label) or types.is_large_string(label)):
        raise UsageError(
            f"{shard}: column {label_column} holds {label}, not integers or strings; set data.label_column"
        )


def _read(train: list[Path], test: list[Path], image_column: str, label_column: str) -> Contents:
    import pyarrow.parquet as pq

    with _readable(train[0]):
        names = _class_names(pq.read_schema(train[0]), label_column)
    if doubles := [name for name, times in Counter(names).items() if times > 1]:
        raise UsageError(f"{train[0]}: two classes are called {doubles[0]!r}; rename one")
    values = {}
    for shard in train + test:
        with _readable(shard):
            values[shard] = pq.read_table(shard, columns=[label_column])[label_column].to_pylist()
    known = range(len(names)) if names else sorted({value for shard in train for value in values[shard]} - {None})
    index = {value: label for label, value in enumerate(known)}

    def part(shards: list[Path]) -> Part:
        for shard in shards:
            if strange := [(row, value) for row, value in enumerate(values[shard]) if value not in index]:
                row, value = strange[0]
                raise UsageError(
                    f"{shard} row {row}: {label_column}={value} is none of the {len(index)} training classes"
                )
        return Part([index[value] for shard in shards for value in values[shard]], _pictures(shards, image_column))

    return Contents(names or [str(value) for value in known], part(train), part(test))


def _class_names(schema: pyarrow.Schema, label_column: str) -> list[str]:
    """Names that the hub's ``ClassLabel`` feature keeps in the schema's metadata; empty without it."""
    written = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    names = written.get("info", {}).get("features", {}).get(label_column, {}).get("names") or []
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError("the class names are no list of texts")
    return names


def _pictures(shards: list[Path], column: str) -> Iterator[Picture]:
    import pyarrow.parquet as pq

    for shard in shards:
        row = 0
        with _readable(shard):
            for batch in pq.ParquetFile(shard).iter_batches(ROWS_AT_ONCE, columns=[column]):
                for cell in batch.column(0).to_pylist():
                    encoded = cell["bytes"] if isinstance(cell, dict) else cell
                    yield Picture(f"{shard} row {row}", partial(open_bytes, encoded or b""))
                    row += 1
