"""The documentation site: Markdown and docstrings to HTML, which needs nothing from the network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from docutils import nodes
from latex2mathml.converter import convert

from captum_cw import __version__

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "captum_cw"
author = "The captum_cw authors"
project_copyright = author
release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_argparse_cli",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

# Shapes and choices say more beside each argument than in one long line.
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_display_short_literal_types = True
maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# Of our own names every reference must lead somewhere; those of others would need the network.
nitpicky = True
nitpick_ignore = [  # type variables
    ("py:class", "captum_cw.attr.measures.Result"),
    ("py:class", "captum_cw.capture.run.Result"),
]
nitpick_ignore_regex = [("py:class", r"(?!captum_cw\.).*"), ("py:.*", r"(captum|torch)\..*")]

html_theme = "furo"
html_title = "captum_cw"
pygments_dark_style = "github-dark"
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
copybutton_exclude = ".linenos, .gp, .go"


def show_formula(translator: Any, node: nodes.math | nodes.math_block) -> None:
    """Browsers draw MathML by themselves; MathJax would come from the network."""
    display = "inline" if node.tagname == "math" else "block"
    translator.body.append(convert(node.astext(), display=display))
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", (show_formula, None), (show_formula, None))
