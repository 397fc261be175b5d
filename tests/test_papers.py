"""LICENSE, CITATION.cff and CHANGELOG.md agree with the package's name, version and licence."""

import re
import tomllib

import yaml

from tests.conftest import PROJECT

PACKAGE = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]


def test_the_citation_is_of_this_version_and_licence():
    citation = yaml.safe_load((PROJECT / "CITATION.cff").read_text())
    assert citation["version"] == PACKAGE["version"]
    assert citation["license"] == PACKAGE["license"] == "MIT"
    assert citation["title"].startswith(PACKAGE["name"])
    assert (PROJECT / "LICENSE").read_text().startswith("MIT License")


def test_the_newest_changes_are_of_this_version():
    newest = re.search(r"^## ([\d.]+)", (PROJECT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest[1] == PACKAGE["version"]
