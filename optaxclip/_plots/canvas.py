"""Axes, colours, numbers and marks, the same in every picture."""

import importlib
from typing import Any

import numpy as np

from optaxclip._advice.run import short

INK, GREY, PALE, ACCENT = "black", "#8c8c8c", "#c8c8c8", "#0072B2"
LETTERS = 28  # of a path, written at most
DASHES = (0, (4, 3))
SMALL: Any = {"fontsize": "small"}
BADGE: Any = {"boxstyle": "square,pad=0.15", "facecolor": "white", "edgecolor": "none"}


def subplots(rows: int = 1, **options: Any) -> Any:
    """Opens a figure of pyplot, which notebooks show; returns its axes."""
    return _matplotlib("pyplot").subplots(rows, layout="constrained", **options)[1]


def figure(width: float, height: float) -> Any:
    """Opens a figure that is saved, and shown nowhere."""
    return _matplotlib("figure").Figure((width, height), layout="constrained")


def drawn_with(module: str, what: str) -> Any:
    """Imports a module that the extra `looking` brings.

    Raises:
      ImportError: it is not there. The message begins with what is drawn with it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{what} drawn with {module.split('.')[0]}, which is not installed:"
            ' `pip install "optaxclip[looking]"`.'
        ) from error


def _matplotlib(name: str) -> Any:
    return drawn_with(f"matplotlib.{name}", "Pictures are")


def number(value: float) -> str:
    """Returns a number for people, three digits at most."""
    return short(value).replace("nan", "NaN").replace("inf", "infinite")


def share(value: float) -> str:
    """Returns a share in percent, never 0 or 100 % for what is nearly that."""
    percent = 100 * value
    if 0 < percent < 1:
        return f"{short(float(f'{percent:.1g}'))} %"
    return "over 99 %" if 99.5 <= percent < 100 else f"{percent:.0f} %"


def shortened(path: str) -> str:
    """Returns the last letters of a path that is long."""
    return path if len(path) <= LETTERS else "…" + path[1 - LETTERS :]


def bare(ax: Any) -> None:
    """Takes the frame away but for the two axes."""
    ax.spines[["top", "right"]].set_visible(False)


def log_axis(ax: Any, low: float, high: float, name: str = "y") -> None:
    """Makes an axis logarithmic, at least between two numbers, labelled plainly."""
    if high < 3 * low:
        middle = np.sqrt(low) * np.sqrt(high)
        low, high = middle / 3, middle * 3
    ax.set(**{f"{name}scale": "log", f"{name}lim": (float(low), float(high))})
    axis = ax.yaxis if name == "y" else ax.xaxis
    axis.set_major_formatter(lambda x, _: short(x))
    few = "25" if high < 30 * low else ""
    axis.set_minor_formatter(lambda x, _: short(x) if f"{x:e}"[0] in few else "")


def title(ax: Any, text: str, **options: Any) -> None:
    """Writes the message of a picture."""
    ax.set_title(text, loc="left", fontsize="medium", pad=10, **options)


def at_edge(ax: Any, x: np.ndarray, height: float, marker: str, label: str) -> None:
    """Puts marks near an edge, for what is not on the axis."""
    if x.size:
        place: Any = {"transform": ax.get_xaxis_transform(), "clip_on": False}
        style: Any = {"marker": marker, "linestyle": "", "markersize": 5}
        ax.plot(x, np.full(x.shape, height), color=INK, label=label, **style, **place)


def at_end(ax: Any, y: float, text: str, **options: Any) -> None:
    """Writes beside the right edge, at the height where a line ends."""
    ax.annotate(
        text,
        (1, np.clip(y, *ax.get_ylim())),
        xycoords=("axes fraction", "data"),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        annotation_clip=False,
        **SMALL | options,
    )


def say(ax: Any, text: str) -> None:
    """Writes in the middle of axes that have nothing else to show."""
    ax.text(
        0.5,
        0.5,
        text,
        transform=ax.transAxes,
        ha="center",
        va="center",
        **SMALL,
    )
    ax.set_yticks([])
    ax.set_ylabel("")
