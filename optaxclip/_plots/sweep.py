"""Which threshold ends at the lowest loss?"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from optaxclip._plots import canvas as _canvas
from optaxclip._plots.canvas import ACCENT, GREY, INK, PALE

NEAR = 0.05  # of the best loss: as good
BEYOND = 1e6  # times the best loss: above the axis


def sweep(
    max_norms: Sequence[float] | Any,
    losses: Any,
    suggestion: float | None = None,
    ax: Any = None,
) -> Any:
    """Draws the loss at the end of the run against the threshold of its clip.

    The dots are runs, the line their medians over the seeds, in which a lost run counts
    as the worst. A run whose loss is NaN or infinite is a cross at the top, one above
    a million times the best median an arrow there. Shaded are the
    thresholds whose median is within 5 % of the best.

    An infinite threshold, no clip, is at the right.

    Args:
      max_norms: the thresholds, above 0, of shape `[thresholds]`.
      losses: at the end of each run, `[thresholds]` or `[thresholds, seeds]`.
      suggestion: a threshold to mark, such as that of ``suggest_max_norm``.
      ax: axes of matplotlib; new ones if None.

    Returns:
      The axes.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: a threshold is not above 0, the shapes don't fit, or the suggestion is
        not positive.

    Examples:
      >>> losses = [[0.9, 0.8], [0.3, 0.4], [0.3, jnp.nan]]
      >>> ax = optaxclip.plot.sweep([0.1, 1.0, 10.0], losses)
      >>> print(ax.get_title(loc="left"))
      Best: 1; of 6 runs 1 is lost
    """
    thresholds, values = _checked(max_norms, losses, suggestion)
    ax = _canvas.subplots(figsize=(6.4, 3.6)) if ax is None else ax
    x = _places(thresholds)
    medians = np.median(np.where(np.isfinite(values), values, np.inf), axis=1)
    every = x if suggestion is None else np.append(x, suggestion)
    _canvas.log_axis(ax, every.min() / 1.6, every.max() * 1.6, "x")
    _losses(ax, x, values, medians)
    _near(ax, x, medians)
    where: Any = {"transform": ax.get_xaxis_transform(), "va": "bottom"}
    if suggestion is not None:
        ax.axvline(suggestion, color=ACCENT, linewidth=2)
        text = f" suggested: {_canvas.number(suggestion)} "
        ax.text(suggestion, 0.02, text, color=ACCENT, **where, **_canvas.SMALL)
    for place in x[np.isinf(thresholds)]:
        ax.axvline(place, color=GREY, linewidth=0.8, linestyle=_canvas.DASHES)
        ax.text(place, 0.02, "no clip ", ha="right", **where, **_canvas.SMALL)
    ax.set(xlabel="threshold", ylabel="loss at the end")
    _canvas.bare(ax)
    _canvas.title(ax, _message(thresholds, values, medians))
    return ax


def _checked(max_norms: Any, losses: Any, suggestion: float | None) -> Any:
    """Returns the thresholds in order, and the losses `[thresholds, seeds]`."""
    thresholds, values = np.asarray(max_norms, float), np.asarray(losses, float)
    if thresholds.ndim != 1 or not thresholds.size or not np.all(thresholds > 0):
        raise ValueError(
            f"Expected thresholds above 0 of shape [thresholds], got {max_norms}."
        )
    if values.shape[:1] != thresholds.shape or values.ndim > 2 or not values.size:
        raise ValueError(
            f"Expected losses of shape [{len(thresholds)}] or [{len(thresholds)},"
            f" seeds], one row for each threshold, got shape {list(values.shape)}."
        )
    if suggestion is not None and not 0 < suggestion < np.inf:
        raise ValueError(f"Expected a finite suggestion above 0, got {suggestion}.")
    order = np.argsort(thresholds)
    return thresholds[order], values.reshape(len(thresholds), -1)[order]


def _places(thresholds: np.ndarray) -> np.ndarray:
    """Returns where each threshold is drawn: an infinite one right of the others."""
    finite = thresholds[np.isfinite(thresholds)]
    last = 4 * finite.max() if finite.size else 1.0
    return np.where(np.isfinite(thresholds), thresholds, last)


def _losses(ax: Any, x: np.ndarray, values: np.ndarray, medians: np.ndarray) -> None:
    """Draws runs, medians, and above them what is lost or far above the best."""
    best, seeds = medians.min(), values.shape[1]
    shown = np.isfinite(values) & ((values <= BEYOND * best) | (best <= 0))
    places = np.broadcast_to(x[:, None], values.shape)
    _limits(ax, values[shown]) if shown.any() else ax.set_yticks([])
    ax.plot(places[shown], values[shown], ".", color=GREY, markersize=5)
    ax.plot(x, np.where(shown.any(axis=1), medians, np.inf), color=INK, marker="o")
    lost = np.sum(~np.isfinite(values), axis=1)
    _canvas.at_edge(ax, x[lost > 0], 0.95, "x", "lost")
    _canvas.at_edge(ax, x[np.any(np.isfinite(values) & ~shown, axis=1)], 0.82, "^", "")
    for place, count in zip(x[lost > 0], lost[lost > 0], strict=True):
        text, up = (
            f"{count} of {seeds}" if seeds > 1 else "lost",
            ("data", "axes fraction"),
        )
        ax.annotate(
            text, (place, 0.91), xycoords=up, ha="center", va="top", **_canvas.SMALL
        )


def _limits(ax: Any, shown: np.ndarray) -> None:
    """Chooses the axis of the losses, with room at the top for those that are lost."""
    low, high = float(shown.min()), float(shown.max())
    if low > 0 and high > 30 * low:
        return _canvas.log_axis(ax, low / 1.3, high * (high / low) ** 0.25)
    room = (high - low) or abs(high) or 1.0
    ax.set_ylim(low - 0.1 * room, high + 0.25 * room)


def _is_near(medians: np.ndarray) -> np.ndarray:
    best = medians.min()
    return np.isfinite(medians) & (medians <= best + NEAR * abs(best))


def _near(ax: Any, x: np.ndarray, medians: np.ndarray) -> None:
    """Shades the thresholds that are as good as the best, up to halfway to the next."""
    middles = np.sqrt(x[:-1] * x[1:])
    left, right = (
        np.append(ax.get_xlim()[0], middles),
        np.append(middles, ax.get_xlim()[1]),
    )
    for i in np.flatnonzero(_is_near(medians)):
        ax.axvspan(left[i], right[i], color=PALE, alpha=0.5, linewidth=0)


def _message(thresholds: np.ndarray, values: np.ndarray, medians: np.ndarray) -> str:
    lost, runs = int(np.sum(~np.isfinite(values))), values.size
    ending = (
        f"; of {runs} runs {lost} {'is' if lost == 1 else 'are'} lost" if lost else ""
    )
    if not np.isfinite(medians).any():
        return f"No threshold keeps most of its runs{ending}"
    near = thresholds[_is_near(medians)]
    best = thresholds[np.argmin(medians)]
    names = [
        "no clip" if np.isinf(z) else _canvas.number(z)
        for z in (best, near[0], near[-1])
    ]
    if len(near) == 1:
        return f"Best: {names[0]}{ending}"
    return f"Best: {names[0]}; within 5 %: {names[1]} to {names[2]}{ending}"
