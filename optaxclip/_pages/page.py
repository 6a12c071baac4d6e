"""One page that tells what a run did: the verdict, the leaves, the pictures."""

import html
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from optaxclip._advice.diagnose import BAD, diagnose
from optaxclip._looking.history import history as _history
from optaxclip._pages import (
    facts as _facts,
    figures as _figures,
    leaves as _leaves,
    style as _style,
)
from optaxclip._pages.leaves import Leaf
from optaxclip._plots import canvas as _canvas, columns as _columns
from optaxclip._plots.columns import Columns

FEW = 24  # leaves, in one table
HEAD = "leaf", "norm now", "median", "largest", "share", "mark"


def report(history: Any, path: str | os.PathLike[str]) -> None:
    """Writes what a run did onto one page of HTML: verdicts, leaves and pictures.

    On top is what :func:`diagnose` says, worst first; then the run in numbers, a table
    of the leaves, and the pictures of ``optaxclip.plot`` for which the history has
    the numbers.

    Guarantees:
      * The page is one file without scripts, and asks nothing of the network.
      * It is smaller than 1 MB, however long the run was, for up to 1000 leaves.
      * It can be read on a phone, in the dark, and by a screen reader.
      * The same history makes the same page.

    Args:
      history: what ``optaxclip.history`` returns, or takes, such as the path of a log.
      path: of the page to write.

    Raises:
      ImportError: matplotlib is not installed.
      OSError: the page can't be written there.
      ValueError: there is no history in what was passed.

    Examples:
      >>> import tempfile, pathlib
      >>> path = pathlib.Path(tempfile.mkdtemp(), "report.html")
      >>> optaxclip.report({"loss": [3.0, 2.0, 1.0], "norm": [9.0, 2.0, 1.0]}, path)
      >>> print(path.read_text(encoding="utf-8")[:15])
      <!DOCTYPE html>
    """
    seen = _history(history)
    verdicts, pictures = diagnose(seen), _figures.of(seen)
    last = _columns.runs(seen)[-1]
    title = ", ".join(_words(name) for name in verdicts)
    body = [
        f"<h1>{html.escape(title.capitalize())}</h1>",
        _verdicts(verdicts),
        _numbers(last),
        '<div class="pictures">',
        *(f"<figure>{svg}</figure>" for svg in pictures.values()),
        "</div>",
        _leaves_of(last),
    ]
    text = _style.PAGE.substitute(title=html.escape(title), body="\n".join(body))
    Path(path).write_text(text, encoding="utf-8")


def _words(name: str) -> str:
    return name.replace("_", " ")


def _verdicts(verdicts: Mapping[str, str]) -> str:
    """Returns the verdicts as a list, the faults among them marked."""
    items = []
    for name, text in verdicts.items():
        kind = ' class="bad"' if name in BAD else ""
        lines = re.sub("`(.+?)`", r"<code>\1</code>", html.escape(text))
        lines = lines.replace("\n", "<br />")
        items.append(f"<li{kind}><b>{html.escape(_words(name))}</b>{lines}</li>")
    return "\n".join(['<ol class="verdicts">', *items, "</ol>"])


def _numbers(columns: Columns) -> str:
    """Returns the run in numbers."""
    items = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd></div>"
        for name, text in _facts.of(columns)
    )
    return f"<dl>{items}</dl>"


def _leaves_of(columns: Columns) -> str:
    """Returns the table of the leaves; of many the chosen, the others folded away."""
    every = _leaves.table(columns)
    if not every:
        return ""
    if len(every) <= FEW:
        return "<h2>Leaves</h2>" + _table(every, f"All {len(every)}.")
    chosen = _leaves.chosen(every)
    note = (
        f"{len(chosen)} of {len(every)}: the largest shares, and all that are marked."
    )
    rest = f"<summary>All {len(every)} leaves</summary>{_table(every, '')}"
    return f"<h2>Leaves</h2>{_table(chosen, note)}<details>{rest}</details>"


def _table(rows: list[Leaf], caption: str) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in HEAD)
    lines = []
    for row in rows:
        numbers = (row.now, row.median, row.largest)
        share = "" if np.isnan(row.share) else _canvas.share(row.share)
        cells = [row.path, *map(_canvas.number, numbers), share, row.mark]
        kind = ' class="marked"' if row.mark else ""
        text = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        lines.append(f"<tr{kind}>{text}</tr>")
    caption = f"<caption>{caption}</caption>" if caption else ""
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f"<table>{caption}{body}</table>"
