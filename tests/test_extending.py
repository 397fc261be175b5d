"""docs/extending.md, on parts of one's own: its files and commands work, in a folder that holds nothing else."""

import importlib.util
import json
import os
import re
import shlex
import subprocess

import pytest
import torch
from torch import nn

from src.methods.base import Parts
from src.support.base import Space
from src.support.search import TorchSearch
from tests.conftest import PROJECT
from tests.pages import files_of, write_files

TUTORIAL = (PROJECT / "docs" / "extending.md").read_text()
FILES = files_of(TUTORIAL)
(COMMANDS,) = re.findall(r"^```bash\n(.*?)^```$", TUTORIAL, re.MULTILINE | re.DOTALL)
# One worker runs all of these tests, because they share what the tutorial's commands have made.
pytestmark = pytest.mark.xdist_group("extending")


@pytest.fixture(scope="module")
def command(python, folder):
    """Run ``python -m MODULE ARGUMENTS`` in the folder; returns what it printed."""

    def run(module, *arguments, status=0):
        fixed = {"PYTHONPATH": f"{PROJECT}:{folder / 'mine'}", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        line = [python, "-m", module, *arguments]
        done = subprocess.run(line, cwd=folder, env=os.environ | fixed, capture_output=True, text=True)
        assert done.returncode == status, done.stderr
        return done.stdout if status == 0 else done.stderr

    return run


def run_in(folder, pattern):
    """The record, and the losses by step, of the only run whose directory matches the pattern."""
    (directory,) = folder.glob(pattern)
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["metrics"]["train/loss"] for row in rows if "train/loss" in row["metrics"]}
    return json.loads((directory / "run.json").read_text()), losses


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fresh")
    write_files(folder, FILES)
    return folder


@pytest.fixture(scope="module")
def package(folder):
    """The tutorial's module, imported here."""
    spec = importlib.util.spec_from_file_location("my_package", folder / "mine" / "my_package.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tiny(small):
    """Overrides that make the tutorial's commands fast; these name an experiment themselves."""
    return [*(each for each in small if not each.startswith("experiment=")), "tracking=jsonl"]


@pytest.fixture(scope="module")
def typed(command, tiny):
    """What the tutorial's commands print, with smaller settings."""
    printed = []
    for line in COMMANDS.replace("queue_size=512", "queue_size=32 support.size=32").splitlines():
        _, _, module, *arguments = shlex.split(line)
        printed.append(command(module, *arguments, *(tiny if module == "src.train" else ["tracking=jsonl"])))
    return printed


def test_one_worker_runs_all_of_these_tests(request):
    """Of each worker that runs some of them, the commands would be run anew."""
    if getattr(request.config.option, "loadgroup", False):  # an option of pytest-xdist
        assert request.node.nodeid.endswith("@extending")


def test_it_fits_on_a_page():
    lines = TUTORIAL.splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 120


def test_the_momentum_encoder_follows_and_learns_nothing(package):
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(48, 6))
    byol = package.BYOL(Parts(encoder, nn.Linear(6, 4), 6, 4, None), momentum=0.75, hidden=8)
    views = torch.rand(2, 5, 3, 4, 4)
    outcome = byol(*views)
    assert 0 <= outcome.loss.item() <= 8
    outcome.loss.backward()
    assert {name.split(".")[0] for name, p in byol.named_parameters() if p.grad is not None} == {
        *("encoder", "projector", "predictor")
    }
    before, online = byol.target[0][1].weight.clone(), encoder[1].weight
    with torch.no_grad():
        online.add_(1)
    byol.after_step(0.5)
    assert torch.allclose(byol.target[0][1].weight, 0.75 * before + 0.25 * online)


def test_the_reservoir_is_a_uniform_sample(package):
    counts = torch.zeros(120)
    for seed in range(400):
        torch.manual_seed(seed)
        reservoir = package.Reservoir(Space(4, 10, TorchSearch()), size=12)
        for batch in torch.arange(120).split(10):
            reservoir.update(torch.rand(10, 4), batch, batch % 10)
        assert reservoir.ready
        assert len(set(reservoir.images_N.tolist())) == 12
        counts[reservoir.images_N] += 1
    # Each of 120 is kept with probability 1/10, 40 times of 400, with a standard deviation of 6.
    assert counts.view(12, 10).mean(1).sub(40).abs().max() < 4 * 6 / 10**0.5
    assert counts.sub(40).abs().max() < 5 * 6


def test_a_batch_of_which_nothing_is_kept_changes_no_entry(package):
    reservoir = package.Reservoir(Space(4, 10, TorchSearch()), size=1)
    reservoir.ring.total = 10**12
    reservoir.update(torch.rand(5, 4), torch.arange(5), torch.arange(5))
    assert not reservoir.ring.rows_ND.any()
    assert reservoir.ring.total == 10**12 + 5


@pytest.mark.slow
def test_the_commands_train_sweep_and_report(folder, typed):
    byol, _ = run_in(folder, "multirun/byol-digits-*")
    assert (byol["status"], byol["params"]["method.momentum"]) == ("FINISHED", "0.996")
    assert byol["params"]["support_set_size"] == "0"
    reservoir, _ = run_in(folder, "multirun/reservoir-32-digits-*")
    assert (reservoir["status"], reservoir["params"]["support_set_size"]) == ("FINISHED", "32")
    assert reservoir["params"]["support_bytes"] == str(32 * 16 * 4)
    assert {"support/self_hit", "support/label_agreement", "support/age_steps"} <= reservoir["metrics"].keys()
    assert "2 of 2 jobs finished" in typed[1]
    page = (folder / "results/demo/table.md").read_text()
    labels = [line.split("|")[1].strip() for line in page.splitlines()[6:] if line.startswith("|")]
    assert [label for label in labels if label != "untrained"] == ["NNCLR", "BYOL", "Reservoir"]
    drawn = (folder / "results/demo/plot.svg").read_text()
    assert "#009e73" in drawn
    assert "#cc79a7" in drawn


@pytest.mark.slow
@pytest.mark.parametrize(
    ("whole", "settings"),
    [
        ("byol-digits-*", ["method=byol", "method.momentum=0.996"]),
        ("reservoir-32-digits-*", ["support=reservoir", "support.size=32"]),
    ],
)
def test_a_run_that_is_stopped_ends_as_an_unbroken_one(command, folder, typed, small, whole, settings):
    broken = f"broken-{whole[0]}"
    train = ["src.train", "--config-dir", "mine", *settings, *small, "tracking=jsonl", f"output_dir={broken}"]
    command(*train, "max_minutes=0.00001", status=75)
    assert "continued at step 1" in command(*train)
    before, after = run_in(folder, f"multirun/{whole}"), run_in(folder, broken)
    assert after[1] == before[1]
    assert after[0]["tags"]["config_hash"] == before[0]["tags"]["config_hash"]
    figures = [{key: value for key, value in each["metrics"].items() if "/" in key} for each, _ in (before, after)]
    apart = {key for key in figures[0] if not key.startswith(("time/", "memory/"))}
    assert {key: figures[1][key] for key in apart} == {key: figures[0][key] for key in apart}


@pytest.mark.slow
def test_methods_of_both_kinds_are_swept(command, tiny):
    sweep = ["src.train", "--config-dir", "mine", "--multirun", "method=byol,simclr", "experiment=demo", "jobs=2"]
    assert "2 of 2 jobs finished" in command(*sweep, *tiny, "seed=1", "epochs=1")
    listed = command(*sweep, *tiny, "seed=1", "epochs=1", "dry_run=true")
    assert re.search("finished .* byol-digits.*\n.*finished .* simclr-digits.*\n2 jobs, 0 to run", listed)


@pytest.mark.slow
def test_a_run_is_evaluated_again(command, folder, typed):
    (directory,) = folder.glob("multirun/byol-digits-*-seed0-*")
    assert "test/linear_top1 " in command("src.evaluate", f"checkpoint={directory}")


@pytest.mark.slow
def test_a_mistake_is_one_line(command, folder):
    misspelt = FILES["mine/method/byol.yaml"].replace("momentum", "momentm")
    write_files(folder, {"mine/method/misspelt.yaml": misspelt})
    for arguments, says in {
        "method=byol method.momentm=0.9": "method.momentm: unknown key, .*; did you mean method.momentum?",
        "--multirun method=byol,simclr method.momentm=0.9": "method.momentm: unknown key, .* method.momentum?",
        "method=misspelt": "method.momentm: unknown key, .*; did you mean method.momentum?",
        "method=byol method.momentum=1.5": "method.momentum=1.5: must be 1 or less",
        "method=byol +method.hidden=0": "method.hidden=0: must be 1 or more",
    }.items():
        (line,) = command("src.train", "--config-dir", "mine", *arguments.split(), status=2).splitlines()
        assert re.match(f"error: {says}", line)


@pytest.mark.slow
def test_a_run_names_its_code_and_continues_with_edited_code_under_other_conditions(command, folder, small):
    train = ["src.train", "--config-dir", "mine", "method=byol", *small, "tracking=jsonl", "output_dir=edited"]
    command(*train, "max_minutes=0.00001", status=75)
    before = run_in(folder, "edited")[0]["tags"]["code/my_package"]
    write_files(folder, {"mine/my_package.py": FILES["mine/my_package.py"] + "# Edited."})
    command(*train)
    write_files(folder, {"mine/my_package.py": FILES["mine/my_package.py"]})
    tags = run_in(folder, "edited")[0]["tags"]
    assert re.fullmatch(r"\w{16}", before)
    assert tags["conditions_changed"] == f"code/my_package was {before} and is {tags['code/my_package']} from step 1 on"


STRIPES = "{defaults: [/shared/data@_here_], name: stripes, _target_: net.stripes, options: {images: 300}}"
NET = """
import numpy, torch
from PIL import Image
from src.data.decoding import Contents, LazyImage, Part, Source

class Net(torch.nn.Sequential):
    def __init__(self, width):
        super().__init__(torch.nn.Conv2d(3, width, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())

def stripes(images):
    def part(seed):
        noise = numpy.random.default_rng(seed).integers(0, 99, (images, 16, 16), dtype=numpy.uint8)
        noise[::2, ::2] += 100
        noise[1::2, :, ::2] += 100
        pictures = [LazyImage(f"stripes {i}", lambda i=i: Image.fromarray(noise[i])) for i in range(images)]
        return Part([i % 2 for i in range(images)], pictures)
    return Source("1", lambda: Contents(["rows", "columns"], part(0), part(1)))
"""


@pytest.mark.slow
def test_a_backbone_and_a_data_set(command, folder, small):
    write_files(
        folder,
        {
            "mine/net.py": NET,
            "mine/backbone/net.yaml": "{name: net, _target_: net.Net, options: {width: 8}}",
            "mine/data/stripes.yaml": STRIPES,
        },
    )
    train = ["--config-dir", "mine", *small, "tracking=jsonl", "data=stripes", "backbone=net", "method=simclr"]
    assert "finished; test/knn_top1" in command("src.train", *train)
    (directory,) = folder.glob("multirun/simclr-stripes-net-*")
    again = ["--config-dir", "mine", f"checkpoint={directory}", "data=stripes", "data.options.images=200"]
    assert re.search(r"transfer/stripes-\w{8}/test/linear_top1 ", command("src.evaluate", *again))
