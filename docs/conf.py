"""How Sphinx builds the documentation: `make docs`, which needs no network."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# The package as it is in this checkout, and the pieces of the example that the tutorial uses.
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import pooling_ext  # noqa: E402

project = "pooling_ext"
author = "The pooling_ext authors"
project_copyright = author
version = release = pooling_ext.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "myst_nb"]
# Links into PyTorch's documentation need its index from the network, so they are made on request alone.
if os.environ.get("POOLING_EXT_INTERSPHINX"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
    }

html_theme = "furo"
html_title = f"pooling_ext {release}"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_theme_options = {"navigation_with_keys": True}

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4  # as on GitHub, so that a link to a heading works in both

# The tutorial is executed from start to end; POOLING_EXT_EXECUTE=off leaves that out.
nb_execution_mode = os.environ.get("POOLING_EXT_EXECUTE", "force")
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings have them
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Shape", "params_style")]
napoleon_use_rtype = False
add_module_names = False

nitpicky = True
if "sphinx.ext.intersphinx" not in extensions:
    nitpick_ignore_regex = [("py:.*", r"torch\b.*")]  # what PyTorch documents
