"""Mutations that make a file hostile: truncated, with changed bits or values, or replaced by something not a file."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

Mutation = tuple[str, Callable[[Path], object]]  # a description, and the function that changes the file at a path

PLACES = 12  # random places for each kind of mutation that has one
DEEP = 100_000  # levels of nesting, more than any recursion limit
VALUES: dict[str, Any] = {
    **{"null": None, "true": True, "a list": [], "a dict": {}, "lists in lists": [[["x"]]], "empty text": ""},
    **{"a negative number": -1, "a huge number": 10**400, "an infinity": float("inf"), "not a number": float("nan")},
    **{
        "a fraction": 0.5,
        "text": "é\U0001f600",
        "a NUL": "a\0b",
        "half a character": "\ud800",
        "long text": "x" * 10**6,
    },
    **{"a path outwards": "../../outside/private.txt", "an absolute path": "/etc/hostname", "lines": "a\nb\r\nc"},
    **{"an interpolation": "${oc.env:HOME}", "a template": "{0.__class__}", "a number as text": "1e400"},
}


def of_kind(outside: Path) -> Iterator[Mutation]:
    """Replace the file by something else, such as a folder, a FIFO or a link to ``outside``, which must not change."""

    def replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
        def change(path: Path) -> None:
            path.unlink()
            make(path)

        return change

    def bound(path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as one:
            here = Path.cwd()
            os.chdir(path.parent)  # for a short name: the path of a socket may have only 108 bytes
            one.bind(path.name)
            os.chdir(here)

    def filled(path: Path) -> None:
        path.mkdir()
        (path / "inner").write_text("x")

    yield "missing", Path.unlink
    yield "a folder", replaced(Path.mkdir)
    yield "a folder with a file", replaced(filled)
    yield "a FIFO", replaced(os.mkfifo)
    yield "a socket", replaced(bound)
    yield "a link to a file outside", replaced(lambda path: path.symlink_to(outside))
    yield "a link to itself", replaced(lambda path: path.symlink_to(path.name))
    yield "a link to nothing", replaced(lambda path: path.symlink_to(outside.parent / "nothing"))
    yield "a link to an endless device", replaced(lambda path: path.symlink_to("/dev/zero"))
    yield "a link to a folder outside", replaced(lambda path: path.symlink_to(outside.parent))


def of_bytes(rng: random.Random) -> Iterator[Mutation]:
    """Truncate the file, change bits or replace the content; `PLACES` times for each kind with a random place."""

    def written(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
        return lambda path: path.write_bytes(change(path.read_bytes()))

    def cut(place: float, data: bytes) -> bytes:
        return data[: int(place * len(data))]

    def flipped(place: float, bit: int, data: bytes) -> bytes:
        at = int(place * len(data))
        return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]

    def zeroed(place: float, data: bytes) -> bytes:
        return cut(place, data).ljust(len(data), b"\0")

    whole: dict[str, Callable[[bytes], bytes]] = {
        **{"empty": lambda _: b"", "a NUL": lambda _: b"\0", "all NUL": lambda data: bytes(len(data))},
        **{
            "UTF-16": lambda data: data.decode("latin-1").encode("utf-16"),
            "a BOM": lambda data: b"\xef\xbb\xbf" + data,
        },
        **{"not UTF-8": lambda data: data + b"\xff\xfe", "twice": lambda data: data + data, "noise": rng_bytes(rng)},
        **{"Windows' lines": lambda data: data.replace(b"\n", b"\r\n"), "reversed": lambda data: data[::-1]},
        **{"deep lists": lambda _: b"[" * DEEP, "deep dicts": lambda _: b'{"a":' * DEEP, "a number": lambda _: b"7"},
        **{
            "null": lambda _: b"null",
            "a list": lambda _: b"[]",
            "a dict": lambda _: b"{}",
            "text": lambda _: b"hello\n",
        },
        **{"a million digits": lambda _: b"9" * 10**6, "a megabyte more": lambda data: data + b"x" * 10**6},
    }
    for what, change in whole.items():
        yield what, written(change)
    for _ in range(PLACES):
        place, bit = rng.random(), rng.randrange(8)
        yield f"cut at {place:.3f}", written(partial(cut, place))
        yield f"bit {bit} at {place:.3f}", written(partial(flipped, place, bit))
        yield f"NULs from {place:.3f} on", written(partial(zeroed, place))


def rng_bytes(rng: random.Random) -> Callable[[bytes], bytes]:
    noise = rng.randbytes(4096)
    return lambda _: noise


def of_json(text: bytes) -> Iterator[Mutation]:
    """Leave out each entry of a JSON file or replace it by each of `VALUES`; in a JSONL file only in the last line."""
    *_, last = text.splitlines() if text.count(b"\n{") else [text]

    def changed(place: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Callable[[Path], None]:
        def apply(path: Path) -> None:
            content = json.loads(last)
            inner = content
            for key in place[:-1]:
                inner = inner[key]
            change(inner, place[-1])
            path.write_bytes(path.read_bytes().replace(last, json.dumps(content).encode()))

        return apply

    for place in _places(json.loads(last)):
        name = ".".join(map(str, place))
        yield f"{name} left out", changed(place, lambda inner, key: inner.pop(key))
        for what, value in VALUES.items():
            yield f"{name} is {what}", changed(place, partial(_put, value))


def of_state() -> Iterator[Mutation]:
    """Leave out or replace each entry of a checkpoint, and make its SHA-256 valid again."""

    def signed(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
        def apply(path: Path) -> None:
            state = torch.load(io.BytesIO(path.read_bytes()[:-32]), weights_only=True)
            change(state)
            buffer = io.BytesIO()
            torch.save(state, buffer)
            path.write_bytes(buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest())

        return apply

    def nested() -> list[Any]:
        inner: list[Any] = []
        for _ in range(200):
            inner = [inner]
        return inner

    keys = [*("config", "mean", "std", "model", "classifier", "optimizer", "classifier_optimizer")]
    keys += ["seconds", "rows", "served", "step", "format"]
    values = VALUES | {"a tensor": torch.zeros(3), "NaNs": torch.full((2, 2), torch.nan), "deep lists": nested()}
    for key in keys:
        yield f"{key} left out", signed(partial(_without, key))
        for what, value in values.items():
            yield (
                f"{key} is {what}",
                signed(partial(_with, key, value)),
            )


def _without(key: str, state: dict[str, Any]) -> None:
    del state[key]


def _with(key: str, value: Any, state: dict[str, Any]) -> None:
    state[key] = value


def _put(value: Any, inner: Any, key: Any) -> None:
    inner[key] = value


def _places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every entry; in nested values, whose entries are many and alike, only of the first three."""
    if place:
        yield place
    if isinstance(value, dict | list):
        entries = list(value.items() if isinstance(value, dict) else enumerate(value))
        for key, inner in entries[:3] if place else entries:
            yield from _places(inner, (*place, key))
