import os
import re
import runpy
import shutil
import subprocess
import sys

import pytest
import torch
from hydra.errors import HydraException
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf.errors import OmegaConfBaseException

from src import cli
from src.config import explain
from src.data.augment import ViewMaker
from src.errors import UsageError
from src.runs.record import Record
from src.sweeps.launcher import JobLauncher
from src.system.environment import CONF
from src.training import optim
from tests.composing import parsed
from tests.conftest import ELSEWHERE, PROJECT
from tests.pages import write_files


def test_help_is_complete(command):
    done = command("src.train", "--help")
    assert done.returncode == 0
    for line in ("method: kmclr, nnclr, simclr", "search: auto, faiss, ivf, torch", "tracking: jsonl, mlflow"):
        assert line in done.stdout
    assert "python -m src.train method=kmclr k=400" in done.stdout
    assert "mlflow ui" in done.stdout


def test_help_lists_the_groups_of_the_command_and_no_others(typed, tmp_path):
    (tmp_path / "mine/data").mkdir(parents=True)
    (tmp_path / "mine/data/pets.yaml").touch()

    def listed(entry):
        _, out, _ = typed(entry, "--help", "--config-dir=mine")
        above, _, _ = out.partition("Set any value")
        return dict(re.findall(r"^([+a-z/]+): (\w+(?:, \w+)*)$", above, re.MULTILINE))

    of_train = listed(cli.train)
    folders = {path.name for path in CONF.iterdir() if path.is_dir()} - {"shared", "hydra", "sweep"}
    assert of_train.keys() == {*folders, "+sweep", "hydra/launcher"}
    assert "pets" in of_train["data"]
    launchers = sorted(path.stem for path in CONF.glob("hydra/launcher/*.yaml"))
    assert of_train["hydra/launcher"].split(", ") == launchers
    assert listed(cli.evaluate).keys() == {"evaluation", "search", "data"}
    assert listed(cli.embed).keys() == {"data"}


def test_help_does_not_wait_for_torch():
    program = """
import runpy, sys
from hydra.core.global_hydra import GlobalHydra
sys.argv = ["program", "--help"]
for module in ("train", "evaluate", "embed", "export"):
    try:
        runpy.run_module(f"src.{module}", run_name="__main__")
    except SystemExit as end:
        assert not end.code
    GlobalHydra.instance().clear()
print("heavy:", [name for name in ("torch", "mlflow", "faiss", "torchvision") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("heavy: []\n")


def test_a_matplotlib_backend_that_is_not_there_is_not_asked_for(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "module://of_a_notebook")
    runpy.run_path(cli.__file__)
    assert "MPLBACKEND" not in os.environ


@pytest.mark.parametrize("key", ["data.cache_dir", "data.root", "init"])
def test_a_link_that_leads_to_itself_is_one_line(typed, tmp_path, key):
    (tmp_path / "loop").symlink_to("loop")
    data = "data=image_folder" if key == "data.root" else "data=digits"
    status, _, said = typed(cli.train, data, "backbone=resnet_tiny", "method=simclr", "tracking=jsonl", f"{key}=loop")
    assert status == 2
    assert said.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in said


def test_cfg_and_info_show_the_composition(command):
    done = command("src.train", "method=nnclr", "queue_size=7", "--cfg", "job")
    assert done.returncode == 0
    assert re.search(r"^queue_size: 7$", done.stdout, re.MULTILINE)
    assert not re.search(r"^k:", done.stdout, re.MULTILINE)
    assert "Defaults List" in command("src.train", "--info", "defaults").stdout


@pytest.mark.parametrize(
    ("line", "offers"),
    [
        ("src.train method=", {"method=kmclr", "method=nnclr", "method=simclr"}),
        ("src.train method=nnclr queue_", {"queue_size="}),
        ("src.train schedule.w", {"schedule.warmup_epochs="}),
        ("src.embed data=im", {"data=image_folder", "data=imagenet", "data=imagenette"}),
        ("src.evaluate evaluation=", {f"evaluation={name}" for name in ("fewshot", "finetune", "linear", "original")}),
    ],
)
def test_tab_completion_in_bash(line, offers):
    typed = f"{sys.executable} -m {line}"
    program = (
        "source scripts/completion.bash; "
        f"COMP_LINE='{typed}' COMP_WORDS=({typed}) COMP_CWORD={len(typed.split()) - 1}; "
        "_src_completion; echo ${COMPREPLY[@]}"
    )
    done = subprocess.run(["bash", "-c", program], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == offers


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("k=0", "k=0: must be 1 or more"),
        ("k=-3", "k=-3: must be 1 or more"),
        ("k=null", "k=null: support=kmeans needs a number of vectors"),
        ("method=nnclr queue_size=null", "queue_size=null: support=queue needs a number of vectors"),
        ("backbone.stem=null", "backbone.stem=null: choose small, small_padded or large"),
        ("+backbone.options.width=8", "backbone.options={'width': 8}: resnet18 takes none"),
        (
            "data=digits data.test_split=validation",
            "data.test_split: data=digits has no other splits than train and test",
        ),
        (
            "data=digits data.final=true data.limit=10 batch_size=5",
            "data.final=true: too few images to hold out a tenth",
        ),
        ("k=abc", "k=abc: "),
        ("projector=3", "projector=3: holds several settings; give one, as projector.hidden"),
        ("method=null", "method=null: choose an option (--help lists them)"),
        ("k=5 --config-dir mine seed=1", "settings stand before and after an argument that begins with a hyphen"),
        ("--multirun +sweep=optuna hydra.sweeper.trials=0", "hydra.sweeper.trials=0: must be a whole number"),
        ("--multirun +sweep=optuna ~hydra.sweeper.params", "hydra.sweeper: StudySweeper.__init__() missing 1"),
        ("--multirun k=5,6 +hydra.launcher.job=2", "hydra.launcher: LocalLauncher.__init__() got an unexpected"),
        ("method=nnclr k=200", "k: only support=kmeans (method=kmclr) has it"),
        ("queue_size=64", "queue_size: only support=queue (method=nnclr) has it"),
        ("method=simclrr", "method=simclrr: there is no such option; choose one of kmclr, nnclr, simclr"),
        ("metod=simclr", "did you mean method?"),
        ("epocs=3", "did you mean epochs?"),
        ("lr=0.1", "that the chosen options do not have; did you mean optimizer.lr or evaluation.lr"),
        ("nonesuch=1", "that the chosen options do not have (--help shows what can be set)"),
        ("model=resnet18", "did you mean backbone?"),
        ("sweep=demo", "sweep: write +sweep=NAME, and add --multirun"),
        ("--multirun sweep=demo", "sweep: write +sweep=NAME, and add --multirun"),
        ("k=10, 20", "k=10,: ends in a comma; write several values without blanks, as in k=10,20"),
        ("--multirun k=10, 20", "k=10,: ends in a comma; write several values without blanks, as in k=10,20"),
        ("20", "20: is no setting; write key=value"),
        ("evaluation.lr=0.1", "evaluation.lr=0.1: give a list, evaluation.lr=[0.1]"),
        ("augment.view1.crop_scale=0.2", "augment.view1.crop_scale=0.2: give a list, augment.view1.crop_scale=[0.2]"),
        ("experiment=mytest", "mnn, original, original_kmclr"),
        ("experiment=mytest", "tracking.experiment=mytest names an MLflow experiment"),
        ("data=digits data.root=x", "data.root: the chosen options do not have it; choose another data=... (--help"),
        ("support.forgett=none", "did you mean support.forget?"),
        ("method=simclr +k=50", "k: only support=kmeans (method=kmclr) has it"),
        ("experiment=mnn method=kmclr", "method=kmclr: experiment=mnn chooses support=queue; type support=kmeans too"),
        ("--multirun experiment=mnn method='kmclr'", "method=kmclr: experiment=mnn chooses support=queue"),
        ("experiment=original_nnclr method=kmclr", "queue_size: only support=queue (method=nnclr) has it"),
        ("method.support_weight=0", "objective.support_weight=0 makes no use of what is stored"),
        ("method=simclr support=queue", "objective.support_weight=0 makes no use of what is stored"),
        ("k=1", "k=1: all images share the one prototype"),
        ("+sweep=support_size", "+sweep=support_size: a sweep is many runs; add --multirun"),
        ("hydra/launcher=slurm", "hydra/launcher=slurm: submits the jobs of a sweep; add --multirun, for one too"),
        ("epochs=0", "epochs=0: must be 1 or more, unless init=... names weights"),
        ("support.name=[1,2]", "support.name=[1, 2]: choose one of none, queue, kmeans"),
        ("support.name=[1] +support._target_=tests.absent.Class", "support._target_=tests.absent.Class: "),
        ("k==4", "k==4"),
        ("seed=1,2", "seed=1,2: several values; add --multirun to run each of them"),
        ("+sede=1", "sede"),
        ("+seed=3", "seed: is there already; leave out the plus"),
        ("method=kmclr +k=20", "k: is there already; leave out the plus"),
        ("backbone=timm", "backbone.name: has no default; give it a value"),
        ("device=cuda:99", "device=cuda:99: torch sees"),
        ("data=digits batch_size=1e4", "batch_size=1"),
        ("data=digits backbone.bn_splits=8 batch_size=5000", "batch_size=5000 is larger than the 1294 training images"),
        ("data=digits data.limit=3", "data.limit=3"),
        ("data=image_folder data.root=nowhere", "nowhere: no such folder"),
        ("data=parquet data.root=.", "no parquet files (train-*.parquet, ...) in or below that folder"),
        ("data=image_folder", "data.root"),
        ("output_dir=a_file data=digits backbone=resnet_tiny", "output_dir=a_file: is a file"),
        ("hydra.run.dir=elsewhere", "hydra.run.dir=elsewhere: has no effect; a run's folder is output_dir"),
        ("--multirun hydra.sweep.dir=elsewhere k=5,6", "hydra.sweep.* out"),
        ("--multirun evaluation.epochs=2,50", "evaluation.epochs=2,50: makes no other run, so give it one value"),
        ("--multirun evaluation=linear,fewshot", "evaluation=linear,fewshot: makes no other run, so give it one value"),
        ("--multirun ++tracking.experiment=a,b", "tracking.experiment=a,b: makes no other run, so give it one value"),
        ("--multirun dry_run=true,false", "dry_run=true,false: makes no other run, so give it one value"),
        ("--multirun jobs=1,2 k=5,6", "jobs=1,2: makes no other run, so give it one value"),
        ("--multirun +sweep=optuna device=auto,cpu", "device=auto,cpu: makes no other run, so give it one value"),
        (
            "--multirun method=nnclr search=ivf search.refresh_every=null",
            "search.refresh_every=null: search=ivf needs a value",
        ),
        ("--multirun +sweep=optuna data=digits resume=never", "resume=never: a search goes on from its trials"),
        ("--multirun +sweep=optuna experiment=demo support=none,queue k=7", "k: only support=kmeans"),
        ("--multirun +sweep=optuna optimizer.momentumm=interval(0.1,0.2)", "did you mean optimizer.momentum?"),
        ("--multirun experiment=demo,mnn method=kmclr epocs=3", "did you mean epochs?"),
        ("--multirun hydra/sweeper=optuna k=5,6", "hydra.sweeper.direction=maximize: is missing"),
        ("--multirun hydra/launcher=basic k=5,6", "hydra/launcher=basic: returns all results or none"),
    ],
)
def test_a_mistake_is_one_line_and_status_2_and_nothing_is_written(typed, tmp_path, cache_dir, arguments, says):
    (tmp_path / "a_file").touch()
    status, _, stderr = typed(cli.train, *arguments.split(), f"data.cache_dir={cache_dir}")
    assert status == 2
    (line,) = [line for line in stderr.splitlines() if not line.startswith("decoding digits")]
    assert line.startswith("error: ")
    assert says in line
    assert [path.name for path in tmp_path.iterdir()] == ["a_file"]


@pytest.mark.parametrize("arguments", ["--config-name=evaluate", "--config-name=evaluate --multirun"])
def test_the_config_of_another_command_is_one_line(typed, arguments):
    status, _, stderr = typed(cli.train, *arguments.split())
    assert (status, stderr.count("\n")) == (2, 1)
    assert "--config-name=evaluate: configures no training run" in stderr


@pytest.mark.parametrize(
    ("chooses", "says"),
    [("experiment: mnn", "experiment=mnn chooses support=queue"), ("support: queue", "--config-name=own chooses supp")],
)
@pytest.mark.parametrize("more", [[], ["--multirun", "seed=0,1"]])
def test_a_method_is_refused_where_a_main_config_makes_another(typed, tmp_path, chooses, says, more):
    write_files(tmp_path, {"mine/own.yaml": f"defaults: [train, override {chooses}, _self_]\n"})
    status, _, stderr = typed(cli.train, "--config-dir=mine", "--config-name=own", *more, "method=kmclr")
    assert status == 2
    assert f"method=kmclr: {says}" in stderr


def test_a_search_takes_a_setting_that_some_of_its_options_have(typed):
    fixed = ["+sweep=optuna", "hydra.sweeper.trials=2", "experiment=demo", "tracking=jsonl", "dry_run=true"]
    for line in ("support=queue,kmeans queue_size=512", "method=nnclr,kmclr queue_size=512"):
        status, out, stderr = typed(cli.train, "--multirun", *fixed, *line.split())
        assert status == 0, stderr
        assert "2 trials to propose" in out


@pytest.mark.slow
@pytest.mark.parametrize("arguments", ["k=0", "epocs=3", "data=digits data.limit=3", "--multirun method=kmclr k=0,-1"])
def test_a_mistake_in_a_process_of_its_own(command, tmp_path, cache_dir, arguments):
    done = command("src.train", *arguments.split(), f"data.cache_dir={cache_dir}")
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith(("INFO: decoding", "decoding digits"))]
    assert line.startswith("error: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("", "give one of run=NAME and checkpoint=PATH"),
        ("run=a checkpoint=b", "give one of run=NAME and checkpoint=PATH"),
        ("run=", "run= is empty: a variable of the shell may have no value"),
        ("run=nowhere", "run=nowhere: there is no such run; give the name of its folder in multirun/"),
        ("checkpoint=nowhere", "its path, or its id, or a checkpoint's file"),
        ("checkpoint=.", "there is no checkpoint"),
        ("run_id=nothing", "run_id=nothing: there is no such run"),
        (f"run={'0' * 32}", "there is no MLflow store"),
        ("checkpoint=a_file", "a_file is damaged, or not a checkpoint"),
        ("method=kmclr", "method: unknown key, or one that the chosen options do not have (--help"),
        ("k=4", "k: unknown key, or one that the chosen options do not have (--help"),
        ("evaluation.epoch=5", "did you mean evaluation.epochs?"),
    ],
)
def test_mistakes_in_evaluate(typed, tmp_path, arguments, says):
    (tmp_path / "a_file").touch()
    status, _, stderr = typed(cli.evaluate, *arguments.split())
    assert status == 2
    assert says in stderr
    assert stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a_file"]


@pytest.mark.parametrize(
    ("command", "arguments", "says"),
    [
        (cli.export, "run=begun", "format=None: choose one of pt2, onnx, timm, hf"),
        (cli.export, "run=begun format=pt3", "format=pt3: choose one of pt2, onnx, timm, hf"),
        (cli.export, "format=pt2", "give run=NAME"),
        (cli.export, "run=gone format=pt2", "run=gone: there is no such run"),
        (cli.export, "run=begun format=pt2", "run=begun: the run is RUNNING, not FINISHED; run its command again"),
        (cli.export, "run=begun format=pt2 opset=3", "opset: unknown key"),
        (cli.embed, "", "give run=NAME"),
        (cli.embed, "run=gone", "run=gone: there is no such run"),
        (cli.embed, "run=begun", "run=begun: the run is RUNNING, not FINISHED; run its command again"),
        (cli.embed, "run=begun data.limit=3", "data.limit: the chosen options do not have it; choose data=... first"),
        (cli.embed, "run=begun data=digits data.repo=here", "choose another data=..."),
        (cli.embed, "checkpoint=begun", "checkpoint: unknown key, or one that the chosen options do not have (--help"),
        (cli.embed, "run=begun dat_root=here", "did you mean data.root?"),
        (cli.embed, "run=begun data_root=here", "run=begun: the run is RUNNING"),  # the old name of data.root
        (cli.embed, "run=begun data=nothing", "data=nothing"),
        (cli.embed, "run=begun format=pt2", "format: unknown key"),
    ],
)
def test_mistakes_in_what_takes_a_finished_run(typed, tmp_path, command, arguments, says):
    folder = tmp_path / "multirun/begun"
    folder.mkdir(parents=True)
    Record.new("begun", "study").save(folder)
    status, _, stderr = typed(command, *arguments.split())
    assert status == 2
    assert stderr.startswith("error: ")
    assert says in stderr
    assert stderr.count("\n") == 1
    assert [path.name for path in folder.iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (cli.evaluate, "run=lost"),
        (cli.embed, "run=lost"),
        (cli.export, "run=lost format=pt2"),
        (cli.train, "init=lost data=digits tracking=jsonl"),
    ],
)
def test_a_run_that_has_diverged_is_said_to_have_and_not_to_need_its_command_again(typed, tmp_path, command, arguments):
    folder = tmp_path / "multirun/lost"
    folder.mkdir(parents=True)
    record = Record.new("lost", "study")
    record.tags["diverged"] = "true"
    record.close("FAILED", "diverged at step 3: loss nan; lower optimizer.lr")
    record.save(folder)
    status, _, stderr = typed(command, *arguments.split())
    assert status == 2
    assert stderr.endswith("the run is FAILED, not FINISHED: diverged at step 3: loss nan; lower optimizer.lr\n")


def test_what_delivers_says_so_where_nothing_waits_and_its_help_is_no_docstring(typed, tmp_path):
    assert typed(cli.deliver) == (0, "nothing waits to be delivered\n", "")
    assert list(tmp_path.iterdir()) == []
    _, said, _ = typed(cli.deliver, "--help")
    assert "Deliver to MLflow what it lacks" in said
    assert "Raises" not in said
    assert "`" not in said


def test_what_evaluates_several_runs_makes_no_folders_of_its_own(typed, tmp_path):
    status, _, stderr = typed(cli.evaluate, "--multirun", "run=gone,lost")
    assert status == 2
    assert "run=gone: there is no such run" in stderr
    assert [path.name for path in (tmp_path / "multirun").iterdir()] == ["multirun.yaml"]  # from Hydra


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "package", "remedy"),
    [
        ("slurm", "submitit", "pip install --constraint constraints.txt '.[slurm]'"),
        ("ray", "ray", "pip install --constraint constraints.txt '.[ray]'"),
    ],
)
def test_a_launcher_that_is_not_installed_is_one_line(command, tmp_path, small, launcher, package, remedy):
    # A module that is None cannot be imported, whether the package is installed or not.
    (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.modules[{package!r}] = None")
    search = {"PYTHONPATH": f"{tmp_path}:{PROJECT}"}
    done = command("src.train", "--multirun", *small, f"hydra/launcher={launcher}", environment=search, anew=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: hydra/launcher")
    assert remedy in done.stderr
    assert not list(tmp_path.glob("multirun/*/"))


@pytest.mark.parametrize(
    "content", [b"a: [", b"\xff\xfe", b"a: &x [*x, *x]", b'!!python/object/apply:os.system ["true"]', b"\0"]
)
def test_a_damaged_config_file_is_one_line(command, tmp_path, content):
    (tmp_path / "mine/experiment").mkdir(parents=True)
    (tmp_path / "mine/experiment/bad.yaml").write_bytes(content)
    done = command("src.train", "--config-dir=mine", "experiment=bad", "dry_run=true")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("given", ["--config-dir=mine", "--config-dir mine --multirun", "-cd mine"])
def test_a_file_of_ones_own_that_would_never_be_read_is_one_line(typed, tmp_path, given):
    """Hydra looks into the project's folder first, so its option of the same name would be read in silence."""
    write_files(tmp_path, {"mine/experiment/other.yaml": "", "mine/support/queue.yaml": "queue_size: 100"})
    status, _, stderr = typed(cli.train, *given.split(), "support=queue", "dry_run=true")
    line = "error: mine/support/queue.yaml: is never read, because the project has a file of this name; rename it\n"
    assert (status, stderr) == (2, line)


@pytest.mark.parametrize("before", [[], ["--multirun"]])
def test_an_empty_argument_is_one_line(command, before):
    """``python -m src.train "$UNSET"`` gives such an argument."""
    done = command("src.train", *before, "")
    assert (done.returncode, done.stderr) == (
        2,
        "error: an argument is empty: a variable of the shell may have no value\n",
    )


@pytest.mark.parametrize("megabytes", [200, 1000])
def test_too_little_memory_is_one_line(tmp_path, megabytes):
    limited = f"ulimit -v {megabytes * 1024}; exec {sys.executable} -m src.train data=digits backbone=resnet_tiny"
    done = subprocess.run(
        ["bash", "-c", limited], cwd=tmp_path, env=os.environ | ELSEWHERE, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: there is not enough memory (")
    assert "Traceback" not in done.stderr


def test_more_memory_than_a_number_can_say_is_one_line(typed, cache_dir):
    settings = ["experiment=demo", "evaluation.pictures=false", f"data.cache_dir={cache_dir}", "tracking=jsonl"]
    status, _, stderr = typed(cli.train, *settings, "k=9223372036854775807")
    assert status == 1
    assert stderr.splitlines()[-1].startswith("error: there is not enough memory (")


@pytest.mark.parametrize(
    ("entry", "interrupted"),
    [
        (cli.train, "src.cli.pretrain"),
        (cli.evaluate, "src.evaluation.evaluate.main"),
        (cli.export, "src.evaluation.export.main"),
        (cli.embed, "src.cli.features"),
        (cli.report, "src.reporting.report.main"),
        (cli.deliver, "src.runs.delivery.main"),
    ],
)
def test_ctrl_c_is_its_status_and_no_traceback(typed, monkeypatch, entry, interrupted):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(interrupted, interrupt)
    assert typed(entry) == (130, "", "")


def test_a_lack_of_memory_is_found_below_what_was_made_of_it():
    """An error that was raised in the handling of another is a lack of memory if the first one was."""
    try:
        try:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        except RuntimeError:
            raise UsageError("backbone: does not take such images") from None
    except UsageError as error:
        assert "can't allocate" in str(cli._lack_of_memory(error))  # noqa: PT017
    assert cli._lack_of_memory(UsageError("experiment=out of memory: there is no such")) is None


def test_known_keys_reach_into_every_support_set():
    keys = explain.known_keys()
    assert {"k", "queue_size", "support.forget", "projector.hidden", "augment.view1.blur", "seed"} <= set(keys)


@pytest.mark.parametrize(
    ("typed", "given"),
    [
        ("k=50", "k=choice(50)"),
        ("k=50,100", "k=50,100"),
        ("k=choice(50)", "k=choice(50)"),
        ("k=interval(1,9)", "k=interval(1,9)"),
        ("optimizer.betas=[0.9,0.95]", "optimizer.betas=choice([0.9,0.95])"),
        ("tracking.experiment='a, b'", "tracking.experiment=choice('a, b')"),
        ("data.limit=null", "data.limit=null"),
        ("jobs=2", "jobs=2"),
        ("resume=never", "resume=never"),
        ("method=nnclr", "method=nnclr"),
        ("hydra/launcher=slurm", "hydra/launcher=slurm"),
        ("hydra.launcher.partition=gpu", "hydra.launcher.partition=gpu"),
        ("+sweep=support_size", "+sweep=support_size"),
        ("--multirun", "--multirun"),
        ("k=", "k="),
        ("k=(", "k=("),
    ],
)
def test_what_hydra_leaves_to_the_sweeper(typed, given):
    """A plain value is rewritten as a choice, which Hydra leaves to the sweeper."""
    assert cli._for_the_sweeper(typed) == given


def test_jobs_are_composed_of_the_files_that_the_sweep_is_composed_of(typed, cache_dir, tmp_path, monkeypatch):
    shutil.copytree(CONF, tmp_path / "conf")
    written = {
        "conf/seven.yaml": "defaults: [train, _self_]\nseed: 7",
        "mine/nine.yaml": "defaults: [seven, _self_]\nepochs: 9",
        "more/augment/none.yaml": "defaults: [symmetric]\ninterpolation: bilinear",
    }
    write_files(tmp_path, written)
    commands = []

    def run(self, sweep, jobs, swept, at_a_time):
        self.sweep = sweep
        commands.extend(self.command(job) for job in jobs)
        return iter(())

    monkeypatch.setattr(JobLauncher, "run", run)
    files = [f"--config-path={tmp_path}/conf", "--config-dir=mine", "--config-name=nine", "--multirun"]
    files.append(f"hydra.searchpath=[file://{tmp_path}/more]")
    settings = ["data=digits", f"data.cache_dir={cache_dir}", "tracking=jsonl", "augment=none"]
    status, _, said = typed(cli.train, *files, *settings, "k=5")
    assert status == 1, said
    ((_, _, _, *job),) = commands
    _, shown, _ = typed(cli.train, "--cfg", "job", *job)
    assert {"seed: 7", "epochs: 9", "  interpolation: bilinear", "k: 5"} <= set(shown.splitlines())


def test_a_key_of_a_chosen_option_is_taken_away_in_a_sweep_too(typed):
    line = "--multirun optimizer=adamw ~optimizer.betas seed=0,1 dry_run=true"
    status, _, stderr = typed(cli.train, *line.split())
    assert (status, stderr) == (0, "")


def test_a_traceback_can_be_asked_for(command):
    done = command("src.train", "epocs=3", environment={"HYDRA_FULL_ERROR": "1"})
    assert "Traceback" in done.stderr


NUMBERS = "0 1 -1 1.5 nan inf -inf 1e400 0x10 1_000 [1,2] [] [nan] [-1,2] [1e400] [null] 1,2"
TEXTS = "true null abc {a:1} {} ${seed} ${nope} ${ ??? é a=b choice(1,2) interval(0,1) - \\ ' [ cuda:x ../x ~"
VALUES = [*NUMBERS.split(" "), *TEXTS.split(" "), "", "a b", "a\nb", "9" * 20, "a" * 3000]
GROUPS = {
    folder.name: ["", "nope", *(path.stem for path in sorted(folder.glob("*.yaml")))]
    for folder in sorted(CONF.iterdir())
    if folder.is_dir() and folder.name not in ("hydra", "sweep", "shared")
}
STRANGE_KEYS = ["", "nope", "a.b", "hydra.run.dir", "data@x", "k.k", "=", "_target_"]
override = st.builds(
    "".join,
    st.tuples(
        st.sampled_from(["", "", "", "+", "++", "~"]),
        st.sampled_from(explain.known_keys() + STRANGE_KEYS),
        st.sampled_from(["=", "=", "=", ""]),
        st.sampled_from(VALUES),
    ),
)
choice = st.sampled_from([f"{group}={option}" for group, options in GROUPS.items() for option in options])
line = st.lists(st.one_of(override, override, choice), min_size=1, max_size=5)


CASES = int(os.environ.get("CASES", "60"))


def composed_or_explained(overrides):
    """The config, or the line that the command would print."""
    try:
        return parsed(*overrides)
    except (HydraException, OmegaConfBaseException) as error:
        return explain.explain_composition(error)
    except (UsageError, OSError) as error:
        return str(error)
    except Exception as error:
        if not cli._is_from_hydra(error):
            raise
        return explain.explain_composition(error)


@settings(max_examples=CASES, suppress_health_check=list(HealthCheck))
@given(overrides=line)
def test_any_line_composes_to_what_can_be_built_or_is_explained(overrides):
    cfg = composed_or_explained(overrides)
    if isinstance(cfg, str):
        assert "\n" not in cfg
        return
    module = torch.nn.Linear(2, 2)
    module(torch.ones(1, 2)).sum().backward()
    optim.build(cfg.optimizer, module, cfg.batch_size).step()
    assert optim.schedule(cfg.schedule, 3, total_steps=10, warmup_steps=2) >= 0
    for view in (cfg.augment.view1, cfg.augment.view2):
        maker = ViewMaker(view, cfg.augment.interpolation, 16, [0.5] * 3, [0.5] * 3)
        assert maker(torch.zeros(2, 3, 16, 16, dtype=torch.uint8)).isfinite().all()


@pytest.mark.slow
@settings(max_examples=max(3, CASES // 15), suppress_health_check=list(HealthCheck))
@given(overrides=line)
def test_any_line_of_the_real_command_is_listed_or_one_line_and_status_2(command, tmp_path, overrides):
    done = command("src.train", *overrides, "dry_run=true")
    assert done.returncode in (0, 2), done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == 0 or done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
