"""`make docs`: the site builds without a warning, has every page and module, and a broken link is an error."""

import shutil
import subprocess
import sys

import pytest

from tests.conftest import PROJECT
from tests.pages import PAGES

for package in ("sphinx", "myst_parser", "pydata_sphinx_theme"):
    pytest.importorskip(package, reason=f"{package} is not installed; `make docs` installs it")


def build(source, site):
    """Build the site with the arguments of `make docs`."""
    fixed = ["-b", "html", "-c", str(PROJECT / "docs"), "-W", "--keep-going", "--quiet"]
    command = [sys.executable, "-m", "sphinx", *fixed, str(source), str(site)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_the_site_has_every_page_and_module(tmp_path):
    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    for name in ("docs", "results"):
        shutil.copytree(PROJECT / name, source / name, ignore=shutil.ignore_patterns("api"))
    for name in ("README.md", "CHANGELOG.md", "LICENSE", "CITATION.cff"):
        shutil.copy(PROJECT / name, source)
    done = build(source, site)
    assert (done.returncode, done.stderr) == (0, "")
    pages = {page.relative_to(PROJECT).with_suffix(".html") for page in PAGES}
    assert not {page for page in pages if not (site / page).is_file()}
    paths = [path.relative_to(PROJECT).with_suffix("") for path in (PROJECT / "src").rglob("*.py")]
    modules = {".".join(path.parts).removesuffix(".__init__") for path in paths}
    assert not {module for module in modules if not (site / f"docs/api/{module}.html").is_file()}
    for name in ("src.losses.nt_xent", "src.support.base.SupportSet", "src.evaluation.encoder.load_encoder"):
        assert f'id="{name}"' in (site / f"docs/api/{name.rpartition('.')[0]}.html").read_text()


def test_a_broken_link_is_an_error(tmp_path):
    docs = tmp_path / "source/docs"
    docs.mkdir(parents=True)
    (docs / "index.rst").write_text("Index\n=====\n\n.. toctree::\n\n   page\n")
    (docs / "page.md").write_text("# Page\n\n[there](index.rst), [gone](missing.md)\n")
    done = build(tmp_path / "source", tmp_path / "site")
    assert done.returncode != 0
    assert "missing.md" in done.stderr
    assert "index.rst" not in done.stderr
