"""A run in a terminal: numbers, two lines, and the leaves that matter."""

from typing import Any

import numpy as np

from optaxclip._looking.history import history as _history
from optaxclip._pages import leaves as _leaves
from optaxclip._pages.line import status
from optaxclip._plots import canvas as _canvas, columns as _columns
from optaxclip._plots.columns import Columns

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 60  # letters of a line of bars
ROWS = 24  # of the table, at most


def live(history: Any) -> Any:
    """Returns a view of a run for the terminal, of 80 columns, to be drawn with rich.

    On top is the line of :func:`status`, below it loss and norm as bars (where they are
    positive, on a log scale), a cross where they are not finite. Then the
    eight leaves with the largest share of the squared norm, and those that are
    marked: dead (exactly 0 to the end), growing (the median of the last 64 rows is ten
    times that of the rows before), not finite. There are 24 leaves at most; the others
    are counted.

    Args:
      history: what ``optaxclip.history`` returns, or takes.

    Returns:
      A renderable of rich. Print it, or update a ``rich.live.Live`` with it.

    Raises:
      ImportError: rich is not installed.
      ValueError: there is no history in what was passed.

    Examples:
      >>> import rich.console
      >>> history = {"loss": [3.0, 2.0, 1.0], "norm": [9.0, 2.0, 1.0]}
      >>> rich.console.Console(width=80).print(optaxclip.live(history))
      step 2  loss 1  norm 1
      loss █▅▁
      norm █▃▁
    """
    seen = _history(history)
    columns = _columns.runs(seen)[-1]
    text = _rich("text").Text
    parts = [text(status(seen))]
    for name in ("loss", "norm"):
        if _columns.is_there(columns.get(name)):
            parts.append(text(f"{name} {bars(columns, name)}"))
    every = _leaves.table(columns)
    chosen = _leaves.chosen(every)[:ROWS]
    if chosen:
        parts.append(_table(chosen))
    if rest := [row for row in every if row not in chosen]:
        marked = sum(1 for row in rest if row.mark)
        of_these = f", {marked} of them marked" if marked else ""
        parts.append(text(f"and {len(rest)} more{of_these}"))
    return _rich("console").Group(*parts)


def bars(columns: Columns, name: str, width: int = WIDTH) -> str:
    """Returns a column as a line of bars, a cross where it is not finite."""
    drawn = _columns.thinned(columns, width)
    values, bad = drawn[name], drawn["nonfinite"] > 0
    told = np.isfinite(values) | bad
    values = values[told]
    finite = values[np.isfinite(values)]
    if np.all(finite > 0):
        values, finite = np.log(values), np.log(finite)
    low, high = finite.min(), finite.max()
    heights = (values - low) / ((high - low) or 1.0) * (len(BARS) - 1)
    return "".join(BARS[round(z)] if np.isfinite(z) else "x" for z in heights)


def _table(rows: list[_leaves.Leaf]) -> Any:
    table = _rich("table").Table(box=None, pad_edge=False, width=80)
    table.add_column("leaf", ratio=1, no_wrap=True)
    for name in ("now", "median", "last 64", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    escape = _rich("markup").escape
    for row in rows:
        numbers = map(_canvas.number, (row.now, row.median, row.recent))
        share = "" if np.isnan(row.share) else _canvas.share(row.share)
        style = "bold" if row.mark else ""
        path = escape(_canvas.shortened(row.path))
        table.add_row(path, *numbers, share, row.mark, style=style)
    return table


def _rich(name: str) -> Any:
    return _canvas.drawn_with(f"rich.{name}", "The view for the terminal is")
