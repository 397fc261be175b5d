"""How `make docs` builds the site. The source folder is the project's own, so that all pages' links hold there too."""

import sys
import tomllib
from pathlib import Path

PROJECT = Path(__file__).parent.parent
sys.path.insert(0, str(PROJECT))

project = "support-set-sweeps"
author = "the authors of support-set-sweeps"
copyright = f"2026, {author}"
release = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["version"]

root_doc = "docs/index"
include_patterns = ["README.md", "CHANGELOG.md", "docs/**", "results/**"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
# Tables of results are reached by links; a class's short name in an annotation may be that of two modules.
suppress_warnings = ["toc.not_included", "ref.python"]
myst_heading_anchors = 3

default_role = "py:obj"  # a name in single backticks is a link where the reference has it
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
autosummary_ignore_module_all = False
napoleon_numpy_docstring = False

html_theme = "pydata_sphinx_theme"
html_title = "Support-set sweeps"
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": False, "secondary_sidebar_items": ["page-toc"]}
