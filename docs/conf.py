"""How the documentation is built: `make docs`. It reads nothing from a network, and neither do its pages."""

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "extensions"))
os.environ.setdefault("JAX_ENABLE_X64", "1")  # what the commands switch on, for the tutorials

project = "attnlab"
author = "The attnlab developers"
copyright = author
release = __import__("attnlab").__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
    "mathml",
    "lab",
]
exclude_patterns = [
    "_build",
    "extensions",
    "tutorials/README.rst",
    "sg_execution_times.rst",
    "**/sg_execution_times.rst",
]
nitpicky = False
suppress_warnings = ["config.cache"]

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
html_math_renderer = "mathml"

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 90
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_attr_annotations = False

sphinx_gallery_conf = {
    "examples_dirs": "tutorials",
    "gallery_dirs": "learn",
    "filename_pattern": r"\.py$",
    "within_subsection_order": "FileNameSortKey",
    "download_all_examples": False,
    "show_signature": False,
    "min_reported_time": 1e9,
    "remove_config_comments": True,
    "reset_modules": ("lab.reset",),
    "abort_on_example_error": True,
    "copyfile_regex": r".*\.md",
}

default_role = "code"

html_theme = "furo"
html_title = "attnlab"
html_static_path = ["static"]
html_css_files = ["attnlab.css"]
html_copy_source = False
html_show_sourcelink = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
