import json

import pytest

from src.errors import UsageError
from src.system.extras import require


def test_a_package_is_given_or_one_line_says_what_brings_it():
    assert require("json", "any", "format=x") is json
    with pytest.raises(UsageError, match=r"^format=x: needs no_such_package: pip install .*'\.\[any\]'$"):
        require("no_such_package", "any", "format=x")
