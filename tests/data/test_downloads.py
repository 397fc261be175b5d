"""Data sets that torchvision downloads, as files with a few made-up images; their checksums replace the published."""

import pickle
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from urllib.error import URLError

import numpy as np
import pytest
from torchvision import datasets
from torchvision.datasets.utils import calculate_md5

from src.data import downloads, load
from src.data.downloads import MD5
from tests.data.archives import write_imagenette, write_stl10
from tests.data.layouts import all_images, pixels, write_folder, write_shard


@pytest.fixture
def no_network(monkeypatch) -> None:
    def fail(*args, **kwargs):
        raise URLError("Temporary failure\nin name resolution")

    monkeypatch.setattr("urllib.request.urlopen", fail)


@pytest.fixture
def server() -> Iterator[Callable[[bytes], str]]:
    """A function that starts a server on loopback with one answer to all requests, and returns its address.

    With an empty answer it stays silent.
    """
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve(answer: bytes) -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:  # closed by the fixture
                    return
                with connection:
                    connection.settimeout(None)  # the default is that of the download, in the other thread
                    connection.recv(65536)
                    connection.sendall(answer)
                    if not answer:  # wait until the client gives up
                        connection.recv(1)

        def start(answer: bytes) -> str:
            Thread(target=serve, args=(answer,), daemon=True).start()
            return f"http://127.0.0.1:{listening.getsockname()[1]}"

        yield start
        listening.shutdown(socket.SHUT_RDWR)


def http(content: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(content), content)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10"])
def test_the_checksums_are_those_of_torchvision(name):
    assert MD5[name] == getattr(datasets, name.upper()).tgz_md5


def test_imagenettes_checksums_are_those_of_torchvision():
    published = {Path(url).stem: md5 for url, md5 in datasets.Imagenette._ARCHIVES.values()}
    assert published == {name: md5 for name, md5 in MD5.items() if name.startswith("imagenette")}


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("cifar10", ("cifar-10-python.tar.gz", "train-*.parquet")),
        ("cifar100", ("cifar-100-python.tar.gz", "train-*.parquet")),
        ("stl10", ("stl10_binary.tar.gz",)),
        ("imagenette", ("imagenette2-160.tgz",)),
    ],
)
def test_without_a_network_one_line_says_what_to_do(refusal, tmp_path, no_network, name, files):
    root = tmp_path / "root"
    message = refusal(name, root)
    for part in (f"data.root={root}: {name}", *files, "Temporary failure in name", "data=digits"):
        assert part in message
    assert not root.exists()


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("cifar10", "cifar-10-python.tar.gz"),
        ("cifar100", "cifar-100-python.tar.gz"),
        ("stl10", "stl10_binary.tar.gz"),
        ("imagenette", "imagenette2-160.tgz"),
    ],
)
def test_an_archive_with_another_checksum_is_left_as_it_is(refusal, tmp_path, server, monkeypatch, name, file):
    """A user may have put half of it there; what a network that wants a login answers is no better."""
    kind = getattr(datasets, name.upper(), datasets.Imagenette)
    url = f"{server(http(b'<html>login</html>'))}/{file}"
    monkeypatch.setattr(kind, "url", url, raising=False)
    monkeypatch.setattr(datasets.Imagenette, "_ARCHIVES", {"160px": (url, MD5["imagenette2-160"])})
    assert "its download failed (File not found or corrupted" in refusal(name, tmp_path / "root")
    assert not (tmp_path / "root").exists()
    (tmp_path / file).write_bytes(b"the first half")
    assert f"{tmp_path / file}: its MD5 sum is not " in refusal(name, tmp_path)
    assert (tmp_path / file).read_bytes() == b"the first half"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n100\r\nhalf", "IncompleteRead"),
        (b"SSH-2.0-OpenSSH\r\n", "SSH-2.0-OpenSSH"),
        (b"", "timed out"),
    ],
    ids=["cut short", "no HTTP", "silent"],
)
@pytest.mark.parametrize("name", ["cifar100", "stl10"])
def test_whatever_a_server_does_is_one_line(refusal, tmp_path, server, monkeypatch, caplog, name, answer, said):
    monkeypatch.setattr(downloads, "SILENCE_S", 0.2)
    monkeypatch.setattr(getattr(datasets, name.upper()), "url", f"{server(answer)}/archive.tar.gz")
    caplog.set_level("INFO", "src")
    message = refusal(name, tmp_path)
    assert f"{name} is not there and its download failed (" in message
    assert said in message
    assert f"archive.tar.gz to {tmp_path}" in caplog.text
    assert socket.getdefaulttimeout() is None
    assert not [each for each in tmp_path.iterdir() if each.name.startswith("archive")]


class TestCifar:
    @pytest.mark.parametrize(("name", "label_column"), [("cifar10", "label"), ("cifar100", "fine_label")])
    @pytest.mark.parametrize("folder", ["", "as on the hub"])
    def test_parquet_shards(self, config, tmp_path, name, label_column, folder):
        root = tmp_path / name if folder else tmp_path
        images = write_shard(root / "train-00000-of-00001.parquet", [0, 1, 1], "img", label_column, names=["a", "b"])
        write_shard(root / "test-00000-of-00001.parquet", [0, 1], "img", label_column, names=["a", "b"])
        dataset = load(config(name, tmp_path, final=True))
        assert dataset.classes == ["a", "b"]
        assert np.array_equal(dataset.train.images, pixels(images))

    def test_shards_of_the_other_cifar(self, refusal, tmp_path):
        write_shard(tmp_path / "train-0.parquet", [0, 1], "img", "fine_label")
        write_shard(tmp_path / "test-0.parquet", [0, 1], "img", "fine_label")
        assert "no column label; it has img, fine_label" in refusal("cifar10", tmp_path)

    @pytest.mark.parametrize(("name", "key"), [("cifar10", "labels"), ("cifar100", "fine_labels")])
    def test_files_of_torchvision(self, config, tmp_path, monkeypatch, name, key):
        """A folder in torchvision's layout, with the published checksums replaced by those of a few random images."""
        kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
        folder = tmp_path / kind.base_folder
        folder.mkdir()
        images, labels = {}, {}

        def checksums(files: list) -> list:
            for file, _ in files:
                images[file] = np.random.default_rng(len(images)).integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
                labels[file] = [len(images) % 3, 0, 1, 2]
                (folder / file).write_bytes(pickle.dumps({"data": images[file].reshape(4, -1), key: labels[file]}))
            return [[file, calculate_md5(folder / file)] for file, _ in files]

        monkeypatch.setattr(kind, "train_list", checksums(kind.train_list))
        monkeypatch.setattr(kind, "test_list", checksums(kind.test_list))
        (folder / kind.meta["filename"]).write_bytes(pickle.dumps({kind.meta["key"]: ["x", "y", "z"]}))
        monkeypatch.setattr(kind, "meta", kind.meta | {"md5": calculate_md5(folder / kind.meta["filename"])})

        dataset = load(config(name, tmp_path, image_size=32, final=True))
        train_images, train_labels, test_images, test_labels = all_images(dataset)
        assert dataset.classes == ["x", "y", "z"]
        assert np.array_equal(train_images, np.concatenate([images[file] for file, _ in kind.train_list]))
        assert train_labels == [label for file, _ in kind.train_list for label in labels[file]]
        assert np.array_equal(test_images, images[kind.test_list[0][0]])
        assert test_labels == labels[kind.test_list[0][0]]


class TestStl10:
    @pytest.fixture
    def root(self, tmp_path, monkeypatch) -> Path:
        return write_stl10(tmp_path / "root", monkeypatch)

    def test_the_unlabelled_train_and_the_labelled_teach_the_probes(self, config, root):
        dataset = load(config("stl10", root, image_size=96, train_split="unlabeled", final=True))
        assert dataset.classes == ["airplane", "bird"]
        assert not dataset.labelled
        parts = {"unlabeled": dataset.train, "train": dataset.probe, "test": dataset.test}
        for split, part in parts.items():
            published = datasets.STL10(root, split)
            assert np.array_equal(part.images, pixels([image for image, _ in published]))
            assert split == "unlabeled" or part.labels.tolist() == published.labels.tolist()

    def test_a_part_of_the_labelled_validates(self, config, root):
        dataset = load(config("stl10", root, train_split="unlabeled"))
        assert [len(part) for part in (dataset.train, dataset.probe, dataset.val, dataset.test)] == [30, 15, 5, 10]

    def test_the_labelled_can_be_trained_on(self, config, root):
        dataset = load(config("stl10", root, train_split="train"))
        assert dataset.labelled
        assert [len(part) for part in (dataset.train, dataset.val, dataset.test)] == [15, 5, 10]

    def test_another_choice_of_splits_is_another_cache(self, config, root):
        fingerprints = {load(config("stl10", root, train_split=split)).fingerprint for split in ("unlabeled", "train")}
        assert len(fingerprints) == 2

    def test_the_archive_is_downloaded(self, config, root, server, monkeypatch):
        [archive] = root.iterdir()
        monkeypatch.setattr(datasets.STL10, "url", f"{server(http(archive.read_bytes()))}/{archive.name}")
        archive.unlink()
        assert len(load(config("stl10", root, train_split="train")).test) == 10
        assert sorted(each.name for each in root.iterdir()) == ["stl10_binary", archive.name]

    def test_decoded_images_need_no_files(self, config, root):
        cfg = config("stl10", root, train_split="unlabeled")
        first = load(cfg).fingerprint
        root.rename(root.with_name("moved"))
        assert load(cfg).fingerprint == first


class TestImagenette:
    @pytest.fixture
    def root(self, tmp_path, monkeypatch) -> Path:
        return write_imagenette(tmp_path / "root", monkeypatch)

    def test_its_validation_split_is_the_test_and_classes_have_their_names(self, config, root):
        dataset = load(config("imagenette", root))
        assert dataset.classes == ["tench", "parachute"]
        assert [len(part) for part in (dataset.train, dataset.val, dataset.test)] == [12, 4, 3]
        assert dataset.test.labels.tolist() == [0, 0, 1]
        assert load(config("imagenette", root, cache_dir=str(root / "other"))).fingerprint == dataset.fingerprint

    @pytest.mark.parametrize(
        ("size", "archive"),
        [
            (96, "imagenette2-160.tgz"),
            (160, "imagenette2-160.tgz"),
            (224, "imagenette2-320.tgz"),
            (336, "imagenette2.tgz"),
        ],
    )
    def test_the_smallest_archive_that_serves_is_wanted(self, refusal, tmp_path, no_network, size, archive):
        assert f"put {archive} " in refusal("imagenette", tmp_path, image_size=size)

    @pytest.mark.parametrize("folder", ["imagenette2-160", "imagenette2-160/train"])
    def test_an_unpacking_that_was_cut_short_at_its_start_is_refused(self, refusal, tmp_path, folder):
        (tmp_path / folder).mkdir(parents=True)
        assert "imagenette2-160: holds 0 of 13,394 images; remove it, and run" in refusal("imagenette", tmp_path)

    def test_folders_that_others_made_are_passed_over_or_named(self, config, refusal, root):
        load(config("imagenette", root))
        train, other = root / "imagenette2-160/train", str(root / "other")
        (train / ".ipynb_checkpoints").mkdir()
        (train / "empty").mkdir()
        assert load(config("imagenette", root, cache_dir=other)).classes == ["tench", "parachute"]
        write_folder(train, {"mine": 1})
        message = refusal("imagenette", root, cache_dir=str(root / "another"))
        assert message == f"{train / 'mine'}: is no class of Imagenette; remove it"

    def test_an_unpacking_that_was_cut_short_is_refused(self, config, refusal, root):
        load(config("imagenette", root))
        (root / "imagenette2-160/train/n03888257/7.JPEG").unlink()
        message = refusal("imagenette", root, cache_dir=str(root / "other"))
        assert f"{root / 'imagenette2-160'}: holds 18 of 19 images; remove it, and run this again" in message
