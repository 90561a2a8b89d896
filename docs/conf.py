"""Sphinx: the pages of this folder, the reference from the docstrings, the gallery from examples/."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nbnorm

HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples"
sys.path.insert(0, str(HERE))

project = "nbnorm"
author = "the nbnorm developers"
project_copyright = author
version = release = nbnorm.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "myst_parser",
    "numpydoc",
    "sphinx_gallery.gen_gallery",
    "drawings",
]
rst_prolog = ".. py:currentmodule:: nbnorm\n"
default_role = "py:obj"  # `batch_norm_forward` in a docstring is a link
exclude_patterns = [
    "_build",
    "gallery/**/*.py",
    "gallery/**/*.ipynb",
    "gallery/**/*.md5",
    "gallery/**/*.json",
]

autosummary_generate = True
autodoc_typehints = "none"  # numpydoc's Parameters say more
numpydoc_class_members_toctree = False
numpydoc_show_class_members = False
numpydoc_xref_param_type = False
toc_object_entries = False

html_theme = "pydata_sphinx_theme"
html_title = "nbnorm"
html_static_path = ["_static"]
html_css_files = ["nbnorm.css"]
html_show_sourcelink = False
html_theme_options = {
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "footer_start": ["copyright"],
    "footer_end": ["sphinx-version"],
}
ALONE = ("architecture", "changelog", "gpu", "numerics", "performance", "pytorch", "reliability", "start")
html_sidebars = {page: [] for page in ALONE}


sphinx_gallery_conf = {
    "examples_dirs": [str(EXAMPLES)],
    "gallery_dirs": ["gallery"],
    # Not these: the shared module, and what needs PyTorch.
    "ignore_pattern": r"networks\.py|pytorch_\w+\.py",
    "filename_pattern": r"\.py$",
    "image_scrapers": ("gallery_parts.saved_pictures",),
    "reset_modules": ("gallery_parts.fresh_modules",),
    "within_subsection_order": "gallery_parts.ReadingOrder",
    "download_all_examples": False,
    "show_signature": False,
    "min_reported_time": 1,
    "remove_config_comments": True,
    "plot_gallery": os.environ.get("NBNORM_GALLERY", "1") != "0",  # 0: pages without running the examples
}
