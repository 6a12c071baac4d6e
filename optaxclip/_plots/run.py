"""Loss and norm of a run, and what the clip took away."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from optaxclip._plots import (
    canvas as _canvas,
    columns as _columns,
    crash as _crash,
    panels as _panels,
)
from optaxclip._plots.columns import Columns

ROWS = 1000  # drawn


def run(history: Any, axes: Sequence[Any] | None = None) -> tuple[Any, Any]:
    """Draws loss and gradient norm of a run, and what the clip took away.

    Above the loss, below the norm before the clip. The line is the steps drawn, the
    band reaches to the largest norm of each stretch. The threshold is dashed; the area
    from it up to the norm is what the clip took away. The bars at the bottom are the
    share of steps clipped. Where nothing is finite any more, the picture is hatched, no
    longer than the run was before; of the steps before, those in which the norm grew
    are drawn once more, with the growth per step.

    The norm is on a log axis, and so is a positive loss that ranges over more than a
    factor of 30. A norm of 0 and single steps that are not finite are marked at the
    edges. Of several runs in one file the last is drawn so, those before it are grey.

    Args:
      history: what ``optaxclip.history`` returns, or takes; a loss or a norm will do.
      axes: two axes of matplotlib, for loss and norm; new ones if None.

    Returns:
      The two axes, of loss and norm.

    Raises:
      ImportError: matplotlib is not installed.
      TypeError, ValueError: there is no history in what was passed.

    Examples:
      >>> history = {"loss": [3.0, 2.0, 1.0], "norm": [9.0, 2.0, 1.0]}
      >>> loss_axes, norm_axes = optaxclip.plot.run(history)
      >>> print(loss_axes.get_title(loc="left"))
      The gradient norm: 2 in the middle, 9 at most
    """
    parts = _columns.runs(history)
    last = parts[-1]
    if axes is None:
        figure: Any = {"figsize": (6.4, 5), "sharex": True, **heights(last)}
        loss_axes, norm_axes = _canvas.subplots(2, **figure)
    else:
        loss_axes, norm_axes = axes
    drawn = [_columns.thinned(_columns.shown(part), ROWS) for part in parts]
    _panels.loss(loss_axes, drawn[-1], drawn[:-1])
    _panels.norm(norm_axes, drawn[-1], drawn[:-1])
    first, end = drawn[-1]["from"][0], drawn[-1]["to"][-1] - 1
    for ax in (loss_axes, norm_axes):
        _canvas.bare(ax)
        ax.set_xlim(first, end) if end > first else ax.set_xlim(first - 1, first + 1)
        ax.locator_params(axis="x", nbins=6)
    norm_axes.set_xlabel("step")
    loss_axes.tick_params(labelbottom=False)
    if _columns.crash(last) is not None:
        _crash.hatch((loss_axes, norm_axes), last)
        _crash.inset((loss_axes, norm_axes), last)
    several = f"Run {len(parts)} of {len(parts)}. " if len(parts) > 1 else ""
    _canvas.title(loss_axes, several + _message(last))
    return loss_axes, norm_axes


def heights(columns: Columns) -> dict[str, Any]:
    """Returns the heights of the two axes: low is what has nothing to show."""
    has_loss = _columns.is_there(columns.get("loss"))
    has_norm = _columns.is_there(columns.get("norm"))
    return {"height_ratios": [1 if has_loss else 0.2, 1.4 if has_norm else 0.2]}


def _message(columns: Columns) -> str:
    """Returns what the picture says, in one line."""
    norms, max_norms = columns.get("norm"), _columns.max_norm(columns)
    lost = _columns.crash(columns)
    if lost is not None:
        return f"Not finite from step {columns['step'][lost]:.0f} on"
    if norms is None or not _columns.is_there(norms):
        return _of_loss(columns)
    largest = _canvas.number(np.nanmax(columns["peak/norm"]))
    share = _columns.clipped_share(columns)
    if share is None or (share == 0 and max_norms is None):
        middle = _canvas.number(_columns.median(norms, columns))
        return f"The gradient norm: {middle} in the middle, {largest} at most"
    if share == 0:
        return f"The clip never acted: the largest norm was {largest}"
    shaded = "" if max_norms is None else ": shaded, what it took away"
    return f"Clipped at {_canvas.share(share)} of the steps{shaded}"


def _of_loss(columns: Columns) -> str:
    values = columns.get("loss", np.empty(0))
    values = values[np.isfinite(values)]
    if not values.size:
        return "Nothing to draw: neither a loss nor a norm"
    first, last = _canvas.number(values[0]), _canvas.number(values[-1])
    return f"The loss: {first} at first, {last} at the end"
