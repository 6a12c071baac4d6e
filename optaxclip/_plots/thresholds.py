"""How many steps would each threshold clip?"""

from typing import Any

import numpy as np

from optaxclip._plots import canvas as _canvas, columns as _columns
from optaxclip._plots.canvas import ACCENT, DASHES, GREY, INK, PALE
from optaxclip._plots.columns import Columns

BINS = 60
LEVELS = 0.5, 0.9  # of the norms, that are marked


def thresholds(history: Any, suggestion: float | None = None, ax: Any = None) -> Any:
    """Draws how often each norm occurred, and how many steps each threshold would clip.

    The bars are a histogram of the norms before the clip, on a log axis. The line is,
    for each threshold, the share of the steps whose norm was above it. Marked are the
    thresholds that would clip half of the steps and a tenth of them, the run's
    own, if it has one for all leaves, and the suggestion.

    These are the norms of this run: with another threshold it would have had others,
    and those of a run that explodes were made by the explosion.

    Args:
      history: what ``optaxclip.history`` takes, with a norm.
      suggestion: a threshold to mark, such as that of ``suggest_max_norm``.
      ax: axes of matplotlib; new ones if None.

    Returns:
      The axes of the line; those of the histogram are behind it.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: there is no finite norm above 0, or the suggestion is not positive.

    Examples:
      >>> ax = optaxclip.plot.thresholds({"norm": [1.0, 2.0, 3.0, 10.0]}, 2.5)
      >>> print(ax.get_title(loc="left"))
      A threshold of 2.5 would have clipped 50 % of these steps

    References:
      `Deep Learning Tuning Playbook
      <https://github.com/google-research/tuning_playbook>`_, on gradient clipping.
    """
    columns = _columns.runs(history)[-1]
    norms, weights = _norms(columns)
    if suggestion is not None and not 0 < suggestion < np.inf:
        raise ValueError(f"Expected a suggestion above 0, got {suggestion}.")
    ax = _canvas.subplots(figsize=(6.4, 3.4)) if ax is None else ax
    places = _marks(columns, norms, weights, suggestion)
    near = [x for x, *_ in places]
    low, high = min(norms[0], *near) / 1.2, max(norms[-1], *near) * 1.2
    _canvas.log_axis(ax, low, high, "x")
    _histogram(ax, norms, weights)
    above = 1 - np.cumsum(weights) / weights.sum()
    x = np.concatenate([[low], norms, [high]])
    ax.step(x, 100 * np.concatenate([[1], above, [0]]), where="post", color=INK)
    ax.set(
        ylim=(0, 100), xlabel="threshold, or gradient norm", ylabel="steps clipped, %"
    )
    for i, (place, text, style) in enumerate(places):
        ax.axvline(place, **style)
        _name(ax, place, text, style["color"], i)
    _canvas.bare(ax)
    _canvas.title(ax, _message(columns, norms, weights, suggestion))
    return ax


def share_above(norms: np.ndarray, weights: np.ndarray, threshold: float) -> float:
    """Returns the share of the steps whose norm is above a threshold."""
    return float(weights[norms > threshold].sum() / weights.sum())


def _norms(columns: Columns) -> tuple[np.ndarray, np.ndarray]:
    """Returns the finite norms above 0 in order, and the steps they stand for."""
    norms = columns.get("norm", np.empty(0))
    told = np.isfinite(norms) & (norms > 0)
    if not told.any():
        raise ValueError(
            "Expected a history with finite norms above 0 in the column `norm`, got"
            f" {', '.join(columns)}."
        )
    order = np.argsort(norms[told], kind="stable")
    return norms[told][order], columns["width"][told][order]


def _marks(
    columns: Columns, norms: np.ndarray, weights: np.ndarray, suggestion: float | None
) -> list[tuple[float, str, dict[str, Any]]]:
    """Returns thresholds to mark, with their names and styles."""
    places = []
    reached = np.cumsum(weights) / weights.sum()
    for level in LEVELS:
        value = float(norms[np.searchsorted(reached, level - 1e-9)])
        text = f"{100 * (1 - level):.0f} % clipped at {_canvas.number(value)}"
        places.append((value, text, {"color": GREY, "linewidth": 1}))
    max_norms = _columns.max_norm(columns)
    if max_norms is not None:
        value = float(max_norms[np.isfinite(max_norms)][-1])
        text = f"yours: {_canvas.number(value)}"
        style = {"color": ACCENT, "linewidth": 1.5, "linestyle": DASHES}
        places.append((value, text, style))
    if suggestion is not None:
        text = f"suggested: {_canvas.number(suggestion)}"
        places.append((float(suggestion), text, {"color": ACCENT, "linewidth": 2}))
    return [mark for mark in places if mark[0] > 0]


def _name(ax: Any, place: float, text: str, color: str, row: int) -> None:
    """Writes a name beside its line, each a line lower than the one before."""
    low, high = np.log(ax.get_xlim())
    side = "right" if np.log(place) > low + 0.6 * (high - low) else "left"
    y = 0.97 - 0.09 * row
    where: Any = {"transform": ax.get_xaxis_transform(), "va": "top", "ha": side}
    color = INK if color == GREY else color
    ax.text(
        place, y, f" {text} ", color=color, bbox=_canvas.BADGE, **where, **_canvas.SMALL
    )


def _histogram(ax: Any, norms: np.ndarray, weights: np.ndarray) -> None:
    low, high = ax.get_xlim()
    behind = ax.twinx()
    behind.hist(norms, np.geomspace(low, high, BINS + 1), weights=weights, color=PALE)
    behind.set_yticks([])
    behind.set_ylim(bottom=0)
    _canvas.bare(behind)
    ax.set_zorder(behind.get_zorder() + 1)
    ax.patch.set_visible(False)


def _message(
    columns: Columns, norms: np.ndarray, weights: np.ndarray, suggestion: float | None
) -> str:
    if _columns.crash(columns) is not None:
        return "Norms of a run that did not stay finite: no guide to a threshold"
    value = suggestion
    if value is None:
        _, (value, *_), *_ = _marks(columns, norms, weights, None)
    share = _canvas.share(share_above(norms, weights, value))
    name = _canvas.number(value)
    return f"A threshold of {name} would have clipped {share} of these steps"
