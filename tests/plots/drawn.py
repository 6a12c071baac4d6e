"""What is in a picture: its texts, lines, hatches and marks."""

import io

import numpy as np
from matplotlib.figure import Figure


def new(rows=1):
    return Figure(layout="constrained").subplots(rows)


def texts(ax):
    """All that is written in axes, their legend and their children."""
    legend = ax.get_legend()
    children = [text for child in ax.child_axes for text in texts(child)]
    inside = [] if legend is None else [x.get_text() for x in legend.get_texts()]
    title = [ax.get_title(loc="left"), ax.get_title()]
    found = [*title, *(x.get_text() for x in ax.texts), *inside, *children]
    return [text.strip() for text in found if text.strip()]


def title(ax):
    return ax.get_title(loc="left")


def lines(ax, **properties):
    """The lines with such properties, each as its two rows of data."""
    return [
        np.array(line.get_data(), float)
        for line in ax.lines
        if all(getattr(line, f"get_{k}")() == v for k, v in properties.items())
    ]


def hatched(ax):
    """Where axes are hatched, from and to."""
    spans = [x.get_extents() for x in map(in_data, ax.patches) if x is not None]
    return [(box.x0, box.x1) for box in spans]


def in_data(patch):
    return (
        patch.get_path().transformed(patch.get_patch_transform())
        if (patch.get_hatch())
        else None
    )


def saved(ax):
    """The picture as SVG: that it can be laid out and written is part of every test."""
    stream = io.BytesIO()
    ax.figure.savefig(stream, format="svg")
    return stream.getvalue().decode()
