import math
from collections.abc import Callable
from pathlib import Path

import pytest

from src.config.schema import Data
from src.data import cache_writer as writer_module
from src.data import load
from src.errors import UsageError
from tests.data.layouts import SIZE


@pytest.fixture(autouse=True)
def _nothing_is_saved_meanwhile(monkeypatch):
    """Never save a cache while it is being decoded, which otherwise happens when a busy machine takes long."""
    monkeypatch.setattr(writer_module, "SAVE_EVERY", math.inf)


@pytest.fixture
def config(tmp_path) -> Callable[..., Data]:
    """A `Data` whose cache is in the test's own folder."""

    def make(name: str, root: Path | None = None, **changes) -> Data:
        defaults = {
            "image_size": SIZE,
            "cache_dir": str(tmp_path / "cache"),
            "val_fraction": 0.25,
            "split_seed": 0,
            "limit": None,
            "final": False,
        }
        return Data(name=name, root=root and str(root), **{**defaults, **changes})

    return make


@pytest.fixture
def decodings(monkeypatch) -> list[str]:
    """Where each image that has been decoded so far came from."""
    seen: list[str] = []
    decode = writer_module.decode

    def counting(picture, *options):
        seen.append(picture.where)
        return decode(picture, *options)

    monkeypatch.setattr(writer_module, "decode", counting)
    return seen


@pytest.fixture
def refusal(config) -> Callable[..., str]:
    """A function that loads a data set and returns the message of the UsageError, one line, that it must raise."""

    def load_and_fail(*args, **kwargs) -> str:
        with pytest.raises(UsageError) as caught:
            load(config(*args, **kwargs))
        message = str(caught.value)
        assert "\n" not in message
        return message

    return load_and_fail
