"""The Hugging Face hub, simulated by a server on loopback that answers the requests of the hub's library."""

import hashlib
import json
import re
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote

import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfApi, constants

from src.data import load
from src.data.cache import cached, image_names, known_fingerprint
from src.data.parquet import find_columns
from src.errors import UsageError
from src.runs.record import Record
from tests.data.layouts import pixels, write_shard

REPO = "someone/photos"


class Hub(ThreadingHTTPServer):
    """A server of the data set `REPO`, of which each branch is a folder."""

    def __init__(self, branches: dict[str, Path]):
        super().__init__(("127.0.0.1", 0), Answers)
        self.branches, self.asked, self.gated = branches, [], False
        self.earlier: list[Path] = []  # the folders of commits from which the branches have moved on

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, folder: Path) -> str:
        return hashlib.sha1(str(folder).encode()).hexdigest()

    def folder(self, revision: str) -> Path | None:
        folders = [*self.branches.values(), *self.earlier]
        return {**self.branches, **{self.commit(each): each for each in folders}}.get(revision)


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub: Hub = self.server
        path = self.path.split("?")[0]
        if path == f"/api/datasets/{REPO}":
            path += "/revision/main"
        hub.asked.append(path)
        for start in (f"/api/datasets/{REPO}/revision/", f"/api/datasets/{REPO}/tree/", f"/datasets/{REPO}/resolve/"):
            if path.startswith(start):
                revision, _, name = path.removeprefix(start).partition("/")
                folder = hub.folder(unquote(revision))
                break
        else:
            return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        if hub.gated:
            return self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
        if folder is None:
            return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        files = sorted(each for each in folder.rglob("*") if each.is_file())
        if "/revision/" in start:
            siblings = [{"rfilename": each.relative_to(folder).as_posix()} for each in files]
            info = {"id": REPO, "sha": hub.commit(folder), "siblings": siblings}
            return self.answer(200, json.dumps(info).encode())
        if "/tree/" in start:
            tree = [self.entry(each, folder) for each in files]
            return self.answer(200, json.dumps(tree).encode())
        content = (folder / name).read_bytes()
        etag = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": hub.commit(folder)}
        return self.answer(200, content, etag)

    def entry(self, path: Path, folder: Path) -> dict:
        content = path.read_bytes()
        oid, name = hashlib.sha1(content).hexdigest(), path.relative_to(folder).as_posix()
        return {"type": "file", "oid": oid, "size": len(content), "path": name}

    def answer(self, status: int, content: bytes, headers: dict | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Hub]:
    """The simulated hub, which the library is made to use; a test fills the folders of its branches."""
    server = Hub({"main": tmp_path / "main"})
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
    )
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def write_cifar(folder: Path) -> list:
    """A few images in the layout of ``uoft-cs/cifar100`` on the hub: a folder of shards with the column fine_label."""
    names = [f"class {i}" for i in range(3)]
    images = write_shard(folder / "cifar100/train-00000-of-00001.parquet", [0, 1, 2] * 4, "img", "fine_label", names)
    write_shard(folder / "cifar100/test-00000-of-00001.parquet", [0, 1, 2], "img", "fine_label", names, seed=1)
    (folder / "README.md").write_text("a card")
    return images


@pytest.fixture
def refusal(refusal):
    return partial(refusal, "hub")


def test_a_data_set_is_downloaded_once_and_needs_no_more_words(hub, config, tmp_path):
    """``data.repo`` alone is enough to find the columns and classes, and a second load asks the hub for nothing."""
    images = write_cifar(tmp_path / "main")
    cfg = config("hub", repo=REPO, final=True)
    assert known_fingerprint(cfg) is None
    assert hub.asked == []  # a dry run downloads nothing
    dataset = load(cfg)
    assert dataset.classes == ["class 0", "class 1", "class 2"]
    assert np.array_equal(dataset.train.images, pixels(images))
    assert len(dataset.test) == 3
    assert not any("README" in path for path in hub.asked)
    assert len(list((tmp_path / "hub").glob("datasets--*"))) == 1  # where the library keeps it
    asked = len(hub.asked)
    assert load(cfg).fingerprint == dataset.fingerprint
    assert len(hub.asked) == asked


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_images_keep_their_names_when_the_branch_moves(hub, config, tmp_path, on_error):
    for commit, images in (("main", [0, 1, 2]), ("moved", [2, 1, 0, 2])):
        write_cifar(tmp_path / commit)
        write_shard(tmp_path / commit / "cifar100/test-00000-of-00001.parquet", images, "img", "fine_label")
    cfg = config("hub", repo=REPO, on_error=on_error)
    before = [list(each) for each in load(cfg).names(cfg).values()]
    hub.earlier, hub.branches = [tmp_path / "main"], {"main": tmp_path / "moved"}
    assert [list(each) for each in load(cfg).names(cfg).values()] == before
    assert f"/{hub.commit(tmp_path / 'main')}/" in before[1][0][1]


def test_a_cache_without_a_commit_names_no_images(hub, config, tmp_path):
    """An older version wrote it, and nothing tells whether the branch has moved since."""
    write_cifar(tmp_path / "main")
    cfg = config("hub", repo=REPO)
    cache = cached(cfg)
    cache.commit = None
    with pytest.raises(UsageError, match=r"data\.repo=someone/photos: .*\.safetensors is from an older version"):
        image_names(cfg, cache)


@pytest.mark.slow
def test_a_run_finds_the_hub_where_hf_endpoint_says(hub, command, small, tmp_path):
    write_cifar(tmp_path / "main")
    images = ["data=hub", f"data.repo={REPO}", "data.limit=null", f"data.cache_dir={tmp_path}/cache"]
    few = ["epochs=1", "k=2", "batch_size=4", "data.val_fraction=0.25", "tracking=jsonl", "output_dir=run"]
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
    done = command("src.train", *small, *images, *few, environment=environment)
    assert done.returncode == 0, done.stderr
    assert [path for path in hub.asked if path.endswith("train-00000-of-00001.parquet")]
    assert list((tmp_path / "home/hub").glob("datasets--someone--photos"))
    assert "test/linear_top1" in Record.load(tmp_path / "run").metrics


def test_without_a_network_what_was_downloaded_serves(hub, config, refusal, tmp_path, monkeypatch):
    write_cifar(tmp_path / "main")
    first = load(config("hub", repo=REPO)).fingerprint
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    assert load(config("hub", repo=REPO, cache_dir=str(tmp_path / "other"))).fingerprint == first
    message = refusal(repo="someone/else")
    assert message.startswith("data.repo=someone/else: not downloaded, and the hub cannot be reached (")
    assert "hf download --repo-type dataset someone/else" in message


def test_without_a_network_only_what_is_wanted_has_to_be_there(hub, config, refusal, tmp_path, monkeypatch):
    for each in ("full", "small"):
        for seed, split in enumerate(("train", "test")):
            write_shard(tmp_path / "main" / each / f"{split}-0.parquet", [0, 1] * 10, seed=seed)
    first = load(config("hub", repo=REPO, config="small")).fingerprint
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    assert load(config("hub", repo=REPO, config="small", cache_dir=str(tmp_path / "other"))).fingerprint == first
    assert "not downloaded, and the hub cannot be reached" in refusal(repo=REPO, config="full")


@pytest.mark.parametrize("listed", [True, False])
def test_a_download_without_the_test_does_not_serve(hub, config, refusal, tmp_path, monkeypatch, listed):
    """Older versions of the library kept no list of a data set's files, which would tell that there is a test split."""
    write_cifar(tmp_path / "main")
    load(config("hub", repo=REPO))
    [shard] = (tmp_path / "hub").rglob("snapshots/*/cifar100/test-*")
    shard.unlink()
    if not listed:
        monkeypatch.setattr(huggingface_hub, "get_cached_repo_tree", lambda *_, **__: [])
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    instead = f"(train); connect to a network, or use just these: data=parquet data.root={tmp_path}"
    said = "not downloaded, and the hub cannot be reached" if listed else instead
    assert said in refusal(repo=REPO, cache_dir=str(tmp_path / "other"))


def test_a_damaged_download_is_fetched_again_if_one_does_what_the_line_says(hub, config, refusal, tmp_path):
    write_cifar(tmp_path / "main")
    first = load(config("hub", repo=REPO)).fingerprint
    [shard] = (tmp_path / "hub").rglob("snapshots/*/cifar100/test-*")
    shard.resolve().write_bytes(b"<html>log in</html>")
    other = str(tmp_path / "other")
    message = refusal(repo=REPO, cache_dir=other)
    assert message.startswith(f"{shard}: not a readable parquet file")
    Path(re.search("; remove (.+), and fetch it again", message)[1]).unlink()
    assert load(config("hub", repo=REPO, cache_dir=other)).fingerprint == first


@pytest.mark.parametrize("shards", [1, 2])
def test_a_download_that_was_cut_short_does_not_serve(config, refusal, tmp_path, monkeypatch, shards):
    """An older version of the library, which does not notice missing shards, returns the incomplete folder."""
    for each in range(shards):
        write_shard(tmp_path / f"snapshot/train-0000{each}-of-00002.parquet", [0, 1] * 6, seed=each)
    write_shard(tmp_path / "snapshot/test-00000-of-00001.parquet", [0, 1], seed=5)

    def snapshot(*_, local_files_only=False, **__):
        if local_files_only:
            return str(tmp_path / "snapshot")
        raise ConnectionError("no network")

    monkeypatch.setattr(HfApi, "snapshot_download", snapshot)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    if shards == 1:
        assert "not downloaded, and the hub cannot be reached" in refusal(repo=REPO)
    else:
        assert len(load(config("hub", repo=REPO, final=True)).train) == 24


def test_what_the_hub_converted_serves_where_there_are_no_shards(hub, config, tmp_path):
    (tmp_path / "main").mkdir()
    (tmp_path / "main/photos.zip").write_bytes(b"")
    hub.branches["refs/convert/parquet"] = tmp_path / "converted"
    write_shard(tmp_path / "converted/default/train/0000.parquet", [0, 1] * 6)
    write_shard(tmp_path / "converted/default/test/0000.parquet", [0, 1])
    assert len(load(config("hub", repo=REPO, final=True)).train) == 12


def test_only_the_chosen_configuration_is_downloaded(hub, config, refusal, tmp_path):
    for each in ("full", "small"):
        write_shard(tmp_path / "main" / each / "train-0.parquet", [0, 1] * 10)
    assert "choose one with data.config=NAME" in refusal(repo=REPO)
    load(config("hub", repo=REPO, config="small"))
    assert not any("resolve" in path and "full" in path for path in hub.asked)


def test_a_revision_is_what_it_says(hub, config, refusal, tmp_path):
    """``data.revision`` chooses the branch; it is main by default, and an unknown one is refused."""
    for seed, each in enumerate(("main", "v1")):
        hub.branches[each] = tmp_path / each
        write_shard(tmp_path / each / "train-0.parquet", [0, 1] * 10, seed=seed)
    found = {each: load(config("hub", repo=REPO, revision=each)).fingerprint for each in (None, "main", "v1")}
    assert found[None] == found["main"] != found["v1"]
    assert "data.revision=v2" in refusal(repo=REPO, revision="v2")


def test_refusals_are_one_line_that_says_what_to_do(hub, refusal, tmp_path):
    assert "data.repo is not set" in refusal()
    assert "no such data set" in refusal(repo="someone/nothing")
    assert "not of the form OWNER/NAME" in refusal(repo="a b/c/d")
    (tmp_path / "main").mkdir()
    (tmp_path / "main/a.csv").write_text("")
    assert "holds no parquet files" in refusal(repo=REPO)
    hub.gated = True
    assert "HF_TOKEN" in refusal(repo=REPO)


def test_labels_that_only_the_test_has_are_found(hub, config, tmp_path, caplog):
    write_shard(tmp_path / "main/test-0.parquet", [0, 1] * 10, names=["a", "b"])
    write_shard(tmp_path / "main/train-0.parquet", [0] * 12, seed=1)
    table = pq.read_table(tmp_path / "main/train-0.parquet")
    pq.write_table(table.rename_columns(["image", "year"]), tmp_path / "main/train-0.parquet")
    dataset = load(config("hub", repo=REPO, final=True))
    assert (dataset.classes, dataset.labelled, len(dataset.train), len(dataset.test)) == (["a", "b"], False, 12, 4)
    assert "the labels are: label (data.label_column chooses; there is also year)" in caplog.text
    assert "the probes learn from the split test" in caplog.text


def test_class_names_in_another_order_in_the_test_are_refused(hub, refusal, tmp_path):
    for seed, (split, names) in enumerate((("train", ["a", "b"]), ("test", ["b", "a"]))):
        write_shard(tmp_path / f"main/{split}-0.parquet", [0, 1] * 6, names=names, seed=seed)
    message = refusal(repo=REPO)
    assert "test-0.parquet: label=0 is b, but a in " in message
    assert "train-0.parquet" in message


def test_a_label_of_a_type_that_is_not_read_is_noted(hub, config, refusal, tmp_path, caplog):
    write_shard(tmp_path / "main/train-0.parquet", pa.array([[0], [1]] * 6), label_column="labels")
    assert load(config("hub", repo=REPO)).classes == []
    assert "labels holds list<" in caplog.text
    assert "column labels holds list<" in refusal(repo=REPO, label_column="labels")


@pytest.mark.parametrize(
    ("columns", "label", "said"),
    [
        (["label"], "label", []),
        (["coarse_label", "fine_label"], "fine_label", ["the labels are: fine_label", "also coarse_label"]),
        (["year", "kind"], "none", ["the labels are: none", "also year, kind"]),
        ([], "none", []),
    ],
)
def test_columns_are_found_by_what_they_hold(tmp_path, columns, label, said):
    write_shard(tmp_path / "a.parquet", [0, 1], image_column="picture", label_column="?")
    table = pq.read_table(tmp_path / "a.parquet").drop_columns("?")
    for name in columns:
        table = table.append_column(name, pa.array([0, 1]))
    pq.write_table(table, tmp_path / "a.parquet")
    image, found, notes = find_columns([tmp_path / "a.parquet"], None, None)
    assert (image, found) == ("picture", label)
    assert all(part in "".join(notes) for part in said)
    assert bool(notes) == bool(said)


def test_the_only_class_label_is_the_label_whatever_its_name(tmp_path):
    write_shard(tmp_path / "a.parquet", [0, 1], "img", "species", names=["cat", "dog"])
    table = pq.read_table(tmp_path / "a.parquet").append_column("label", pa.array([5, 6]))
    pq.write_table(table, tmp_path / "a.parquet")
    assert find_columns([tmp_path / "a.parquet"], None, None)[1] == "species"


def test_columns_that_could_all_be_meant_are_refused(tmp_path):
    write_shard(tmp_path / "a.parquet", [0, 1])
    table = pq.read_table(tmp_path / "a.parquet")
    pq.write_table(table.append_column("mask", table["image"]), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match=r"2 columns hold encoded images .*data\.image_column"):
        find_columns([tmp_path / "a.parquet"], None, None)
