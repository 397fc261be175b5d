import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from src import cli
from src.config.identity import config_hash
from src.errors import UsageError
from src.reporting import curves
from src.runs import checkpoint, directory, origin, query
from src.runs.record import ENCODER, Record
from tests.composing import composed, parsed

KMCLR = ["method=kmclr", "k=7"]


@pytest.fixture
def run(tmp_path, monkeypatch, small):
    """Train for an epoch in this process; returns the run's directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(curves, "plot", lambda directory: directory)  # drawing takes longer than so small a training
    torch.set_num_threads(1)

    def train(*overrides):
        before = set(tmp_path.glob("multirun/*"))
        cli.pretrain(composed(*small, "epochs=1", "tracking=jsonl", "data.limit=128", *overrides))
        return (set(tmp_path.glob("multirun/*")) - before or before).pop()

    return train


def weights(directory):
    return checkpoint.load_latest(directory / "checkpoints")[1]["model"]


def test_a_run_starts_from_another_in_a_directory_of_its_own(run, small, tmp_path, capsys):
    first = run(*KMCLR)
    second = run(*KMCLR, f"init={first}", "optimizer.lr=1e-12")
    assert second != first
    record = Record.load(second)
    assert record.tags["init.taken"] == "encoder, projector, support"
    assert record.params["init"] == str(first)
    learned, kept = weights(first), weights(second)
    for key in (key for key in learned if key.startswith(("encoder", "projector")) and key.endswith("weight")):
        torch.testing.assert_close(kept[key], learned[key], msg=key)
    assert kept["support._extra_state"]["step"] == 2 * learned["support._extra_state"]["step"]

    cli.pretrain(
        composed(
            *small,
            "epochs=1",
            "tracking=jsonl",
            "data.limit=128",
            *KMCLR,
            f"init={first}",
            "optimizer.lr=1e-12",
            "dry_run=true",
        )
    )
    listed = capsys.readouterr().out
    assert second.name in listed
    assert "finished" in listed

    first.rename(tmp_path / "moved")  # the same weights, so the same run
    assert run(*KMCLR, "init=moved", "optimizer.lr=1e-12") == second


def test_what_fits_is_taken_over_and_the_rest_starts_afresh(run):
    first = run("method=simclr")
    second = run(*KMCLR, "objective.predictor_hidden=8", f"init={first}")
    assert Record.load(second).tags["init.taken"] == "encoder, projector"


def test_a_teacher_starts_as_the_student_that_was_given_weights(run):
    first = run("method=simclr")
    teacher = ["method=nnclr", "objective=teacher", "support=none", "objective.predictor_hidden=8"]
    learned, kept = weights(first), weights(run(*teacher, f"init={first}", "optimizer.lr=1e-12"))
    parts = [key for key in learned if key.startswith(("encoder", "projector")) and key.endswith("weight")]
    for key in parts:
        torch.testing.assert_close(kept[f"teacher_{key}"], learned[key], msg=key)


def test_what_is_stored_of_other_images_is_not_taken_over(run):
    """The entries refer to images by their rows, and in other data these rows are other images."""
    first = run("method=nnclr", "queue_size=64")
    longer = run("method=nnclr", "queue_size=64", f"init={first}", "epochs=2")
    assert Record.load(longer).tags["init.taken"] == "encoder, projector, support"
    other = run("method=nnclr", "queue_size=64", f"init={first}", "data.limit=130", "evaluation.pictures=true")
    assert Record.load(other).tags["init.taken"] == "encoder, projector"


def test_a_support_set_that_is_filled_by_another_run_need_not_be_filled_again(run):
    with pytest.raises(UsageError, match="queue_size=128: is never filled"):
        run("method=nnclr", "queue_size=128")
    first = run("method=nnclr", "queue_size=128", "epochs=3")
    assert Record.load(run("method=nnclr", "queue_size=128", f"init={first}")).status == "FINISHED"
    first = run("method=kmclr", "k=65", "epochs=3", "support.forget=none")
    with pytest.raises(UsageError, match=r"k=65: is never filled, .* every epoch \(support.forget_every\)"):
        run("method=kmclr", "k=65", f"init={first}", "epochs=3", "support.forget_every=1")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (
            ["method=nnclr", "queue_size=64"],
            ["method=nnclr", "queue_size=64", "search=ivf", "search.index='IVF4,Flat'"],
        ),
        (["method=kmclr", "k=50"], ["objective=mixed", "support=evolving", "support.size=50", "support.start=50"]),
    ],
)
def test_what_is_stored_by_a_support_set_of_another_kind_is_not_taken_over(run, first, second):
    """The number of vectors is the same, but what is stored about each of them differs."""
    record = Record.load(run(*second, "epochs=2", f"init={run(*first, 'epochs=2')}"))
    assert (record.status, record.tags["init.taken"]) == ("FINISHED", "encoder, projector")


def test_a_foreign_encoder_is_a_start_too(run, tmp_path):
    first = run("method=simclr")
    save_file(load_file(first / "encoder.safetensors"), tmp_path / "theirs.safetensors")
    record = Record.load(run(*KMCLR, "init=theirs.safetensors"))
    assert record.tags["init.taken"] == "encoder"
    expected = hashlib.sha256((tmp_path / "theirs.safetensors").read_bytes()).hexdigest()[:16]
    assert record.params["origin"] == expected
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("no weights")
    before = set(tmp_path.glob("multirun/*"))
    torch.save({"a": torch.zeros(1)}, tmp_path / "theirs.pth")
    other = "is of another method or shape: .*init= takes an encoder of backbone=resnet"
    text = "not a safetensors file .* give a run"
    for init, says in (("other.safetensors", other), ("text.safetensors", text), ("theirs.pth", text)):
        with pytest.raises(UsageError, match=says):
            run(*KMCLR, f"init={init}")
    assert set(tmp_path.glob("multirun/*")) == before


def test_a_stopped_run_continues_from_its_checkpoint_and_not_from_its_start(run, capsys):
    first = run("method=simclr")
    second = run(*KMCLR, f"init={first}")
    record = Record.load(second)
    record.status = "KILLED"
    record.save(second)
    run(*KMCLR, f"init={first}")
    assert f"{second.relative_to(second.parents[1])}: continued at step 2" in capsys.readouterr().out


@pytest.mark.parametrize("folder", [[], ["output_dir=named"]])
def test_a_run_that_has_begun_needs_its_start_no_more(run, tmp_path, capsys, folder):
    """The run that ``init`` names may be deleted once a run has started from it; no new run can start from it then."""
    filled = ["method=nnclr", "queue_size=128"]  # one epoch alone would not fill this queue
    first = run(*filled, "epochs=3")
    again = [*filled, f"init={first}", *folder]
    run(*again)
    second = tmp_path / "named" if folder else (set(tmp_path.glob("multirun/*")) - {first}).pop()
    figures = capsys.readouterr().out.splitlines()[-1]
    shutil.rmtree(first)
    first.parent.joinpath("empty").mkdir()
    run(*again)
    assert capsys.readouterr().out.splitlines()[-1] == figures

    record = Record.load(second)
    record.status = "KILLED"
    record.save(second)
    run(*again)
    assert ": continued at step 2" in capsys.readouterr().out
    after = Record.load(second)
    assert (after.uuid, after.tags["init.taken"]) == (record.uuid, "encoder, projector, support")

    for other in ("resume=never", "seed=1"):
        with pytest.raises(UsageError, match=f"init={first}: there is no such run|of another configuration .*seed"):
            run(*again, other)
    record.save(second)
    for path in second.glob("checkpoints/*.pt"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UsageError, match=f"names no weights any more, and .*{second.name} has no checkpoint"):
        run(*again)


@pytest.mark.parametrize(
    ("init", "says"),
    [("nothing", "there is no such run; .*, or a .pt or .safetensors"), ("empty", "there is no checkpoint")],
)
def test_a_start_that_is_not_there_is_one_line(tmp_path, monkeypatch, init, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=f"init={init}: {says}"):
        origin.identify(parsed(f"init={init}"))


def test_a_run_whose_checkpoints_are_gone_has_its_encoder(tmp_path):
    record = Record.new("run", "exp")
    record.status = "FINISHED"
    record.save(tmp_path)
    (tmp_path / ENCODER).touch()
    with pytest.raises(UsageError, match=rf"checkpoints are gone; name {tmp_path / ENCODER}"):
        origin.identify(parsed(f"init={tmp_path}"))


def test_a_start_is_named_as_any_run_is(tmp_path, monkeypatch):
    """``init`` takes a run's name, folder or id."""
    monkeypatch.chdir(tmp_path)
    record = Record.new("first", "exp")
    record.close("FINISHED")
    folder = tmp_path / "multirun/first"
    (folder / "checkpoints").mkdir(parents=True)
    record.save(folder)
    (folder / "checkpoints/step-00000001.pt").touch()
    for init in ("first", "multirun/first", record.uuid):
        assert origin.locate(init).samefile(folder / "checkpoints/step-00000001.pt")


def test_the_jobs_of_a_sweep_look_for_their_start_once(tmp_path, monkeypatch):
    """All jobs share one walk through the records, to find the run by its id or, if it is lost, runs begun from it."""
    monkeypatch.chdir(tmp_path)
    walks, below = [], query.records_below
    for module in (query, origin):
        monkeypatch.setattr(module, "records_below", lambda root: walks.append(root) or below(root))
    first = Record.new("first", "exp")
    first.close("FINISHED")
    (tmp_path / "multirun/first/checkpoints").mkdir(parents=True)
    first.save(tmp_path / "multirun/first")
    (tmp_path / "multirun/first/checkpoints/step-00000001.pt").write_bytes(b"weights")
    cfgs = [parsed(f"init={first.uuid}", f"seed={seed}") for seed in range(3)]
    for cfg in cfgs:
        origin.identify(cfg)
        begun = Record.new("begun", "exp")
        begun.params = {"init": cfg.init, "origin": cfg.origin}
        folder = directory.path_of(cfg)
        folder.mkdir()
        begun.save(folder)
    assert len(walks) == 1

    shutil.move("multirun/first", "multirun/moved")
    origin.identify(parsed(f"init={first.uuid}"))
    assert len(walks) == 2, "it is found where it is now"

    monkeypatch.setattr(origin, "named_run", lambda *_: Path("multirun/gone"))
    shutil.rmtree("multirun/moved")
    walks.clear()
    for cfg in cfgs:
        again = replace(cfg, origin=None)
        assert origin.identify(again) is None
        assert again.origin == cfg.origin
    assert len(walks) == 1


def test_a_run_that_has_not_finished_is_refused(tmp_path):
    Record.new("run", "exp").save(tmp_path)
    with pytest.raises(UsageError, match="the run is RUNNING, not FINISHED"):
        origin.identify(parsed(f"init={tmp_path}"))


def test_the_weights_are_part_of_the_identity_and_their_place_is_not(tmp_path):
    for name, content in (("a", b"1"), ("b", b"2"), ("copy", b"1")):
        (tmp_path / f"{name}.safetensors").write_bytes(content)

    def hash_of(*overrides):
        cfg = parsed(*overrides)
        origin.identify(cfg)
        return config_hash(cfg)

    a, b, copy = (hash_of(f"init={tmp_path}/{name}.safetensors") for name in ("a", "b", "copy"))
    assert len({a, b, hash_of()}) == 3
    assert a == copy


def test_the_newest_checkpoint_is_that_of_the_latest_step(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for step in (99_999_999, 100_000_000, 7):
        (tmp_path / f"checkpoints/step-{step:08d}.pt").touch()
    assert origin.locate(str(tmp_path)).name == "step-100000000.pt"
