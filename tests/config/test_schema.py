from dataclasses import replace

import pytest
from omegaconf import OmegaConf

from src.config import identity, schema
from src.config.parse import parse
from src.errors import UsageError
from src.system.environment import CONF
from tests.composing import composed, options, parsed


@pytest.mark.parametrize(
    ("group", "option"),
    [
        (path.name, option)
        for path in sorted(CONF.iterdir())
        if path.is_dir() and path.name not in ("experiment", "hydra", "sweep", "shared")  # no keys of a run
        for option in options(path.name)
    ],
)
def test_every_option_of_every_group_composes(group, option):
    extra = {"timm": ["backbone.name=resnet10t"], "ivf": ["method=nnclr"], "nt_xent": ["support=none"]}.get(option, [])
    cfg = parsed(f"{group}={option}", *extra)
    typed = {"timm": "resnet10t"}.get(option, option)
    named = {"support": cfg.support.name, "method": cfg.method.name, "objective": cfg.objective.name}
    assert named.get(group, getattr(cfg, group).name) == typed


@pytest.mark.parametrize("experiment", options("experiment"))
@pytest.mark.parametrize("method", ["simclr", "nnclr", "kmclr"])
def test_every_experiment_composes_with_every_method_unless_it_names_one(experiment, method):
    teachers = {"simclr": "byol", "nnclr": "mnn", "kmclr": "mnn_prototypes"}
    names_one = experiment.startswith(("original_", "solo_", "imagenet_"))
    named = experiment.rpartition("_")[2] if names_one else None
    named = {"mnn": "mnn", "teacher": teachers[method]}.get(experiment, named)  # named by their objective
    cfg = parsed(f"experiment={experiment}", *([] if names_one else [f"method={method}"]))
    assert cfg.method.name == (named or method)


def test_configs_of_the_same_parts_share_one_schema_which_none_of_them_changes(monkeypatch):
    first, other = composed("k=50", "epochs=3", "data.limit=9"), composed("k=400")
    cfg = parse(first)
    monkeypatch.setattr(OmegaConf, "structured", lambda _: pytest.fail("makes the schema again"))
    assert (parse(other).k, parse(other).data.limit) == (400, None)
    assert parse(first) == cfg


def test_k_and_queue_size_are_root_keys_in_any_order():
    assert parsed("k=200", "method=kmclr").k == parsed("method=kmclr", "k=200").k == 200
    assert parsed("queue_size=77", "method=nnclr").queue_size == 77
    assert parsed("method=simclr").k is None
    sizes = [identity.support_set_size(parsed(*each)) for each in (["method=simclr"], ["method=nnclr"], ["k=9"])]
    assert sizes == [0, 65536, 9]


def test_the_original_study_to_the_letter():
    cfg = parsed("experiment=original_kmclr", "k=200")
    assert (cfg.k, cfg.batch_size, cfg.epochs) == (200, 64, 500)
    assert (cfg.backbone.name, cfg.backbone.stem) == ("resnet18", "small_padded")
    o = cfg.optimizer
    assert (o.name, o.lr, o.scale_lr, o.momentum, o.weight_decay) == ("lars", 0.2, False, 0.9, 1e-6)
    assert (o.trust_coefficient, o.clip_trust) == (0.001, False)
    assert cfg.evaluation.online_lr == 0.01
    assert (cfg.schedule.name, cfg.schedule.warmup_epochs) == ("cosine", 10)
    assert (cfg.objective.temperature, cfg.projector.hidden, cfg.projector.out) == (0.1, [2048, 2048], 256)
    assert (cfg.objective.predictor_hidden, cfg.objective.support_weight, cfg.support.metric) == (4096, 1, "euclidean")
    assert (cfg.support.forget, cfg.support.forget_every) == ("reset", 3)
    one, two = cfg.augment.view1, cfg.augment.view2
    assert (one.crop_scale, one.flip, one.jitter, one.grey) == ([0.08, 1.0], 0.5, 0.8, 0.2)
    assert (one.brightness, one.contrast, one.saturation, one.hue) == (0.4, 0.4, 0.2, 0.1)
    assert (one.blur, one.solarize, two.blur, two.solarize) == (1.0, 0.0, 0.1, 0.2)
    assert (cfg.evaluation.epochs, cfg.evaluation.lr, cfg.evaluation.batch_size) == (90, [0.1], 128)
    assert cfg.data.val_fraction == 0.1
    cfg = parsed("experiment=original_nnclr")
    assert (cfg.queue_size, cfg.objective.predictor_hidden, cfg.objective.support_weight) == (98304, 4096, 1)


def test_nnclr_as_solo_learn_trains_it():
    cfg = parsed("experiment=solo_nnclr")
    assert (cfg.method.name, cfg.queue_size, cfg.epochs, cfg.batch_size) == ("nnclr", 65536, 1000, 256)
    assert (cfg.backbone.name, cfg.backbone.stem, cfg.data.name) == ("resnet18", "small_padded", "cifar100")
    assert cfg.objective == schema.Contrast("published", 0.2, support_weight=1.0, predictor_hidden=4096)
    assert cfg.projector == schema.Projector([2048, 2048], 256)
    lars = {"momentum": 0.9, "trust_coefficient": 0.02, "clip_trust": True}
    assert cfg.optimizer == schema.Optimizer("lars", 0.4, scale_lr=True, weight_decay=1e-5, **lars)
    assert (cfg.schedule.name, cfg.schedule.warmup_epochs) == ("cosine", 10)
    one, two = cfg.augment.view1, cfg.augment.view2
    assert two == replace(one, solarize=0.2)
    assert (one.crop_scale, one.flip, one.jitter, one.grey) == ([0.08, 1.0], 0.5, 0.8, 0.2)
    assert (one.brightness, one.contrast, one.saturation, one.hue) == (0.4, 0.4, 0.2, 0.1)
    assert (one.blur, one.solarize) == (0.0, 0.0)
    assert (cfg.evaluation.name, cfg.evaluation.online_lr) == ("linear", 0.1)


def test_mnn_as_its_authors_train_it():
    cfg = parsed("experiment=mnn")
    assert (cfg.method.name, cfg.queue_size, cfg.epochs, cfg.batch_size) == ("mnn", 4096, 200, 256)
    assert cfg.backbone.bn_splits == 8
    objective = schema.MNN("teacher", momentum=0.99, predictor_hidden=2048, neighbours=5)
    assert cfg.objective == objective
    assert cfg.projector == schema.Projector([2048], 128, final_norm=False)
    o = cfg.optimizer
    assert (o.name, o.lr, o.scale_lr, o.momentum, o.weight_decay) == ("sgd", 0.06, True, 0.9, 5e-4)
    assert o.decay_all
    assert (cfg.schedule.name, cfg.schedule.warmup_epochs) == ("cosine", 5)
    strong, weak = cfg.augment.view1, cfg.augment.view2
    assert strong.crop_scale == weak.crop_scale == [0.2, 1.0]
    assert (strong.flip, strong.jitter, strong.grey, strong.blur, strong.solarize) == (0.5, 0.8, 0.2, 0.5, 0.0)
    assert (strong.brightness, strong.contrast, strong.saturation, strong.hue) == (0.4, 0.4, 0.4, 0.1)
    assert (weak.flip, weak.jitter, weak.grey, weak.blur, weak.solarize) == (0.9, 0.0, 0.0, 0.0, 0.0)
    assert parsed("experiment=teacher", "support=none").method.name == "byol"
    assert parsed("experiment=teacher", "support=kmeans", "k=50").k == 50


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("objective.predictor_hidden=-1", "objective.predictor_hidden=-1: must be 0 or more"),
        ("k=2.5", "k=2.5: .*could not be converted to Integer"),
        ("epochs=-1", "epochs=-1: must be 0 or more"),
        ("batch_size=1", "batch_size=1: must be 2 or more"),
        ("seed=-1", "seed=-1: must be 0 or more"),
        (
            "backbone.bn_splits=3",
            "backbone.bn_splits=3: batch_size=256 has no such equal parts; choose a divisor of it",
        ),
        ("backbone.bn_splits=256", "backbone.bn_splits=256: parts of one image; choose fewer"),
        ("device=tpu", "device=tpu: choose one of auto, cpu, cuda"),
        ("precision=float8", "precision=float8: choose one of"),
        ("max_minutes=0", "max_minutes=0.0: must be above 0"),
        ("optimizer.lr=-1", "optimizer.lr=-1.0: must be above 0"),
        ("optimizer.lr=nan", "optimizer.lr=nan: must be (above 0|finite)"),
        ("objective.temperature=0", "objective.temperature=0.0: must be above 0"),
        ("support.forget=sometimes", "support.forget=sometimes: choose one of reset, decay, none"),
        ("search=ivf", "search=ivf: only support=queue can use it; choose search=auto for support=kmeans"),
        ("support.metric=l1", "support.metric=l1: choose one of spherical, euclidean"),
        ("data.val_fraction=1", "data.val_fraction=1.0: must be below 1"),
        ("augment.view1.blur=3", "augment.view1.blur=3.0: must be 1 or less"),
        ("augment.view2.hue=0.7", "augment.view2.hue=0.7: must be 0.5 or less"),
        ("augment.view1.crop_scale=[0.5,0.1]", r"augment.view1.crop_scale=\[0.5, 0.1\]: give \[low,high\]"),
        ("evaluation.lr=[]", r"evaluation.lr=\[\]: give 1 or more"),
        ("backbone.stem=tiny", "backbone.stem=tiny: choose one of"),
        ("+foo=1", "foo: unknown key"),
    ],
)
def test_a_bad_value_is_one_line_that_names_it(override, says):
    with pytest.raises(UsageError, match=says) as caught:
        parsed(override)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["method=nnclr", "+k=50"], r"k: only support=kmeans \(method=kmclr\) has it"),
        (
            ["method=simclr", "support=queue"],
            "support=queue: objective.support_weight=0 makes no use of what is stored",
        ),
        (["objective=teacher", "k=3", "objective.neighbours=4"], "objective.neighbours=4: more than the 3 vectors"),
        (
            ["tracking=jsonl", "tracking.system_metrics=true"],
            "tracking.system_metrics=true: MLflow measures them, and tracking=jsonl has none; choose tracking=mlflow",
        ),
        (["experiment=mnn", "search=ivf"], "objective.neighbours=5: search=ivf finds one; choose search=auto"),
        *[
            (["method=nnclr", "search=ivf", f"search.{key}=null"], f"search.{key}=null: search=ivf needs a value")
            for key in ("index", "nprobe", "refresh_every")
        ],
        (["epochs=0", "init=x"], "epochs=0: without training support=kmeans is not used; choose method=simclr"),
        (["data.keep=16"], "data.keep=16: fewer pixels than data.image_size=32; raise it"),
        (["data.keep=64", "data.resize=pad"], "data.resize=pad: data.keep=64 stores whole images"),
        (
            ["objective=teacher", "+objective.temperature=0.2"],
            "objective.temperature: the chosen options do not have it",
        ),
    ],
)
def test_what_the_parts_do_not_have_is_refused(overrides, says):
    with pytest.raises(UsageError, match=says):
        parsed(*overrides)


def test_a_window_smaller_than_k_is_refused():
    with pytest.raises(UsageError, match="refit_window=100: must hold k=400"):
        parsed("support.refit=faiss", "support.refit_window=100")
    assert parsed("support.refit=faiss", "support.refit_window=400").k == 400


def test_an_objective_is_named_by_what_it_weighs():
    """So a row's name never depends on which preset the settings were typed beside."""
    one = parsed("method=nnclr", "support=none", "objective.support_weight=0")
    other = parsed("method=nnclr", "objective.support_weight=1", "objective.predictor_hidden=64")
    assert (one.method.name, one.objective.name) == ("simclr", "nt_xent")
    assert other.objective.name == "published"


def test_imagenet_has_the_settings_of_the_paper():
    """The NNCLR paper, section 4.1, publishes them for 224 pixels and a batch of 4,096."""
    cfg = parsed("experiment=imagenet_kmclr", "data.root=images")
    assert (cfg.backbone.name, cfg.backbone.stem) == ("resnet50", "large")
    assert (cfg.data.name, cfg.data.image_size, cfg.data.keep) == ("imagenet", 224, 256)
    assert (cfg.batch_size, cfg.epochs, cfg.schedule.warmup_epochs) == (4096, 1000, 10)
    assert (cfg.optimizer.name, cfg.optimizer.lr, cfg.optimizer.weight_decay) == ("lars", 0.3, 1e-6)
    assert (cfg.optimizer.trust_coefficient, cfg.optimizer.clip_trust) == (0.001, False)  # the rate is meant for these
    assert (cfg.projector.hidden, cfg.projector.out, cfg.objective.predictor_hidden) == ([2048, 2048], 256, 4096)
    assert (cfg.method.name, cfg.k) == ("kmclr", 4000)


def test_evaluate_composes_and_needs_no_data():
    cfg = composed(name="evaluate")
    assert cfg.data == {"root": None, "image_size": None, "keep": None}
    assert composed("data=digits", "evaluation=original", name="evaluate").data.name == "digits"


def test_a_name_that_mlflow_does_not_take_is_refused_and_the_line_says_why():
    with pytest.raises(UsageError, match="is longer than 500 characters") as error:
        parsed(f"tracking.experiment={'x' * 501}")
    assert len(str(error.value)) < 200
    assert len(parsed(f"tracking.experiment={'x' * 500}").tracking.experiment) == 500
