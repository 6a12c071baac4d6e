"""Where does a log begin anew, and what did it write twice?"""

import itertools
import math
from collections.abc import Sequence

import numpy as np

from optaxclip._looking import meanings as _meanings
from optaxclip._looking.cells import Row


def of_training(row: Row) -> Row:
    """Returns the loss and the norms of a row."""
    return {k: value for k, value in row.items() if _meanings.is_of_training(k)}


def placed(rows: Sequence[Row]) -> list[Row]:
    """Returns rows with a step each, oldest first.

    Rows without one are left out where most have one, else all are numbered.
    """
    found = [row for row in rows if math.isfinite(row.get("step", math.nan))]
    if 2 * len(found) < len(rows) or not found:
        return [row | {"step": i} for i, row in enumerate(rows)]
    falls = [a["step"] - b["step"] for a, b in itertools.pairwise(found)]
    is_newest_first = len(falls) > 1 and min(falls) >= 0 and max(falls) > 0
    return found[::-1] if is_newest_first else found


def divided(rows: Sequence[Row]) -> list[list[Row]]:
    """Divides rows into runs: a step that goes back to the first begins another.

    One that goes back less resumes: what it does again replaces what was there. Where
    steps count from the first again in each epoch, the run goes on.
    """
    runs: list[list[Row]] = [[]]
    offset = 0.0
    for row in rows:
        run = runs[-1]
        step = row["step"] + offset
        if run and step < run[-1]["step"]:
            if _goes_on(run, row, row["step"] <= run[0]["step"]):
                recent = [x["step"] for x in run[-100:]]
                usual = np.median(np.diff(recent)) if recent[1:] else 1
                offset = recent[-1] + max(usual, 1) - row["step"]
            elif row["step"] > run[0]["step"]:
                while run[-1]["step"] >= step:
                    run.pop()
            else:
                runs.append(run := [])
                offset = 0.0
        run.append(row | {"step": row["step"] + offset})
    return runs


def _goes_on(run: Sequence[Row], row: Row, is_first: bool) -> bool:
    """Whether a row whose step goes back is of the same run, and of what comes next.

    Then the epoch is a later one; or the step is the first one, and the loss nearer to
    the last ones than to the first.
    """
    if "epoch" in row and "epoch" in run[-1]:
        return row["epoch"] > run[-1]["epoch"]
    losses = [x["loss"] for x in run[-9:] if "loss" in x]
    first = next((x["loss"] for x in run if "loss" in x), math.nan)
    if not is_first or "loss" not in row or len(losses) < 3:
        return False
    last = float(np.median(losses[-3:]))
    return abs(row["loss"] - last) < abs(row["loss"] - first)


def merged(run: Sequence[Row]) -> list[Row]:
    """Joins rows of one step: what one lacks is in another, and the last counts.

    Where more than a tenth repeat the step before, it is rounded: all stay, evenly
    spread up to the next step.
    """
    rows: list[Row] = []
    pairs = itertools.pairwise(run)
    again = [a for a, b in pairs if a["step"] == b["step"] and _clash(a, b)]
    is_rounded = len(again) > max(2, len(run) / 10)
    for row in run:
        same = bool(rows) and rows[-1]["step"] == row["step"]
        if same and not (is_rounded and _clash(rows[-1], row)):
            row = rows.pop() | row
        rows.append(row)
    rows = [row for row in rows if of_training(row)]
    return _spread(rows) if is_rounded else rows


def _spread(rows: Sequence[Row]) -> list[Row]:
    steps, counts = np.unique([row["step"] for row in rows], return_counts=True)
    last = steps[-1] + (steps[-1] - steps[0]) / max(len(steps) - 1, 1)
    starts = np.cumsum(counts) - counts
    places = np.append(starts, len(rows))
    even = np.interp(np.arange(len(rows)), places, np.append(steps, last))
    return [row | {"step": float(x)} for row, x in zip(rows, even, strict=True)]


def _clash(one: Row, other: Row) -> bool:
    return bool(of_training(one).keys() & of_training(other).keys())
