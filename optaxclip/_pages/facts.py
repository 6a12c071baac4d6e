"""A run in a few numbers, each with its name."""

import numpy as np

from optaxclip._plots import canvas as _canvas, columns as _columns
from optaxclip._plots.columns import Columns


def of(columns: Columns) -> list[tuple[str, str]]:
    """Returns what the columns tell of steps, loss, norm and clip, as name and text."""
    steps, end = columns["width"].sum(), columns["to"][-1] - 1
    facts = [("steps", f"{steps:.0f}, last {end:.0f}")]
    if len(columns["step"]) < steps:
        facts.append(("rows", str(len(columns["step"]))))
    for name in ("loss", "norm", "learning_rate"):
        values = columns.get(name, np.empty(0))
        values = values[np.isfinite(values)]
        if values.size:
            facts.append((f"last {name.replace('_', ' ')}", _canvas.number(values[-1])))
        if values.size and name == "loss":
            facts.append(("lowest loss", _canvas.number(values.min())))
        if values.size and name == "norm":
            facts.append(
                ("median norm", _canvas.number(_columns.median(columns[name], columns)))
            )
    max_norms, share = _columns.max_norm(columns), _columns.clipped_share(columns)
    if max_norms is not None:
        last = max_norms[np.isfinite(max_norms)][-1]
        facts.append(("threshold", _canvas.number(last)))
    if share is not None and (share or max_norms is not None):
        facts.append(("clipped", f"{_canvas.share(share)} of the steps"))
    for name, label in (("skipped", "skipped"), ("nonfinite", "not finite")):
        if count := columns.get(name, np.zeros(1)).sum():
            facts.append((label, f"{count:.0f} step{'s' if count > 1 else ''}"))
    return facts
