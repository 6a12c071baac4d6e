"""What a record holds, computed from all steps of a run at once: the definition."""

import itertools

import numpy as np

COUNTS = ("width", "skipped", "clipped", "nonfinite")


def luck(step):
    """MurmurHash3's finalizer, of the step and a constant."""
    x = int(step) ^ 0x9E3779B9
    for shift, factor in (16, 0x85EBCA6B), (13, 0xC2B2AE35):
        x = ((x ^ (x >> shift)) * factor) % 2**32
    return x ^ (x >> 16)


def events(steps):
    """The rows: of steps in a row that are not finite the first, with all counted."""
    found = []
    for is_bad, some in itertools.groupby(steps, lambda step: step["nonfinite"]):
        run = list(some)
        parts = [run] if is_bad else [[step] for step in run]
        for part in parts:
            row = dict(part[0])
            row |= {key: sum(step[key] for step in part) for key in COUNTS[1:]}
            found.append(row | {"width": len(part)})
    return found


def history(steps, size):
    """The rows of the record of these steps.

    Args:
      steps: a dictionary for each, of its number, its values, an array, and whether it
        was skipped, clipped, not finite.
      size: of the record.
    """
    rows = events(steps)
    past, last = rows[:-size], rows[-size:]
    width = 1
    while -(-len(past) // width) > size:
        width *= 2
    stretches = [past[i : i + width] for i in range(0, len(past), width)]
    return [_joined(some) for some in [*stretches, *([row] for row in last)]]


def _joined(rows):
    drawn = max(rows, key=lambda row: luck(row["step"]))
    values = np.stack([row["values"] for row in rows]).astype(float)
    finite = np.where(np.isfinite(values), values, -np.inf)
    largest = np.max(finite, axis=0)
    counts = {key: sum(row[key] for row in rows) for key in COUNTS}
    return drawn | counts | {"largest": np.where(largest > -np.inf, largest, np.nan)}
