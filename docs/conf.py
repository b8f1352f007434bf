"""The documentation site: `make docs` builds it, with warnings as errors and without a network."""

import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent / "extensions"))

import fastedit

project = "fastedit"
author = "the fastedit developers"
copyright = "2026, the fastedit developers"
version = release = fastedit.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "extensions"]
html_theme = "furo"
html_title = "fastedit"
html_copy_source = False

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = os.environ.get("FASTEDIT_NOTEBOOKS", "cache")  # off: make docs-short
nb_execution_in_temp = True
nb_execution_timeout = 1800  # of a cell, on a machine that does much else
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_output_stderr = "remove"  # progress bars, and warnings with paths of the machine that built the site

autodoc_typehints = "description"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": False}
napoleon_numpy_docstring = False
napoleon_use_rtype = False
nitpicky = False
