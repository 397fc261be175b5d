import multiprocessing
import os
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from filelock import FileLock
from PIL import Image

import src.data.cache as cache_module
import src.data.cache_writer as writer_module
from src.data import load
from src.data.cache import Cache, cached, known_fingerprint
from src.data.cache_resume import BLOCK, BLOCKS_PER_CORE
from src.errors import UsageError
from tests.data.layouts import pixels, random_image, write_folder, write_shard


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_folder(tmp_path / "images", {"train/a": 5, "train/b": 4, "test/a": 2, "test/b": 1})


def files(cfg) -> list[Path]:
    return sorted(Path(cfg.cache_dir).glob("*.safetensors"))


def leftovers(cfg) -> list[str]:
    return [
        path.name for path in Path(cfg.cache_dir).iterdir() if path.suffix not in (".safetensors", ".lock", ".verified")
    ]


def test_the_whole_file_is_on_the_disk_before_it_has_its_name(config, folder, monkeypatch):
    cfg, synced, fsync = config("image_folder", folder), [], os.fsync

    def sync(descriptor):
        synced.append((os.fstat(descriptor).st_ino, bool(files(cfg))))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    cached(cfg)
    assert (files(cfg)[0].stat().st_ino, False) in synced


def test_the_file_is_what_safetensors_itself_would_read_and_write(config, folder):
    cfg = config("image_folder", folder, image_size=7)  # 7x7x3 bytes an image: sizes that are no multiple of 8
    opened = cached(cfg)
    tensors = safetensors.torch.load_file(files(cfg)[0])
    parts = ("train", "test", "probe")
    assert set(tensors) == {"mean", "std"} | {f"{part}_{what}" for part in parts for what in ("images", "labels")}
    for part in parts:
        assert torch.equal(tensors[f"{part}_images"], opened.part(part).images)
        assert torch.equal(tensors[f"{part}_labels"], opened.part(part).labels)
    reread = safetensors.torch.load(safetensors.torch.save(tensors))
    assert all(torch.equal(reread[name], tensor) for name, tensor in tensors.items())


def test_a_file_keeps_its_name_when_settings_are_added(config):
    """The name must stay, so that later versions still find a cache that took an hour to decode."""
    cfg = config("digits")
    cached(cfg)
    [path] = files(cfg)
    assert path.name.startswith("digits-a6ff28f7d651-")


def test_a_constant_channel_has_a_standard_deviation_of_1(config, folder):
    for path in folder.rglob("*.png"):
        red, green, blue = Image.open(path).split()
        Image.merge("RGB", (red, green, blue.point(lambda _: 77))).save(path)
    opened = cached(config("image_folder", folder))
    assert opened.std[2] == 1
    assert opened.mean[2] == pytest.approx(77 / 255)


def test_mean_and_std_are_those_of_the_training_pixels_by_exact_integer_sums(config, tmp_path):
    images = pixels(write_shard(tmp_path / "train-0.parquet", [0, 1] * 50))
    write_shard(tmp_path / "test-0.parquet", [0, 1], seed=1)
    opened = cached(config("parquet", tmp_path))
    count = images.size // 3
    mean = images.sum((0, 2, 3), dtype=np.int64) / count
    std = np.sqrt(np.square(images, dtype=np.int64).sum((0, 2, 3)) / count - mean**2)
    assert opened.mean == (mean / 255).tolist() == pytest.approx((images / 255).mean((0, 2, 3)), rel=1e-12)
    assert opened.std == (std / 255).tolist() == pytest.approx((images / 255).std((0, 2, 3)), rel=1e-12)


def test_few_pictures_are_in_memory_at_once(config, tmp_path, monkeypatch):
    """However large the data set is, decoding is only a few blocks ahead of writing."""
    folder = write_folder(tmp_path / "images", {"a": 100, "b": 100})
    monkeypatch.setattr(writer_module, "cores", lambda: 1)
    begun: list[str] = []
    written: list[int] = []
    decode, stream = writer_module.decode, writer_module._decoded

    def counting(picture, *options):
        begun.append(picture.where)
        return decode(picture, *options)

    def following(*args):
        for block in stream(*args):
            written.extend([len(begun)] * len(block.images))
            yield block

    monkeypatch.setattr(writer_module, "decode", counting)
    monkeypatch.setattr(writer_module, "_decoded", following)
    cached(config("image_folder", folder))
    assert len(written) == 200
    assert max(ahead - place for place, ahead in enumerate(written)) <= BLOCKS_PER_CORE * BLOCK


def test_the_room_that_is_needed_is_said_before_decoding(config, folder, caplog, monkeypatch):
    def never(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(writer_module, "decode", never)
    monkeypatch.setattr(writer_module.shutil, "disk_usage", lambda folder: SimpleNamespace(free=7 * 10**9))
    with caplog.at_level("INFO"), pytest.raises(KeyboardInterrupt):
        cached(config("image_folder", folder))
    assert "decoding 12 images" in caplog.text
    assert "2.3 kB needed, 7.0 GB free" in caplog.text


def test_writing_into_the_images_does_not_reach_the_file(config, folder):
    cfg = config("image_folder", folder)
    before = cached(cfg).part("train").images.clone()
    cached(cfg).part("train").images.fill_(7)
    assert torch.equal(cached(cfg).part("train").images, before)


@pytest.mark.parametrize(("terminal", "is_logged"), [("xterm", False), ("dumb", True)])
def test_a_terminal_that_shows_no_bar_gets_lines(config, folder, caplog, monkeypatch, terminal, is_logged):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # for rich: standard error is a terminal
    monkeypatch.setenv("TERM", terminal)
    monkeypatch.setattr(writer_module, "SAVE_EVERY", 0)
    caplog.set_level("INFO", "src")
    load(config("image_folder", folder))
    assert (" of 12 images, " in caplog.text) == is_logged


def test_the_second_load_decodes_nothing(config, folder, decodings):
    cfg = config("image_folder", folder)
    first = load(cfg)
    assert len(decodings) == 12
    second = load(config("image_folder", folder, split_seed=3, limit=4))  # splitting is not part of the cache
    assert len(decodings) == 12
    assert torch.equal(first.test.images, second.test.images)
    assert (first.classes, first.mean, first.std) == (second.classes, second.mean, second.std)


def change_an_image(folder: Path) -> None:
    random_image(99).save(folder / "train/a/0.png")


def add_an_image(folder: Path) -> None:
    random_image(99).save(folder / "train/b/new.png")


def remove_an_image(folder: Path) -> None:
    (folder / "test/a/0.png").unlink()


def rename_an_image(folder: Path) -> None:
    (folder / "train/a/0.png").rename(folder / "train/b/moved.png")


def touch_an_image(folder: Path) -> None:
    os.utime(folder / "train/a/0.png", (0, 0))


@pytest.mark.parametrize("change", [change_an_image, add_an_image, remove_an_image, rename_an_image, touch_an_image])
def test_a_changed_source_replaces_its_cache(config, folder, change):
    cfg = config("image_folder", folder)
    cached(cfg)
    [before] = files(cfg)
    change(folder)
    images = cached(cfg).part("train").images
    [after] = files(cfg)
    assert after != before
    on_disk = [path for name in ("a", "b") for path in sorted((folder / "train" / name).iterdir())]
    assert np.array_equal(images, pixels([Image.open(path) for path in on_disk]))


def test_other_sources_and_sizes_keep_their_caches(config, folder, tmp_path):
    cfg = config("image_folder", folder)
    cached(cfg)
    other = write_folder(tmp_path / "other", {"a": 5, "b": 5})
    for neighbour in (config("image_folder", folder, image_size=4), config("image_folder", other), config("digits")):
        cached(neighbour)
    assert len(files(cfg)) == 4
    add_an_image(folder)
    cached(cfg)
    assert len(files(cfg)) == 4


def test_the_second_start_reads_neither_the_whole_cache_nor_trusts_another(config, folder, decodings, monkeypatch):
    """A checksum is compared only where the file is not the one that was checked, even if size and time are equal."""
    cfg = config("image_folder", folder)
    checked: list[Path] = []
    checksum = cache_module.checksum
    for module in (cache_module, writer_module):
        monkeypatch.setattr(module, "checksum", lambda path, stated: checked.append(path) or checksum(path, stated))
    whole = cached(cfg).part("train").images.clone()
    assert [path.suffix for path in checked] == [".partial"], "the first start reads it once, to make the checksum"
    checked.clear()
    cached(cfg)
    assert checked == []
    [path] = files(cfg)
    state = path.stat()
    content = bytearray(path.read_bytes())
    content[-300] ^= 1
    path.unlink()
    path.write_bytes(content)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))  # size and time are those of the undamaged file
    decodings.clear()
    assert torch.equal(cached(cfg).part("train").images, whole)
    assert len(decodings) == 12
    assert checked[0] == path


class TestManyFiles:
    """For very many files, only the times of their folders are checked; in these tests, 12 files are many."""

    @pytest.fixture
    def looked_at(self, folder, monkeypatch) -> list[str]:
        """The root of each listing, in order; files and folders are made old, because new ones are listed again."""
        monkeypatch.setattr("src.data.folders.MANY", 12)
        self.age(folder)
        listed: list[str] = []
        find = cache_module.find
        monkeypatch.setattr(cache_module, "find", lambda cfg: listed.append(cfg.root) or find(cfg))
        return listed

    def age(self, folder: Path) -> None:
        for each in (folder, *folder.rglob("*")):
            os.utime(each, (1e9, 1e9))

    def test_an_unchanged_folder_is_not_listed_again(self, config, folder, looked_at):
        cfg = config("image_folder", folder)
        first = cached(cfg).fingerprint
        assert len(looked_at) == 1
        assert cached(cfg).fingerprint == known_fingerprint(cfg) == first
        assert len(looked_at) == 1

    def test_what_an_older_version_has_listed_is_listed_again(self, config, folder, looked_at, monkeypatch):
        """It may have taken other files for images, or other images for the test."""
        cfg = config("image_folder", folder)
        with monkeypatch.context() as older:
            older.setattr(cache_module, "LISTING", 1)
            cached(cfg)
        assert len(looked_at) == 1
        cached(cfg)
        assert len(looked_at) == 2

    @pytest.mark.parametrize("change", [add_an_image, remove_an_image, rename_an_image])
    def test_a_changed_folder_is(self, config, folder, looked_at, change):
        """A changed folder is listed again and has another fingerprint."""
        cfg = config("image_folder", folder)
        first = cached(cfg).fingerprint
        change(folder)
        assert known_fingerprint(cfg) is None
        assert cached(cfg).fingerprint != first

    def test_a_folder_that_has_just_been_changed_is_listed_again(self, config, folder, looked_at):
        os.utime(folder / "train" / "a", (time.time() + 60,) * 2)
        cfg = config("image_folder", folder)
        cached(cfg)
        cached(cfg)
        assert len(looked_at) == 2

    def test_a_damaged_cache_is_made_anew(self, config, folder, looked_at):
        cfg = config("image_folder", folder)
        whole = cached(cfg).part("train").images.clone()
        [path] = files(cfg)
        path.write_bytes(path.read_bytes()[:-1])
        assert torch.equal(cached(cfg).part("train").images, whole)

    def test_a_cache_of_another_format_is_made_anew(self, config, folder, looked_at, monkeypatch):
        cfg = config("image_folder", folder)
        cached(cfg)
        before = files(cfg)
        monkeypatch.setattr(cache_module, "FORMAT", cache_module.FORMAT + 1)
        assert known_fingerprint(cfg) is None
        cached(cfg)
        assert files(cfg) != before

    def test_few_files_are_each_looked_at(self, config, folder):
        self.age(folder)
        cfg = config("image_folder", folder)
        cached(cfg)
        assert not list(Path(cfg.cache_dir).glob("*.folders"))


class TestManyShards:
    """Very many shards are checked but not opened until one has changed; in these tests, 3 shards are many."""

    @pytest.fixture
    def shards(self, tmp_path) -> Path:
        for name, seed in (("train-0", 0), ("train-1", 1), ("data/test-0", 2)):
            write_shard(tmp_path / "shards" / f"{name}.parquet", [0, 1] * 4, seed=seed)
        for each in (tmp_path / "shards", *(tmp_path / "shards").rglob("*")):
            os.utime(each, (1e9, 1e9))
        return tmp_path / "shards"

    @pytest.fixture(autouse=True)
    def opened(self, monkeypatch) -> list[Path]:
        monkeypatch.setattr("src.data.parquet.MANY", 3)
        opened: list[Path] = []
        real = pq.read_schema
        monkeypatch.setattr(pq, "read_schema", lambda path: opened.append(path) or real(path))
        return opened

    def test_unchanged_shards_are_not_opened_again(self, config, shards, opened):
        cfg = config("parquet", shards)
        first = cached(cfg).fingerprint
        assert set(opened) == set(shards.rglob("*.parquet"))
        opened.clear()
        assert cached(cfg).fingerprint == known_fingerprint(cfg) == first
        assert opened == []

    @pytest.mark.parametrize("change", ["overwritten", "as before", "added", "removed", "renamed"])
    def test_a_change_of_any_is_noticed(self, config, shards, change):
        """A change of any shard changes the fingerprint, also if the shard keeps its modification time."""
        cfg = config("parquet", shards)
        first = cached(cfg).fingerprint
        shard = shards / "train-1.parquet"
        before = shard.stat()
        if change in ("overwritten", "as before"):
            write_shard(shard, [1, 0] * 4, seed=9)
        elif change == "added":
            write_shard(shards / "data" / "train-2.parquet", [0, 1], seed=9)
        elif change == "removed":
            shard.unlink()
        else:
            shard.rename(shards / "test-1.parquet")
        if change == "as before":
            os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert known_fingerprint(cfg) is None
        assert cached(cfg).fingerprint != first

    def test_few_shards_are_each_opened(self, config, shards, opened, monkeypatch):
        monkeypatch.setattr("src.data.parquet.MANY", 4)
        for _ in range(2):
            opened.clear()
            cached(config("parquet", shards))
            assert len(set(opened)) == 3


def test_more_damaged_images_than_a_header_has_room_for_are_refused_before_others_are_tried(
    config, folder, decodings, monkeypatch
):
    monkeypatch.setattr(writer_module, "cores", lambda: 1)
    monkeypatch.setattr(writer_module, "BLOCKS_PER_CORE", 1)
    cfg = config("image_folder", folder, on_error="skip")
    damaged = [folder / f"train/a/{i}{name}.png" for i in range(2) for name in ('"odd\\', "é")]
    for path in damaged:
        path.write_text("no image")
    cached(cfg)
    [path] = files(cfg)
    length = int.from_bytes(path.read_bytes()[:8], "little")  # bytes of the header
    decodings.clear()

    path.unlink()
    monkeypatch.setattr(writer_module, "MAX_HEADER", length - 1)
    with pytest.raises(UsageError, match=r"data\.on_error=skip: 4 images .*; remove them, first .*/a/0") as caught:
        cached(cfg)
    assert "\n" not in str(caught.value)
    assert len(decodings) == 6, "the last of the damaged images is the sixth of 16"
    assert leftovers(cfg) == files(cfg) == []

    monkeypatch.setattr(writer_module, "MAX_HEADER", length + 50)
    assert len(cached(cfg).skipped) == 4


@pytest.mark.parametrize("keep", [0, 5, 100, -1, "garbled"])
def test_a_cache_that_is_cut_or_garbled_is_made_anew(config, folder, decodings, keep):
    cfg = config("image_folder", folder)
    whole = cached(cfg).part("train").images.clone()
    [path] = files(cfg)
    path.write_bytes(b"\xff" * path.stat().st_size if keep == "garbled" else path.read_bytes()[:keep])
    decodings.clear()
    assert torch.equal(cached(cfg).part("train").images, whole)
    assert len(decodings) == 12


def test_a_failed_decoding_leaves_nothing_and_the_old_cache_alone(config, folder):
    cfg = config("image_folder", folder)
    cached(cfg)
    before = files(cfg)
    (folder / "test/b/broken.png").write_bytes((folder / "test/b/0.png").read_bytes()[:40])
    with pytest.raises(UsageError, match=r"broken\.png"):
        cached(cfg)
    assert files(cfg) == before
    assert leftovers(cfg) == []


def test_an_interrupt_leaves_nothing(config, folder, monkeypatch):
    def interrupted(picture, *options):
        raise KeyboardInterrupt

    cfg = config("image_folder", folder)
    monkeypatch.setattr(writer_module, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cached(cfg)
    assert files(cfg) == leftovers(cfg) == []


def test_what_a_killed_process_left_is_removed(config, folder):
    cfg = config("image_folder", folder)
    cached(cfg)
    [path] = files(cfg)
    path.rename(path.with_suffix(".partial"))
    add_an_image(folder)
    cached(cfg)
    assert leftovers(cfg) == []


def test_cache_dir_that_cannot_be(config, folder, tmp_path):
    """A ``data.cache_dir`` that cannot be a folder is refused."""
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(UsageError, match=r"data\.cache_dir=.*choose a folder"):
        cached(config("image_folder", folder))


def test_no_room_is_said_before_decoding(config, folder, decodings, monkeypatch):
    monkeypatch.setattr(writer_module.shutil, "disk_usage", lambda folder: SimpleNamespace(free=100))
    with pytest.raises(UsageError, match=r"2\.3 kB needed, 100 bytes free"):
        cached(config("image_folder", folder))
    assert decodings == []


def _load_counting(cfg, tally: Path, ready, results) -> None:
    """Load once all processes are ready; add a byte to the file ``tally`` for each picture that this one decodes."""
    decode = writer_module.decode

    def counting(picture, *options):
        with tally.open("ab", buffering=0) as file:
            file.write(b".")
        return decode(picture, *options)

    writer_module.decode = counting
    ready.wait()
    results.put(load(cfg).test.images.sum().item())


@pytest.mark.slow
def test_processes_that_start_together_decode_once(config, tmp_path):
    folder = write_folder(tmp_path / "images", {"a": 60, "b": 60})
    cfg, tally = config("image_folder", folder), tmp_path / "tally"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["src.data", "torch", "torchvision", "pytest"])  # imports of seconds
    ready, results = context.Barrier(4), context.Queue()
    processes = [context.Process(target=_load_counting, args=(cfg, tally, ready, results)) for _ in range(4)]
    for process in processes:
        process.start()
    sums = {results.get(timeout=600) for _ in processes}
    for process in processes:
        process.join()

    assert [process.exitcode for process in processes] == [0] * 4
    assert tally.stat().st_size == 120
    assert len(sums) == 1
    assert leftovers(cfg) == []


def test_options_of_a_source_from_outside_have_caches_of_their_own(config):
    """Otherwise each would delete the other's cache whenever a sweep has both."""
    made = [config("mine", _target_="mine.Images", options={"scale": scale}) for scale in (1, 2)]
    one, two = (cache_module._identity(cfg) for cfg in made)
    assert one != two


def test_a_dot_in_a_name_keeps_sizes_apart():
    """Each identity has its own lock file and its own note of the folders' times."""
    one, two = Path("web.mini-0001"), Path("web.mini-0002")
    assert cache_module._sidecar(one, ".lock") != cache_module._sidecar(two, ".lock")
    assert cache_module._sidecar(one, ".folders") == Path("web.mini-0001.folders")


def test_a_process_that_waited_finds_the_cache(config, folder, decodings, caplog):
    """While another process holds the lock, this one says that it waits; then it reads the cache of the other."""
    from threading import Thread

    cfg = config("image_folder", folder)
    cached(cfg)
    [path] = files(cfg)
    hidden = path.rename(path.with_name("hidden"))
    decodings.clear()
    lock = FileLock(next(Path(cfg.cache_dir).glob("*.lock")), thread_local=False)
    opened: list[Cache] = []
    with caplog.at_level("INFO"):
        with lock:
            waiter = Thread(target=lambda: opened.append(cached(cfg)))
            waiter.start()
            while "waiting for another process" not in caplog.text:
                waiter.join(timeout=0.05)
            hidden.rename(path)
        waiter.join()
    assert len(opened) == 1
    assert decodings == []
