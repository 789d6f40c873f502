"""Sphinx settings: Markdown pages, an API reference from the docstrings, a config reference from the schema."""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

import rolltune

project = "rolltune"
author = "the rolltune authors"
copyright = "2026, the rolltune authors"
version = release = rolltune.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "reference",
    "code_cells",
]
exclude_patterns = ["_templates"]
templates_path = ["_templates"]

myst_enable_extensions = ["colon_fence", "deflist", "attrs_inline"]
myst_heading_anchors = 3

autosummary_generate = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
# vLLM need not be installed; `__main__` would run the program.
autodoc_mock_imports = ["vllm", "rolltune.cli.__main__"]
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

smartquotes = False

html_theme = "furo"
html_title = f"rolltune {release}"
html_static_path = ["_static"]
html_theme_options = {"navigation_with_keys": True}


def keep_bars(app, what, name, obj, options, lines: list[str]) -> None:
    """Show ``|x|`` of a docstring as an absolute value. reStructuredText would take it for a substitution."""
    lines[:] = [re.sub(r"(?<!`)\|(\w+)\|(?!`)", r"\\|\1\\|", line) for line in lines]


def setup(app) -> None:
    app.connect("autodoc-process-docstring", keep_bars)
