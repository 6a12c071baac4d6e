"""How does a picture stand in the text of a page, small and searchable?"""

import io
import re
from typing import Any
from xml.etree import ElementTree

import numpy as np

from optaxclip._plots import canvas as _canvas, columns as _columns, run as _run
from optaxclip._plots.layers import layers
from optaxclip._plots.thresholds import thresholds

WIDTH = 5.0  # inches: on a phone the text has nearly its size
STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "optaxclip", "font.size": 10}


def of(seen: Any) -> dict[str, str]:
    """Returns the pictures for which a history has the numbers, as SVG, by name."""
    figure = _canvas.figure(WIDTH, 4.6)
    from matplotlib import rc_context

    found = {}
    with rc_context(STYLE):
        last = _columns.runs(seen)[-1]
        axes = figure.subplots(2, sharex=True, **_run.heights(last))
        _run.run(seen, axes)
        found["run"] = _svg(figure, "run", "Loss and gradient norm by step.")
        if leaves := _columns.leaves(last):
            height = float(np.clip(0.22 * len(leaves) + 1.6, 2.4, 8))
            figure = _canvas.figure(WIDTH, height)
            layers(seen, figure.subplots())
            found["layers"] = _svg(figure, "layers", "Norm of every leaf by step.")
        norms = last.get("norm", np.zeros(1))
        if np.any(np.isfinite(norms) & (norms > 0)):
            figure = _canvas.figure(WIDTH, 3.4)
            thresholds(seen, ax=figure.subplots())
            text = "Share of the steps that each threshold would have clipped."
            found["thresholds"] = _svg(figure, "thresholds", text)
    return found


def _svg(figure: Any, name: str, label: str) -> str:
    """Returns a figure as an element of HTML, its ids unlike those of other figures."""
    stream = io.BytesIO()
    figure.draw_without_rendering()  # axes beside axes are placed at the second
    figure.savefig(stream, format="svg", transparent=True, dpi=100)
    root = ElementTree.fromstring(stream.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.split("}")[-1]
        items = [(key.split("}")[-1], x) for key, x in element.attrib.items()]
        element.attrib = {key: _prefixed(key, x, name) for key, x in items}
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    aria = {"role": "img", "aria-label": " ".join([label, *filter(None, titles)])}
    root.attrib = {"viewBox": root.attrib["viewBox"]} | aria
    return ElementTree.tostring(root, encoding="unicode")


def _prefixed(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key == "href" and value.startswith("#"):
        return f"#{name}-{value[1:]}"
    return re.sub(r"url\(#", f"url(#{name}-", value)
