import os
import threading

import pytest
from filelock import FileLock

from src.config.identity import config_hash
from src.errors import UsageError
from src.runs import checkpoint
from src.runs import directory as run_directory
from src.runs.record import TAG_CONFIG_HASH, Record
from tests.composing import parsed


def test_one_configuration_has_one_directory():
    one = run_directory.path_of(parsed("k=50"))
    assert one.parent.name == "multirun"
    assert one.name.startswith("kmclr-k50-cifar100-resnet18-seed0-")
    assert one == run_directory.path_of(parsed("method=kmclr", "k=50", "device=cpu"))
    assert one != run_directory.path_of(parsed("k=50", "optimizer.lr=0.1"))


def test_a_named_directory_is_taken_and_resume_never_goes_beside_it(tmp_path):
    named = f"output_dir={tmp_path / 'run'}"
    assert run_directory.path_of(parsed(named, "resume=never")) == tmp_path / "run"
    (tmp_path / "run").mkdir()
    assert run_directory.path_of(parsed(named)) == tmp_path / "run"
    assert run_directory.path_of(parsed(named, "resume=never")) == tmp_path / "run.2"
    (tmp_path / "run.2").mkdir()
    assert run_directory.path_of(parsed(named, "resume=never")) == tmp_path / "run.3"


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(UsageError, match="is a file; name a folder"):
        run_directory.path_of(parsed(f"output_dir={tmp_path / 'run'}"))


def test_a_directory_is_held_once_and_let_go(tmp_path):
    refused = pytest.raises(UsageError, match=rf"b: process {os.getpid()} on \S+ is using it; wait for it, or stop it$")
    with run_directory.exclusive(tmp_path / "a" / "b"), refused, run_directory.exclusive(tmp_path / "a" / "b"):
        pass
    with run_directory.exclusive(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()


def test_a_folder_held_by_a_process_of_another_machine_names_the_file_to_remove(tmp_path):
    """On a file system without locks the file stays when its process has gone, which only the user can find out."""
    with run_directory.exclusive(tmp_path):
        (tmp_path / run_directory.HOLDER).write_text("process 7 on node12")
        with (
            pytest.raises(UsageError, match="if it is gone there, remove ") as error,
            run_directory.exclusive(tmp_path),
        ):
            pass
    assert str(error.value).endswith(str(tmp_path / ".lock"))


def test_a_process_that_stops_is_waited_for(tmp_path):
    held = FileLock(tmp_path / ".lock", thread_local=False)
    held.acquire()
    threading.Timer(0.5, held.release).start()
    with run_directory.exclusive(tmp_path, patience=60):
        assert not held.is_locked


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(UsageError, match="file/run: cannot be written"),
        run_directory.exclusive(tmp_path / "file" / "run"),
    ):
        pass


def test_a_folder_that_may_only_be_read_is_nobodys_to_work_on(tmp_path, monkeypatch):
    """A folder in which no lock can be written counts as held."""

    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    assert not run_directory.is_held(tmp_path)
    monkeypatch.setattr(run_directory.FileLock, "acquire", refused)
    assert run_directory.is_held(tmp_path)


def test_who_reads_a_run_that_may_only_be_read_is_told_to_copy_it(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(run_directory.FileLock, "acquire", refused)  # permissions alone do not stop root
    (tmp_path / "run.json").touch()
    with pytest.raises(UsageError) as error, run_directory.exclusive(tmp_path):
        pass
    assert str(error.value) == f"{tmp_path}: cannot be written (Permission denied); copy it to a folder of yours"


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "checkpoints/step-00000100.pt", "notes", ".hidden"])
def test_a_folder_of_another_program_is_left_alone(tmp_path, name):
    theirs = tmp_path / name
    theirs.parent.mkdir(exist_ok=True)
    theirs.write_text("theirs")
    with pytest.raises(UsageError, match=r"so it is not a run's; name a new folder"), run_directory.exclusive(tmp_path):
        pass
    assert theirs.read_text() == "theirs"
    assert not (tmp_path / ".lock").exists()


def test_what_a_kill_at_the_start_leaves_is_ours(tmp_path):
    """A folder with nothing but what a kill at the start leaves is not taken for another program's."""
    for name in (".lock", ".holder", "run.json.tmp", "metrics.jsonl"):
        (tmp_path / name).touch()
    with run_directory.exclusive(tmp_path):
        pass


def test_a_run_that_has_lost_its_record_is_known_by_its_checkpoint(tmp_path):
    checkpoint.save(tmp_path / "checkpoints", 10, {})
    with run_directory.exclusive(tmp_path):
        pass


def test_a_run_may_be_a_link_to_another_disk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = parsed("k=50")
    directory = run_directory.path_of(cfg)
    (tmp_path / "elsewhere").mkdir()
    directory.parent.mkdir()
    directory.symlink_to(tmp_path / "elsewhere")
    assert run_directory.path_of(cfg) == directory


def test_a_name_leads_nowhere_but_into_the_folder_of_runs():
    cfg = parsed("k=50", "data.name=../../../x")
    with pytest.raises(UsageError, match="names no folder inside multirun"):
        run_directory.path_of(cfg)


def test_a_finished_run_says_once_that_its_code_was_edited(tmp_path, monkeypatch, caplog):
    cfg = parsed("k=50")
    record = Record.new("mine", "e")
    record.status, record.tags = "FINISHED", {TAG_CONFIG_HASH: config_hash(cfg), "code/mine": "0" * 16}
    record.save(tmp_path)
    monkeypatch.setattr(run_directory, "code_digests", lambda _: {"mine": "0" * 16})
    assert run_directory.is_finished(tmp_path, cfg)
    assert caplog.text == ""
    monkeypatch.setattr(run_directory, "code_digests", lambda _: {"mine": "1" * 16})
    assert run_directory.is_finished(tmp_path, cfg)
    assert run_directory.is_finished(tmp_path, cfg)
    assert caplog.text.count("mine has changed since runs with it finished: resume=never trains them anew") == 1
