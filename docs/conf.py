"""How the site is built: `sphinx-build -W docs site`.

Sphinx, for Optax, Flax and JAX have it, MkDocs is no longer maintained, its heir has no
strict mode yet, and the docstrings are reStructuredText. A warning, such as that of a
reference to what is not there, fails the build.
"""

import pathlib
import sys

import optaxclip

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE / "_extensions"))

project = "optaxclip"
author = "The optaxclip authors"
copyright = author
version = release = optaxclip.__version__

extensions = [
    "gallery",
    "mathml",
    "myst_parser",
    "optax_names",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_extensions", "_templates"]
templates_path = ["_templates"]
nitpicky = True
suppress_warnings = ["config.cache"]

# Pages
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

# Docstrings
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "none"  # what a parameter takes stands in words beside its name
napoleon_custom_sections = ["Guarantees"]
napoleon_google_docstring = True
napoleon_attr_annotations = False
napoleon_numpy_docstring = False

# What it looks like
html_theme = "pydata_sphinx_theme"
html_title = "optaxclip"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_favicon = "_static/favicon.svg"
html_context = {"default_mode": "auto"}
html_sidebars = {"**": ["all-pages"]}
html_math_renderer = "mathml"
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "navbar_center": [],
    "navigation_with_keys": False,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
