"""Links docstrings' references to Optax to its site, without asking that for a list."""

from docutils import nodes

OPTAX = "https://optax.readthedocs.io/en/latest/api"
PAGES = {
    "optax.GradientTransformationExtraArgs": "transformations.html",
    "optax.partition": "combining_optimizers.html",
}


def _link(app, env, node, text):
    name = node["reftarget"]
    if name in PAGES:
        return nodes.reference(
            "", "", text, internal=False, refuri=f"{OPTAX}/{PAGES[name]}#{name}"
        )


def setup(app):
    """Called by Sphinx."""
    app.connect("missing-reference", _link)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
