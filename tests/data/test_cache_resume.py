"""Decoding that is interrupted continues where it stopped, and the cache equals, byte for byte, an unbroken one."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import src.data.cache as cache_module
import src.data.cache_writer as writer_module
from src.data.cache import cached
from src.data.cache_resume import BLOCKS_PER_CORE, Block, Tally, histogram
from src.errors import UsageError
from tests.conftest import PROJECT
from tests.data.layouts import SIZE, random_image, write_folder, write_shard

COUNT = 30


def folder(root: Path) -> Path:
    return write_folder(root, {"train/a": 9, "train/b": 9, "val/a": 2, "val/b": 2, "test/a": 4, "test/b": 4})


def shards(root: Path) -> Path:
    for i, (split, count) in enumerate({"train": 18, "validation": 4, "test": 8}.items()):
        write_shard(root / f"{split}-0.parquet", [0, 1] * (count // 2), seed=i)
    return root


def without_test(root: Path) -> Path:
    return write_folder(root, {"a": 15, "b": 15})


LAYOUTS = {
    "folder": ("image_folder", folder, {}),
    "shards": ("parquet", shards, {}),
    "held": ("image_folder", without_test, {}),
    "whole": ("image_folder", folder, {"keep": SIZE + 1}),
}


@pytest.fixture
def images(config, tmp_path):
    return config("image_folder", folder(tmp_path / "images"))


@pytest.fixture
def decoded(decodings, monkeypatch) -> list[str]:
    """Where each image decoded so far came from; four are decoded at a time, and each is saved at once."""
    monkeypatch.setattr(writer_module, "SAVE_EVERY", 0)
    monkeypatch.setattr(writer_module, "BLOCK", 1)
    monkeypatch.setattr(writer_module, "cores", lambda: 1)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # fsync takes 0.1 s on a busy disk
    return decodings


def unbroken(cfg, tmp_path: Path) -> bytes:
    whole = dataclasses.replace(cfg, cache_dir=str(tmp_path / "unbroken"))
    cached(whole)
    [path] = (tmp_path / "unbroken").glob("*.safetensors")
    return path.read_bytes()


def written(cfg) -> bytes:
    [path] = Path(cfg.cache_dir).glob("*.safetensors")
    return path.read_bytes()


def only(cfg, suffix: str) -> Path:
    [path] = Path(cfg.cache_dir).glob(f"*{suffix}")
    return path


def suffixes(cfg) -> set[str]:
    return {path.suffix for path in Path(cfg.cache_dir).iterdir()}


def interrupt(cfg, monkeypatch, place: int) -> None:
    """Interrupt the decoding when it comes to the image at this place, counted from 0."""
    stream = writer_module._decoded

    def interrupted(*args):
        for i, each in enumerate(stream(*args), args[-1]):
            if i == place:
                raise KeyboardInterrupt
            yield each

    with monkeypatch.context() as patch:
        patch.setattr(writer_module, "_decoded", interrupted)
        patch.setattr(writer_module, "BLOCK", 1)
        with pytest.raises(KeyboardInterrupt):
            cached(cfg)


KILLED = """
import json, os, signal, sys
import src.data.cache_writer as writer
from src.data.cache import cached
from src.config.schema import Data

write, saved = writer.save, []

def save(*args):
    write(*args)
    saved.append(args)
    if len(saved) == 17:
        os.kill(os.getpid(), signal.SIGKILL)

writer.save, writer.SAVE_EVERY, writer.BLOCK, writer.cores = save, 0, 1, lambda: 1
cached(Data(**json.loads(sys.argv[1])))
"""


def test_decoding_continues_after_the_images_that_a_killed_process_saved(images, tmp_path, decoded):
    killed = subprocess.run([sys.executable, "-c", KILLED, json.dumps(dataclasses.asdict(images))], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert suffixes(images) == {".lock", ".partial", ".saved"}
    cached(images)
    assert len(decoded) == COUNT - 17
    assert written(images) == unbroken(images, tmp_path)
    assert suffixes(images) == {".lock", ".safetensors", ".verified"}


SLOW = """
import time
import src.data.cache_writer as writer
from src.data.cache import cached

write, writer.SAVE_EVERY = writer.save, 0

def save(*args):
    write(*args)
    time.sleep(600)

writer.save = save
"""


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_decodes_goes_on_when_it_is_typed_again(config, command, tmp_path, small):
    root = write_folder(tmp_path / "photos", {"a": 16, "b": 16}, ".jpg")
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow/sitecustomize.py").write_text(SLOW)
    images = [
        "data=image_folder",
        f"data.root={root}",
        f"data.cache_dir={tmp_path}/cache",
        "data.limit=null",
        "data.image_size=32",
    ]
    typed = ["src.train", *small, *images, "epochs=1", "k=2", "batch_size=8", "tracking=jsonl"]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path / 'slow'}{os.pathsep}{PROJECT}", "OMP_NUM_THREADS": "1"}
    slow = {"cwd": tmp_path, "env": environment, "stderr": subprocess.PIPE, "text": True}

    cfg = config("image_folder", root, image_size=32, background="white")
    killed = subprocess.Popen([sys.executable, "-m", *typed], **slow)
    while not (saved := list(Path(cfg.cache_dir).glob("*.saved"))) and killed.poll() is None:
        time.sleep(0.01)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL, killed.communicate()[1]
    done = int(saved[0].read_text().split()[0])
    assert 0 < done < 32
    again = command(*typed)
    assert again.returncode == 0, again.stderr
    assert "INFO: decoding 32 images of data.root=" in again.stderr
    assert f"checking {done} images that an earlier process decoded, to go on after them" in again.stderr
    assert written(cfg) == unbroken(cfg, tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("places", [(1,), (17,), (18,), (19, 23), (22, 29), (29, 29)])
def test_wherever_it_is_interrupted_no_image_is_decoded_again(config, tmp_path, monkeypatch, decoded, layout, places):
    name, write, options = LAYOUTS[layout]
    cfg = config(name, write(tmp_path / "images"), **options)
    for place in places:
        interrupt(cfg, monkeypatch, place)
    decoded.clear()
    cached(cfg)
    assert len(decoded) == COUNT - places[-1]
    assert written(cfg) == unbroken(cfg, tmp_path)


def test_a_process_that_ends_before_anything_is_saved_leaves_nothing(images, monkeypatch):
    interrupt(images, monkeypatch, 20)
    assert suffixes(images) == {".lock"}


def flip_a_pixel(partial: Path, saved: Path) -> None:
    content = bytearray(partial.read_bytes())
    content[-20 * 3 * SIZE**2] ^= 1
    partial.write_bytes(content)


def cut_the_images(partial: Path, saved: Path) -> None:
    partial.write_bytes(partial.read_bytes()[:-1])


def remove_the_images(partial: Path, saved: Path) -> None:
    partial.unlink()


def count_less(partial: Path, saved: Path) -> None:
    saved.write_text(saved.read_text().replace("20 ", "19 ", 1))


def count_more(partial: Path, saved: Path) -> None:
    saved.write_text(saved.read_text().replace("20 ", "999999999999 ", 1))


def empty_the_line(partial: Path, saved: Path) -> None:
    saved.write_text("")


def garble_the_line(partial: Path, saved: Path) -> None:
    saved.write_bytes(b"\xff\xfe")


def remove_the_line(partial: Path, saved: Path) -> None:
    saved.unlink()


@pytest.mark.parametrize(
    "damage",
    [
        *(flip_a_pixel, cut_the_images, remove_the_images, count_less, count_more),
        *(empty_the_line, garble_the_line, remove_the_line),
    ],
)
def test_what_is_damaged_is_decoded_from_the_start(images, tmp_path, monkeypatch, decoded, damage):
    interrupt(images, monkeypatch, 20)
    damage(only(images, ".partial"), only(images, ".saved"))
    decoded.clear()
    cached(images)
    assert len(decoded) == COUNT
    assert written(images) == unbroken(images, tmp_path)


def test_damaged_aspects_are_read_from_the_images_again(images, tmp_path, monkeypatch, decoded):
    images = dataclasses.replace(images, keep=SIZE)
    interrupt(images, monkeypatch, 20)
    partial = only(images, ".partial")
    content = bytearray(partial.read_bytes())
    content[-20 * 3 * SIZE**2 - 4 * COUNT] ^= 1  # the first image's aspect
    partial.write_bytes(content)
    decoded.clear()
    cached(images)
    assert len(decoded) == COUNT
    assert written(images) == unbroken(images, tmp_path)


def test_what_is_longer_than_was_saved_is_cut(images, tmp_path, monkeypatch, decoded):
    """Bytes that were written after the last save are dropped."""
    interrupt(images, monkeypatch, 20)
    with only(images, ".partial").open("ab") as file:
        file.write(b"x" * 40_000)
    decoded.clear()
    cached(images)
    assert len(decoded) == COUNT - 20
    assert written(images) == unbroken(images, tmp_path)


def test_images_of_another_choice_are_not_gone_on_with(images, monkeypatch, decoded, caplog):
    """The files have not changed, but this time one of them cannot be read at first, and is left out."""
    interrupt(images, monkeypatch, 20)
    decode, unread = writer_module.decode, []

    def failing_once(picture, *options):
        if picture.where.endswith("train/a/0.png") and not unread:
            unread.append(picture)
            raise UsageError(f"{picture.where}: Input/output error")
        return decode(picture, *options)

    monkeypatch.setattr(writer_module, "decode", failing_once)
    decoded.clear()
    opened = cached(dataclasses.replace(images, on_error="skip"))
    assert len(opened.skipped) == 1
    assert len(decoded) == (COUNT - 1) + (COUNT - 1)  # once to find images that cannot be read, once for the cache
    assert "holds other images: decoding from the start" in caplog.text
    first = np.asarray(random_image(2)).transpose(2, 0, 1)
    assert np.array_equal(opened.part("train").images[0], first)


def change_an_image(images, monkeypatch) -> None:
    random_image(99).save(Path(images.root) / "train/a/0.png")


def change_the_format(images, monkeypatch) -> None:
    monkeypatch.setattr(cache_module, "FORMAT", cache_module.FORMAT + 1)


@pytest.mark.parametrize("change", [change_an_image, change_the_format])
def test_another_state_and_another_format_are_decoded_from_the_start(images, tmp_path, monkeypatch, decoded, change):
    interrupt(images, monkeypatch, 20)
    before = only(images, ".partial")
    change(images, monkeypatch)
    decoded.clear()
    interrupt(images, monkeypatch, 5)
    assert only(images, ".partial") != before, "the old one does not take the room of the new one"
    cached(images)
    assert len(set(decoded)) == COUNT
    assert written(images) == unbroken(images, tmp_path)
    assert suffixes(images) == {".lock", ".safetensors", ".verified"}


def test_only_the_room_that_is_still_needed_is_asked_for(images, monkeypatch, decoded):
    interrupt(images, monkeypatch, 20)
    for_ten = SimpleNamespace(free=10 * 3 * SIZE**2)
    monkeypatch.setattr(writer_module.shutil, "disk_usage", lambda folder: for_ten)
    cached(images)


def test_a_disk_that_fills_up_later_is_not_kept_full(images, monkeypatch, decoded):
    """The unfinished cache is removed."""
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError, match="No space left on device; make room"):
        cached(images)
    assert decoded
    assert suffixes(images) == {".lock"}


def test_decoding_goes_on_while_the_disk_is_slow(images, monkeypatch, decoded):
    """While the first image is being synced to the disk, more are decoded than may wait to be written."""
    by_then: list[int] = []

    def slow(descriptor):
        end = time.monotonic() + 100
        while not by_then and len(decoded) <= BLOCKS_PER_CORE and time.monotonic() < end:
            time.sleep(0.001)
        by_then.append(len(decoded))

    monkeypatch.setattr(os, "fsync", slow)
    cached(images)
    assert by_then[0] > BLOCKS_PER_CORE


def test_images_are_on_the_disk_before_they_are_counted(images, monkeypatch, decoded):
    synced: list[str] = []
    fsync = os.fsync

    def noting(descriptor):
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).suffix)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noting)
    interrupt(images, monkeypatch, 3)
    assert [suffix for suffix in synced if suffix] == [".partial", ".tmp"] * 3


def test_where_there_is_no_terminal_lines_say_how_far_it_is(images, decoded, caplog):
    with caplog.at_level("INFO"):
        cached(images)
    assert "20 of 30 images, " in caplog.text
    assert " images/s, less than a minute left" in caplog.text


def test_the_line_tells_images_their_order_and_whose_they_are_apart():
    """The line that describes saved images depends on the images, their order, the header and the source."""
    one, other = (np.asarray(random_image(seed)).transpose(2, 0, 1)[None].copy() for seed in (1, 2))

    def line(images, header=b"header", about=b"about") -> str:
        tally = Tally(header, about, 1)
        for image in images:
            tally.add(Block(image, histogram(image), np.ones(1, np.float32)))
        return tally.line

    lines = [line([]), line([one]), line([other]), line([one, other]), line([other, one])]
    lines += [line([one], header=b"another"), line([one], about=b"another")]
    assert len(set(lines)) == len(lines)
    assert line([one, other]) == line([one, other])


def test_a_histogram_counts_each_level_of_each_channel():
    images = np.zeros((2, 3, 4, 4), np.uint8)
    images[0, 1, 0] = 255
    images[1, 2] = 7
    levels = histogram(images)
    assert levels.shape == (3, 256)
    assert levels[0, 0] == 32
    assert (levels[1, 0], levels[1, 255]) == (28, 4)
    assert (levels[2, 0], levels[2, 7]) == (16, 16)
    assert levels.sum() == images.size
