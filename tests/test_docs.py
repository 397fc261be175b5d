"""What README and docs/ point to is there, and every metric is explained."""

import re

import pytest

from tests.conftest import PROJECT
from tests.training.test_loop import METRICS, OF_METHOD

PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_to_files(page):
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text())
    for target in targets:
        assert (page.parent / target).exists(), target


def test_every_page_is_linked_from_the_readme():
    readme = (PROJECT / "README.md").read_text()
    for page in PAGES[1:]:
        assert f"(docs/{page.name})" in readme


def test_every_metric_is_explained():
    explained = set(re.findall(r"`([a-z]+/\w+)`", (PROJECT / "docs/metrics.md").read_text()))
    assert METRICS | set().union(*OF_METHOD.values()) <= explained
