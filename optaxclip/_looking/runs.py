"""Where does a log begin anew, and what did it write twice?"""

import itertools
import re
from collections.abc import Sequence

import numpy as np

from optaxclip._looking.logs import Row

_TRAINING = re.compile(r"loss|norm(/.+)?|(clip|clip_0)/norm(/.+)?")


def is_of_training(name: str) -> bool:
    """Whether a column is one that evaluations don't have: the loss, or a norm."""
    return _TRAINING.fullmatch(name) is not None


def of_training(row: Row) -> Row:
    """Returns the loss and the norms of a row."""
    return {key: value for key, value in row.items() if is_of_training(key)}


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
            last = run[-1]
            if step > run[0]["step"] + offset:
                runs[-1] = run = [x for x in run if x["step"] < step]
            elif _goes_on(run, row):
                usual = np.median(np.diff([x["step"] for x in run])) if run[1:] else 1
                offset = last["step"] + max(usual, 1) - row["step"]
            else:
                runs.append(run := [])
                offset = 0.0
        run.append(row | {"step": row["step"] + offset})
    return runs


def _goes_on(run: Sequence[Row], row: Row) -> bool:
    """Whether a step that goes back to the first is of the same run.

    Then the epoch is a later one, or the loss is nearer to the last ones than to the
    first.
    """
    if "epoch" in row and "epoch" in run[-1]:
        return row["epoch"] > run[-1]["epoch"]
    losses = [x["loss"] for x in run if "loss" in x]
    if "loss" not in row or len(losses) < 3:
        return False
    last = float(np.median(losses[-3:]))
    return abs(row["loss"] - last) < abs(row["loss"] - losses[0])


def merged(run: Sequence[Row]) -> list[Row]:
    """Joins rows of one step: what one lacks is in another, and the last counts.

    Where more than a tenth repeat the step before, it is rounded, and all stay.
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
    return rows


def _clash(one: Row, other: Row) -> bool:
    return bool(of_training(one).keys() & of_training(other).keys())
