import re
import shlex

import pytest
import yaml

from scripts.workbench import compose
from src.config.chosen import PRESETS
from src.errors import UsageError
from src.system.environment import CONF
from tests.composing import options
from tests.pages import write_files

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


def stored(cfg):
    return cfg.support, cfg.k, cfg.queue_size


@pytest.mark.parametrize(
    ("experiment", "support", "objective"),
    [
        ("solo_nnclr", "queue", "published"),
        ("original_kmclr", "kmeans", "published"),
        ("imagenet_kmclr", "kmeans", "published"),
        ("mnn", "queue", "teacher"),
    ],
)
def test_what_replaces_an_option_of_an_experiment_is_as_without_the_experiment(experiment, support, objective):
    for other in {*options("support")} - {support}:
        typed = f"support={other}"
        assert stored(compose(f"experiment={experiment}", typed)) == stored(compose(typed))
    for other in {*options("objective")} - {objective}:
        typed = [f"objective={other}", "support=none"]  # the one support set that all of them can have
        assert compose(f"experiment={experiment}", *typed).objective == compose(*typed).objective


# Options and experiments of one's own; those whose names begin with "misspelt" have keys that nothing has.
OWN = {
    "support/seventy.yaml": "# @package _global_\ndefaults: [kmeans, _self_]\nk: 70\nsupport: {forget: decay}\n",
    "support/small.yaml": "# @package _global_\ndefaults: [queue, _self_]\nqueue_size: 512\n",
    "support/misspelt.yaml": "defaults: [evolving, _self_]\nwieght: 3\n",
    "support/misspelt_two.yaml": "# @package _global_\ndefaults: [kmeans, _self_]\nsupport: {forgett: decay}\n",
    "objective/misspelt.yaml": "defaults: [mixed, _self_]\ntemprature: 0.5\n",
    "experiment/labelled.yaml": "# @package _global_\ndefaults: [override /method: nnclr]\nqueue_size: 256\n"
    "support: {label: our queue, colour: '#123456', shards: ranks}\nobjective: {temperature: 0.7}\n",
    "experiment/few.yaml": "# @package _global_\ndefaults: [override /support: evolving]\nsupport: {size: 64}\n",
    "experiment/misspelt.yaml": "# @package _global_\ndefaults: [override /support: misspelt]\n",
}


@pytest.fixture
def own(tmp_path):
    """A function that composes a line of overrides with the options of ``OWN``."""
    write_files(tmp_path, OWN)
    return lambda line: compose(f"hydra.searchpath=[file://{tmp_path}]", *shlex.split(line))


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("support=misspelt", "support.wieght"),
        ("support=misspelt_two", "support.forgett"),
        ("objective=misspelt", "objective.temprature"),
        ("experiment=demo support=misspelt", "support.wieght"),
        ("experiment=mnn support=misspelt_two", "support.forgett"),
        ("experiment=mnn objective=misspelt", "objective.temprature"),
        ("experiment=misspelt", "support.wieght"),
        ("experiment=misspelt support=misspelt", "support.wieght"),
        ("'++objective={temprature: 0.2}'", "objective.temprature"),
        ("'++support={precision: bfloat16}'", "support.precision"),
        ("support=none '+support={metric: euclidean}'", "support.metric"),
        ("experiment=mnn objective=mixed 'objective={neighbours: 4}'", "objective.neighbours"),
        ("experiment=labelled support=none '++support={metric: euclidean}'", "support.metric"),
        ("experiment=labelled support=none ++support.metric=euclidean", "support.metric"),
    ],
)
def test_a_key_that_an_option_lacks_is_refused_wherever_it_stands(own, line, key):
    with pytest.raises(UsageError, match=f"{re.escape(key)}: "):
        own(line)


@pytest.mark.parametrize("experiment", ["solo_nnclr", "original_kmclr", "imagenet_kmclr", "labelled", "few", "demo"])
def test_an_option_of_ones_own_keeps_its_settings(own, experiment):
    for support in ("seventy", "small"):
        assert stored(own(f"experiment={experiment} support={support}")) == stored(own(f"support={support}"))


def test_a_control_has_no_label_of_what_it_replaces(own):
    for support in ("none", "kmeans", "evolving"):
        replaced = own(f"experiment=labelled support={support}")
        assert replaced.support == own(f"support={support}").support
        assert replaced.objective.temperature == 0.7
    kept = own("experiment=labelled support=queue")
    assert (kept.method.label, kept.method.colour, kept.queue_size) == ("our queue", "#123456", 256)


def test_typed_values_stay_beside_an_option_that_replaces_another(own):
    assert own("experiment=few support=seventy k=9 support.half_life=5").k == 9
    assert own("experiment=labelled support=none support.label=mine").method.label == "mine"
    assert own("experiment=labelled support=evolving '++support={size: 9, every: 7}'").support.size == 9
    assert own("experiment=labelled support=evolving ~support.label").method.label is None
    assert own("experiment=solo_nnclr support=none ~queue_size").queue_size is None
    assert own("experiment=few support=evolving").support.size == 64


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("experiment=mnn method=kmclr", "method=kmclr: experiment=mnn chooses support=queue; type support=kmeans too"),
        ("experiment=mnn method=simclr", "chooses support=queue; type support=none too, or leave method out"),
        (
            "experiment=teacher method=simclr",
            "experiment=teacher chooses objective=teacher; type objective=nt_xent too",
        ),
        ("experiment=mnn \"method='kmclr'\"", "method=kmclr: experiment=mnn chooses support=queue"),
        ("experiment=mnn 'method= kmclr'", "method=kmclr: experiment=mnn chooses support=queue"),
        ("'experiment=[demo,mnn]' method=kmclr", r"experiment=\[demo,mnn\] chooses support=queue"),
    ],
)
def test_a_method_of_which_an_experiment_makes_another_is_refused(typed, says):
    with pytest.raises(UsageError, match=says):
        compose(*shlex.split(typed))


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
