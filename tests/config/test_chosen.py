import pytest
import yaml

from scripts.workbench import compose
from src.config.chosen import PRESETS
from src.errors import UsageError
from src.system.environment import CONF
from tests.composing import options

STUDIES = sorted({*options("experiment")} - {"original"})


@pytest.mark.parametrize("experiment", STUDIES)
def test_every_experiment_has_its_control(experiment):
    """A report advises to train it, and the page of sweeps names the override."""
    stores, control = (compose(f"experiment={experiment}", *more) for more in ([], ["support=none"]))
    assert (control.support.name, control.k, control.queue_size) == ("none", None, None)
    same = ("backbone", "optimizer", "schedule", "data", "augment", "projector", "epochs", "batch_size", "objective")
    assert all(getattr(control, group) == getattr(stores, group) for group in same)


@pytest.mark.parametrize("support", options("support"))
@pytest.mark.parametrize("experiment", STUDIES)
def test_every_experiment_takes_every_support_set(experiment, support):
    objective = (
        ["objective=mixed"] if experiment == "original_simclr" else []
    )  # SimCLR's makes no use of stored vectors
    assert compose(f"experiment={experiment}", f"support={support}", *objective).support.name == support


def test_what_makes_a_method_is_what_its_file_chooses():
    assert sorted(PRESETS) == options("method")
    for method, chosen in PRESETS.items():
        file = yaml.safe_load((CONF / f"method/{method}.yaml").read_text())
        assert all({f"override /{group}": option} in file["defaults"] for group, option in chosen.items())


def test_what_is_typed_stays_and_is_refused():
    with pytest.raises(UsageError, match=r"queue_size: only support=queue"):
        compose("experiment=solo_nnclr", "support=none", "queue_size=5")
    with pytest.raises(UsageError, match=r"support\.metric: the chosen options do not have it"):
        compose("experiment=original_kmclr", "support=none", "support.metric=euclidean")
    assert compose("experiment=original_kmclr", "support=kmeans", "k=50").support.metric == "euclidean"


def test_an_option_of_ones_own_keeps_its_size(tmp_path):
    (tmp_path / "support").mkdir()
    own = "# @package _global_\ndefaults: [kmeans, _self_]\nk: 70\n"
    (tmp_path / "support/seventy.yaml").write_text(own)
    search = f"hydra.searchpath=[file://{tmp_path}]"
    cfg = compose(search, "experiment=solo_nnclr", "support=seventy")
    assert (cfg.support.name, cfg.k, cfg.queue_size) == ("kmeans", 70, None)


def test_an_objective_replaces_that_of_an_experiment_with_its_settings():
    assert compose("experiment=solo_nnclr", "objective=teacher").method.name == "mnn"
    assert compose("experiment=mnn", "objective=mixed").method.name == "nnclr"


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("experiment=mnn method=kmclr", "method=kmclr: experiment=mnn chooses support=queue; type support=kmeans too"),
        ("experiment=mnn method=simclr", "chooses support=queue; type support=none too, or leave method out"),
        (
            "experiment=teacher method=simclr",
            "experiment=teacher chooses objective=teacher; type objective=nt_xent too",
        ),
    ],
)
def test_a_method_of_which_an_experiment_makes_another_is_refused(typed, says):
    with pytest.raises(UsageError, match=says):
        compose(*typed.split())


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("experiment=teacher method=kmclr", "mnn_prototypes"),
        ("experiment=mnn method=nnclr", "mnn"),
        ("experiment=demo method=simclr", "simclr"),
        ("experiment=teacher method=simclr support=none objective=nt_xent", "simclr"),
        ("method=simclr support=queue objective=mixed", "nnclr"),
    ],
)
def test_a_method_beside_what_leaves_it_its_parts(typed, name):
    assert compose(*typed.split()).method.name == name
