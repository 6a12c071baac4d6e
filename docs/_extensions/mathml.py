"""Formulas are MathML, made when the site is built: no script, no font to load."""

from docutils import nodes
from latex2mathml.converter import convert


def _mathml(formula, display):
    formula = formula.replace(r"\_", "_")  # it would show the backslash
    return convert(formula, display=display)


def _inline(writer, node):
    writer.body.append(_mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def _block(writer, node):
    formula = _mathml(node.astext(), "block")
    writer.body.append(f'<div class="math" tabindex="0">{formula}</div>')
    raise nodes.SkipNode


def setup(app):
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
