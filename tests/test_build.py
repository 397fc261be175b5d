import pytest
import torch

from src import build, models
from src.config import schema
from src.config.identity import config_hash
from src.errors import UsageError
from src.support.kmeans import KMeans
from src.support.queue import Queue
from src.support.search import FaissSearch, TorchSearch
from tests.composing import parsed

CPU = torch.device("cpu")
TINY = ["backbone=resnet_tiny", "projector.hidden=[16]", "projector.out=8"]


def method(*overrides):
    cfg = parsed(*TINY, *overrides)
    made, _ = build.method(cfg, 10, build.search(cfg.search, CPU), CPU)
    return made


def test_devices():
    """`build.device` takes a device that is there, or names the remedy."""
    assert build.device("cpu") == CPU
    assert build.device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(UsageError, match=r"device=cuda:99: torch sees \d+ GPUs here; choose device=cpu or auto"):
        build.device("cuda:99")
    with pytest.raises(UsageError, match="device=cuda:x: write cuda:0"):
        build.device("cuda:x")


@pytest.mark.parametrize(("fast", "chosen"), [(True, torch.bfloat16), (False, torch.float32)])
def test_precision(monkeypatch, fast, chosen):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert build.precision("float32", CPU) == torch.float32
    assert build.precision("bfloat16", CPU) == torch.bfloat16
    assert build.precision("auto", CPU) == chosen


def test_a_model_of_timm_may_have_the_name_of_one_of_ours():
    ours, theirs = parsed("backbone=resnet18"), parsed("backbone=timm", "backbone.name=resnet18")
    packages = [type(build.encoder(cfg.backbone, 32)[0]).__module__.split(".")[0] for cfg in (ours, theirs)]
    assert packages == ["torchvision", "timm"]
    assert config_hash(ours) != config_hash(theirs)
    assert parsed("backbone=resnet18", "backbone.name=resnet10t").backbone.is_timm  # runs exist that were typed so


def test_search():
    assert isinstance(build.search(schema.Search("faiss"), CPU), FaissSearch)
    assert isinstance(build.search(schema.Search("torch"), CPU), TorchSearch)
    assert isinstance(build.search(schema.Search("auto"), CPU), TorchSearch)


@pytest.mark.parametrize("installed", [True, False])
def test_search_on_a_gpu_is_faiss_where_faiss_can(monkeypatch, installed):
    monkeypatch.setattr(build, "has_faiss_gpu", lambda: installed)
    monkeypatch.setattr(build, "FaissSearch", lambda device: f"faiss on {device}")
    chosen = build.search(schema.Search("auto"), torch.device("cuda:1"))
    assert chosen == "faiss on cuda:1" if installed else isinstance(chosen, TorchSearch)


def test_an_encoder_with_batch_norm_over_parts_starts_from_the_same_weights():
    encoders = []
    for splits in (1, 8):
        torch.manual_seed(3)
        encoders.append(method(f"backbone.bn_splits={splits}").encoder)
    whole, split = (encoder.state_dict() for encoder in encoders)
    assert whole.keys() == split.keys()
    assert all(torch.equal(value, split[key]) for key, value in whole.items())
    assert {each.splits for each in encoders[1].modules() if isinstance(each, models.SplitBatchNorm)} == {8}


def test_simclr_stores_nothing():
    assert method("method=simclr").support is None


def test_a_queue_of_none_is_none():
    assert method("method=nnclr", "queue_size=0").support is None


@pytest.mark.parametrize("name", ["nnclr", "kmclr"])
def test_there_is_a_predictor_where_it_has_a_width(name):
    assert method(f"method={name}").predictor is None
    assert method(f"method={name}", "objective.predictor_hidden=24").predictor[0].out_features == 24


def test_nnclr_gets_its_queue():
    support = method("method=nnclr", "queue_size=33", "search=torch").support
    assert isinstance(support, Queue)
    assert support.ring.rows_ND.shape == (33, 8)
    assert isinstance(support.search, TorchSearch)


@pytest.mark.parametrize(
    ("overrides", "attributes"),
    [
        (["support.forget=none"], {"reset_every": 0, "decay": 1.0}),
        (["support.forget=reset", "support.forget_every=7"], {"reset_every": 7, "decay": 1.0}),
        (["support.forget=decay", "support.half_life=1"], {"reset_every": 0, "decay": 0.5}),
        (["support.metric=euclidean"], {"spherical": False}),
        (["support.refit=faiss", "support.refit_every=9", "support.refit_window=64"], {"refit_every": 9}),
        (["support.revive_after=3"], {"revive_after": 3, "window": None}),
    ],
)
def test_kmclr_gets_the_prototypes_it_was_told(overrides, attributes):
    support = method("method=kmclr", "k=12", *overrides).support
    assert isinstance(support, KMeans)
    assert support.means_KD.shape == (12, 8)
    assert {name: getattr(support, name) for name in attributes} == attributes


def test_masking_is_the_methods_choice():
    assert method("method=kmclr").objective.same_prototype == "mask"
    assert method("method=kmclr", "objective.same_prototype=negative").objective.same_prototype == "negative"


def test_refit_without_faiss_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"support.refit=faiss: faiss is not installed; .*support.refit=online"):
        method("method=kmclr", "search=torch", "support.refit=faiss")
