import hashlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
from omegaconf import OmegaConf
from torch import nn

from src import build
from src.config import identity
from src.config.outside import _code, code_digests, make, settings, settings_class
from src.config.parse import parse
from src.config.schema import Backbone, Count, Data, Fraction, Method, Support
from src.data import sources
from src.data.decoding import Contents, Part, Source
from src.errors import UsageError
from src.runs.directory import is_finished, path_of
from src.runs.record import TAG_CONFIG_HASH, Record
from tests.composing import composed


class Net(nn.Linear):
    def __init__(self, parts, momentum: Fraction, *, width: Count = 3, of: list[int] = [1]) -> None:  # noqa: B006
        super().__init__(2, 2)


class Parts(nn.Flatten):
    def __init__(self, space, shards: Count = 4, forget: str = "none", half_life: Count = 1) -> None:
        super().__init__()


class Pictures(nn.Flatten):
    pass


@pytest.fixture(autouse=True)
def theirs(monkeypatch):
    """A user's module, which can be imported as ``theirs``."""
    module = ModuleType("theirs")
    module.__dict__.update(
        Net=Net, Parts=Parts, Pictures=Pictures, seven=lambda: 7, fails=lambda first: 1 / 0, untyped=int
    )
    module.Named = dict
    module.typed_oddly = lambda parts, many: None
    module.typed_oddly.__annotations__["many"] = complex
    monkeypatch.setitem(sys.modules, "theirs", module)
    settings_class.cache_clear()
    return module


def outside(group, target, *overrides, **values):
    cfg = composed(*overrides)
    cfg[group] = {"name": "mine", "_target_": f"theirs.{target}", **values}
    return cfg


def test_the_constructor_types_the_settings():
    cfg = parse(outside("method", "Net", "support=none", momentum=1, label="Mine"))
    assert isinstance(cfg.method, Method)
    assert settings(cfg.method) == {"momentum": 1.0, "width": 3, "of": [1]}
    assert (cfg.method.name, cfg.method.label) == ("mine", "Mine")


@pytest.mark.parametrize(
    ("target", "values", "says"),
    [
        ("Net", {"momentm": 0.9}, r"method.momentm: unknown key, .*; did you mean method.momentum\?"),
        ("Net", {}, "method.momentum: has no default; give it a value"),
        ("Net", {"momentum": 1.5}, "method.momentum=1.5: must be 1 or less"),
        ("Net", {"momentum": "much"}, "method.momentum=much: .*could not be converted to Float"),
        ("Net", {"momentum": 1, "width": 0}, "method.width=0: must be 1 or more"),
        ("Nett", {}, "method._target_=theirs.Nett: AttributeError: .*; write package.module.Name"),
        ("seven", {}, "method._target_=theirs.seven: ValueError: "),
        ("typed_oddly", {}, "method._target_=theirs.typed_oddly: Unexpected type annotation: complex"),
    ],
)
def test_a_mistake_in_them_is_one_line(target, values, says):
    """A mistake in the settings of a user's class, or in its path, is a one-line error."""
    with pytest.raises(UsageError, match=says) as caught:
        parse(outside("method", target, "support=none", **values))
    assert "\n" not in str(caught.value)


def test_what_cannot_be_imported(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_module.py").write_text("\n1 / 0\n")
    with pytest.raises(UsageError, match=r"broken_module.X: \S*broken_module.py, line 2: ZeroDivisionError") as caught:
        make("broken_module.X", "method", nn.Module)
    assert "PYTHONPATH" not in str(caught.value)
    for path in ("no_such_module.X", "Method", "7"):
        with pytest.raises(UsageError, match=rf"method._target_={path}: .*its folder in PYTHONPATH"):
            make(path, "method", nn.Module)


def test_what_fails_or_is_something_else():
    with pytest.raises(UsageError, match=r"group._target_=theirs.fails: \S*test_outside.py, line \d+: ZeroDivision"):
        make("theirs.fails", "group", nn.Module, 1)
    with pytest.raises(UsageError, match=r"group._target_=theirs.fails: TypeError: .*missing 1 required"):
        make("theirs.fails", "group", nn.Module)
    with pytest.raises(UsageError, match=r"is a builtins.int when made, and must be a torch\S*Module"):
        make("theirs.seven", "group", nn.Module)


def test_its_settings_may_have_any_name():
    """A user's setting may have the name of one of `make`'s own parameters."""
    made = make("theirs.Named", "data", dict, path="digits.npz", group=1, kind="b")
    assert made == {"path": "digits.npz", "group": 1, "kind": "b"}


def test_its_settings_count_and_its_looks_and_the_objective_do_not():
    """The settings of a user's method change the hash; its label, its colour and our objectives' settings do not."""

    def hashed(*overrides, **values):
        return identity.config_hash(parse(outside("method", "Net", "support=none", *overrides, **values)))

    base = hashed(momentum=0.9)
    assert hashed(momentum=0.9, width=3, label="Mine", colour="#123456") == base
    assert hashed("objective.temperature=0.7", momentum=0.9) == base
    assert hashed(momentum=0.8) != base
    assert hashed(momentum=0.9, width=4) != base


class Wider(nn.Linear):
    def __init__(self, parts, momentum: Fraction, *, width: Count = 8, of: list[int] = [1], depth: Count = 1) -> None:  # noqa: B006
        super().__init__(2, 2)


def test_a_run_from_before_a_default_was_edited_is_another(theirs, tmp_path, monkeypatch):
    """Such runs have one hash, so the record says which is which; parameters that it lacks are new and do not count."""

    def mine(*overrides, **values):
        return parse(outside("method", "Net", "support=none", *overrides, momentum=0.9, **values))

    monkeypatch.chdir(tmp_path)
    before = mine()
    directory = path_of(before)
    record = Record.new(directory.name, "e")
    record.params = {key: str(value) for key, value in identity.flat(before).items()}
    record.status, record.tags = "FINISHED", {TAG_CONFIG_HASH: identity.config_hash(before)}
    directory.mkdir(parents=True)
    record.save(directory)
    assert is_finished(directory, mine(label="Mine"))
    theirs.Net = Wider
    settings_class.cache_clear()
    assert is_finished(directory, mine(width=3))  # if the folder is named, since the hash now counts this width
    for now in (mine(), mine(width=8)):
        assert identity.config_hash(now) == identity.config_hash(before)
        assert path_of(now) == directory.with_name(f"{directory.name}.2")
        with pytest.raises(UsageError, match=r"is of another configuration \(method.width was 3 and is 8\)"):
            is_finished(directory, now)
    named = mine(f"output_dir={directory}")
    assert path_of(named) == directory


def test_its_settings_count_whatever_their_names():
    """A built-in support set has settings of these names that do not count, or only with others."""

    def hashed(**values):
        beside = ["method=simclr", "objective=mixed"]
        return identity.config_hash(parse(outside("support", "Parts", *beside, name="kmeans", **values)))

    assert hashed(shards=4) == hashed() != hashed(shards=2)
    assert hashed(half_life=5) != hashed(half_life=6)


def test_a_support_set_lends_its_looks_to_our_method():
    """A method of ours with a user's support set is shown with the name, label and colour of the support set."""
    cfg = parse(
        outside("support", "Net", "method=simclr", "objective=mixed", momentum=0, label="Mine", colour="#123456")
    )
    assert isinstance(cfg.support, Support)
    assert (cfg.method.name, cfg.method.label, cfg.method.colour) == ("mine", "Mine", "#123456")
    saved = OmegaConf.create(identity.without_neutral(cfg))
    assert identity.config_hash(parse(saved)) == identity.config_hash(cfg)


@pytest.mark.parametrize("colour", ["red", "#12345", "#1234567", "{}", "{6}"])
def test_a_colour_that_is_none_is_one_line(colour):
    with pytest.raises(UsageError, match=r"support\.colour=\S+: is not of the form \^#"):
        parse(outside("support", "Net", "method=simclr", "objective=mixed", momentum=0, colour=colour))


def test_a_backbone():
    """A user's module can be the backbone if it gives one row of features for each image."""
    model, width = build.encoder(Backbone(name="mine", _target_="theirs.Pictures", options={}), 8)
    assert isinstance(model, Pictures)
    assert width == 3 * 8 * 8
    with pytest.raises(UsageError, match=r"backbone: gives \[1, 3, 64\] of one image"):
        build.encoder(Backbone(name="mine", _target_="theirs.Pictures", options={"start_dim": 2}), 8)
    with pytest.raises(UsageError, match=r"backbone._target_=theirs.Pictures: TypeError: .*'strat_dim'"):
        build.encoder(Backbone(name="mine", _target_="theirs.Pictures", options={"strat_dim": 2}), 8)


def test_a_data_set(theirs):
    """A user's function can be the data set; its options tell one data set from another."""
    contents = Contents(["one"], Part([0], []), Part([0], []))
    theirs.images = lambda number: Source("as ever", lambda: contents if number else 1 / 0)

    def found(number):
        data = {"image_size": 8, "cache_dir": "", "val_fraction": 0.1, "split_seed": 0, "limit": None, "final": False}
        return sources.find(Data(name="mine", **data, _target_="theirs.images", options={"number": number}))

    assert found(1).read() == contents
    assert found(1).stamp == found(1).stamp != found(2).stamp
    with pytest.raises(UsageError, match=r"data._target_=theirs.images: \S*test_outside.py, line \d+: ZeroDivision"):
        found(0).read()


def test_the_code_that_is_not_ours_is_known_by_its_file():
    cfg = parse(outside("method", "Net", "support=none", momentum=1))
    digest = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    assert code_digests(cfg) == {__name__: digest}
    assert code_digests(parse(composed())) == {}


def test_code_is_what_was_imported_though_its_file_is_edited_meanwhile(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "edited_module.py").write_text("from torch import nn\nclass Net(nn.Flatten): pass\n")
    cfg = parse(composed())
    cfg.backbone = Backbone(name="mine", _target_="edited_module.Net", options={})
    before = code_digests(cfg)
    (tmp_path / "edited_module.py").write_text("")
    assert code_digests(cfg) == before
    _code.cache_clear()
    assert code_digests(cfg).keys() == before.keys()
    assert code_digests(cfg) != before
