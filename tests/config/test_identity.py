from copy import deepcopy
from dataclasses import asdict, make_dataclass
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from src.config import identity
from src.config.parse import parse
from src.config.renamed import modern
from src.config.schema import Contrast
from src.errors import UsageError
from tests.composing import parsed


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (["method=kmclr", "support.forget=reset", "support.half_life=5"], ["method=kmclr"]),
        (["method=kmclr", "support.forget=none", "support.forget_every=7"], ["method=kmclr", "support.forget=none"]),
        (["support.refit_every=9", "support.refit_window=999"], []),
        (["support.shards=ranks"], []),
        (["method=nnclr", "objective.same_prototype=negative"], ["method=nnclr"]),
        (["optimizer=adamw", "+optimizer.momentum=0.5"], ["optimizer=adamw"]),
        (["optimizer=sgd", "+optimizer.clip_trust=true"], ["optimizer=sgd"]),
        (["optimizer.weight_decay=0", "optimizer.decay_all=true"], ["optimizer.weight_decay=0"]),
        (["+schedule.gamma=0.5"], []),
        (["objective.off_diagonal=0.5"], []),
        (["augment.view1.blur=0", "augment.view1.blur_sigma=[1,2]"], ["augment.view1.blur=0"]),
        (["method=nnclr", "queue_size=0"], ["method=nnclr", "support=none"]),
        (["method=kmclr", "support=queue"], ["method=nnclr"]),
        (["method=nnclr", "support=kmeans", "k=50"], ["method=kmclr", "k=50"]),
        (["objective.support_weight=1", "objective.predictor_hidden=4096"], ["objective=published"]),
        (["method=nnclr", "support=none", "objective=nt_xent"], ["method=simclr"]),
        (["objective=teacher", "support=none", "objective.neighbours=5"], ["objective=teacher", "support=none"]),
        (["data.draft=true"], []),  # the data's fingerprint tells
        (
            ["objective=relation", "support=none", "objective.student_temperature=0.5"],
            ["objective=relation", "support=none"],
        ),
        (["method=simclr", "search=torch"], ["method=simclr"]),  # all searches find the same neighbours
        (["method=nnclr", "queue_size=0", "search=ivf"], ["method=nnclr", "support=none"]),
        (["method=nnclr", "support=none", "search=ivf"], ["method=nnclr", "support=none"]),
        (["optimizer.weight_decay=0", "optimizer.clip_trust=true"], ["optimizer.weight_decay=0"]),
        (["data.final=true", "data.val_fraction=0.2", "data.split_seed=3"], ["data.final=true"]),
    ],
)
def test_what_has_no_effect_and_how_it_was_typed_do_not_count(one, other):
    """Two command lines have one hash if they differ in settings without an effect or in how they are typed."""
    assert identity.config_hash(parsed(*one)) == identity.config_hash(parsed(*other))


@pytest.mark.parametrize(
    "override",
    [
        "support.half_life=5",
        "objective.same_prototype=negative",
        "augment.view1.brightness=0.1",
        "optimizer.decay_all=true",
        "support.metric=euclidean",
    ],
)
def test_what_has_an_effect_counts(override):
    base = ["method=kmclr", "support.forget=decay"]
    assert identity.config_hash(parsed(*base, override)) != identity.config_hash(parsed(*base))


def test_a_relation_to_nothing_is_another_run_than_byol_whose_targets_pull_twice_as_strongly():
    relation, byol = (parsed(f"objective={name}", "support=none") for name in ("relation", "teacher"))
    assert identity.config_hash(relation) != identity.config_hash(byol)


def test_how_much_other_dimensions_count_matters_where_there_is_decorrelation():
    """``objective.off_diagonal`` changes the hash where ``objective.decorrelation`` is not 0."""
    one, other = (parsed("objective.decorrelation=0.02", f"objective.off_diagonal={each}") for each in (0.1, 0.2))
    assert identity.config_hash(one) != identity.config_hash(other)


# Settings that never change the hash, and groups of settings that do so only with some options.
NEVER = {"data.background", "data.cache_dir", "data.draft", "data.on_error", "data.root", "device", "dry_run", "resume"}
NEVER |= {"on_collapse", "augment.view1.blur_sigma", "augment.view2.blur_sigma", "objective.off_diagonal"}
REFIT = {"support.half_life", "support.refit_every", "support.refit_window"}
STEPS = {"schedule.gamma", "schedule.milestones"}
TRUST = {"optimizer.clip_trust", "optimizer.trust_coefficient"}


def set_otherwise(cfg, key):
    """A copy in which this setting has another value, legal or not."""
    node = made = deepcopy(cfg)
    *path, leaf = key.split(".")
    for part in path:
        node = getattr(node, part)
    value = getattr(node, leaf)
    other = [*value, 1] if isinstance(value, list) else f"{value}x" if isinstance(value, str) else value + 1
    setattr(node, leaf, not value if isinstance(value, bool) else other)
    return made


@pytest.mark.parametrize(
    ("choices", "idle"),
    [
        (["method=kmclr", "optimizer=sgd", "schedule=step"], REFIT | TRUST | {"optimizer.betas", "support.shards"}),
        (["method=nnclr"], STEPS | {"objective.same_prototype", "optimizer.betas", "support.shards"}),
        (
            ["method=nnclr", "data.final=true", "data.limit=100", "augment.view1.jitter=0"],
            STEPS
            | {f"augment.view1.{key}" for key in ("brightness", "contrast", "saturation", "hue")}
            | {"objective.same_prototype", "optimizer.betas", "support.shards", "data.val_fraction"},
        ),
        (
            ["method=nnclr", "optimizer.weight_decay=0"],
            STEPS | TRUST | {"optimizer.decay_all", "objective.same_prototype", "optimizer.betas", "support.shards"},
        ),
        (["method=nnclr", "objective=teacher"], STEPS | {"optimizer.betas", "support.shards"}),
        (
            ["method=simclr", "optimizer=adamw", "schedule=constant"],
            STEPS | TRUST | {"objective.same_prototype", "optimizer.momentum"},
        ),
    ],
)
def test_every_setting_counts_but_those_without_an_effect(choices, idle):
    cfg = parsed(*choices)
    beside = ("evaluation.", "tracking.", "checkpoint.")
    keys = {key for key in identity.flat(cfg) if not (key.startswith(beside) or key.endswith("name"))}
    base = identity.config_hash(cfg)
    assert {key for key in keys if identity.config_hash(set_otherwise(cfg, key)) == base} == NEVER | idle


def test_a_field_that_is_added_changes_no_hash_and_no_saved_config():
    cfg = parsed("method=nnclr")
    newer = make_dataclass("Contrast", [("margin", float, 0.0)], bases=(Contrast,))
    before = identity.config_hash(cfg), identity.without_neutral(cfg)
    cfg.objective = newer(**asdict(cfg.objective))
    assert (identity.config_hash(cfg), identity.without_neutral(cfg)) == before
    cfg.objective.margin = 0.1
    assert identity.config_hash(cfg) != before[0]


@pytest.mark.parametrize("method", ["simclr", "nnclr", "kmclr"])
def test_a_saved_config_means_the_same_again(method):
    cfg = parsed(f"method={method}")
    saved = OmegaConf.create(identity.without_neutral(cfg))
    assert "on_error" not in saved.data
    assert parse(saved) == cfg


def test_a_config_saved_when_the_method_held_everything_means_the_same():
    old = asdict(parsed("method=kmclr", "k=50"))
    support, objective = old.pop("support"), old.pop("objective")
    old["method"] = {
        **{
            key: value
            for key, value in (support | objective).items()
            if key not in ("name", "_target_", "decorrelation", "off_diagonal", "shards")
        },
        "name": "kmclr",
        "projector": old.pop("projector"),
    }
    assert parse(OmegaConf.create(old)) == parsed("method=kmclr", "k=50")
    identity.check_same(old, parsed("method=kmclr", "k=50"), Path("here"))
    with pytest.raises(UsageError, match=r"support\.forget was reset and is none"):
        identity.check_same(old, parsed("method=kmclr", "k=50", "support.forget=none"), Path("here"))


@pytest.mark.parametrize(
    ("then", "name"),
    [
        ({"method.name": "kmclr", "method.prototype_weight": "0.0"}, "nt_xent"),
        ({"method.name": "kmclr", "method.support_weight": "0.3"}, "mixed"),
        ({"method.name": "nnclr"}, "published"),  # before there was a weight, stored positives had all of the loss
        ({"method.name": "simclr"}, "nt_xent"),
    ],
)
def test_a_record_of_then_is_of_the_loss_of_then(then, name):
    """The settings of a record from before there were objectives say which of today's objectives it used."""
    assert modern(then | {"method.predictor_hidden": "4096"})["objective.name"] == name


def test_the_hash_is_of_what_matters():
    """Places, devices and settings of the evaluation leave the hash; settings of the training change it."""
    base = identity.config_hash(parsed())
    same = ["output_dir=x", "resume=never", "device=cpu", "tracking=jsonl", "data.root=y", "checkpoint.every=3"]
    same += ["evaluation.every=3", "evaluation=original", "evaluation.knn_k=20"]
    assert {identity.config_hash(parsed(each)) for each in same} == {base}
    different = ["k=200", "seed=1", "objective.temperature=0.3", "data.limit=5000", "precision=float32", "epochs=9"]
    assert len({base, *(identity.config_hash(parsed(each)) for each in different)}) == 1 + len(different)
    assert identity.config_hash(parsed("optimizer.lr=0.4")) == base  # the default, spelt out


@pytest.mark.parametrize(
    ("recipe", "kept"),
    [
        (["experiment=original"], "d604a999"),
        (["experiment=original", "method=simclr"], "7d7c57b9"),
        (["experiment=mnn"], "14c352b3"),
        (["experiment=solo_nnclr"], "4c394b1e"),
    ],
)
def test_the_recipes_of_papers_keep_their_hashes(recipe, kept):
    """With another hash, every run that is there would be trained again."""
    assert identity.config_hash(parsed(*recipe)) == kept


def test_names_are_readable():
    assert identity.run_name(parsed("k=50", "seed=2")) == "kmclr-k50-cifar100-resnet18-seed2"
    assert identity.run_name(parsed("method=nnclr", "data=digits")) == "nnclr-queue65536-digits-resnet18-seed0"
    assert identity.run_name(parsed("method=simclr")) == "simclr-cifar100-resnet18-seed0"
    assert identity.run_name(parsed("method=nnclr", "support=none")) == "nothing_stored-cifar100-resnet18-seed0"


def test_what_prototypes_are_reclustered_from_is_stored_too():
    """The size of a support set includes the window of embeddings that re-clustering needs."""
    refit = ["support.refit=faiss", "support.refit_window=600"]
    assert identity.support_set_size(parsed("method=kmclr", "k=50")) == 50
    assert identity.support_set_size(parsed("method=kmclr", "k=50", *refit)) == 50 + 600


def test_check_same_names_the_keys_that_differ():
    cfg = parsed("k=200")
    identity.check_same(asdict(cfg), cfg, Path("here"))
    identity.check_same({key: str(value) for key, value in identity.flat(cfg).items()}, cfg, Path("here"))
    identity.check_same(asdict(cfg), parsed("k=200", "tracking=jsonl", "data.root=elsewhere"), Path("here"))
    with pytest.raises(
        UsageError, match=r"here is of another configuration .seed was 0 and is 1, k was 200 and is 400."
    ):
        identity.check_same(asdict(cfg), parsed("seed=1"), Path("here"))
    idle = asdict(parsed("k=200", "support.forget=none", "support.forget_every=7"))
    identity.check_same(idle, parsed("k=200", "support.forget=none"), Path("here"))
    limited = identity.flat(parsed("k=200", "data.limit=5000")) | {"support_set_size": 200, "skipped_images": 0}
    with pytest.raises(UsageError, match=r"data.limit was 5000 and is None"):
        identity.check_same(limited, cfg, Path("here"))
    with pytest.raises(UsageError, match=r"data.limit was None and is 5000"):  # a saved config lacks what is neutral
        identity.check_same(identity.without_neutral(cfg), parsed("k=200", "data.limit=5000"), Path("here"))


def test_flatten_leaves_out_what_does_not_apply():
    flat = identity.flat(parsed("method=nnclr"))
    assert flat["queue_size"] == 65536
    assert flat["augment.view1.crop_scale"] == [0.08, 1.0]
    assert "k" not in flat
    assert "data.limit" not in flat


def test_minus_zero_is_zero():
    one, other = (parsed(f"optimizer.weight_decay={zero}", f"augment.view1.flip={zero}") for zero in ("0", "-0.0"))
    assert identity.config_hash(one) == identity.config_hash(other)
    assert str(other.optimizer.weight_decay) == "0.0"
