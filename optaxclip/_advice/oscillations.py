"""Does the loss swing, or stand above its start?"""

import numpy as np

from optaxclip._advice.courses import SURE, diverged
from optaxclip._advice.run import (
    Run,
    evened,
    noise,
    rolling_median,
    series,
    short,
)


def oscillating(run: Run) -> str | None:
    """Says that the loss rose above its start, or swings from row to row."""
    run = evened(run)
    loss = series(run, run.loss)
    value = loss.value
    if len(value) < 5 or run.begins_late or diverged(run):
        return None
    rest = value[1:]
    is_loss = value[0] > 0.1 * np.median(rest)  # not one that begins at zero
    if is_loss and rest.min() > value[0] + max(0.15 * value[0], 3 * noise(rest)):
        return (
            f"OSCILLATING, or too fast: the loss began at {short(value[0])}, rose to"
            f" {short(rest.max())} and never came back to its start (now"
            f" {short(value[-1])}). Lower the learning rate, or warm it up more slowly."
        )
    swings = _swings(rolling_median(value, 3))
    peaks = [row for row in swings if _is_felt(run, loss.step[row])]
    if len(peaks) > 1:
        where = ", ".join(str(step) for step in loss.step[peaks][:5])
        return (
            f"OSCILLATING: {len(peaks)} times the loss rose threefold or more, above"
            f" the {short(value[0])} that it began with, and fell back; the peaks are"
            f" at steps {where}. The steps are too large: lower the learning rate, or"
            " clip."
        )
    if len(value) < 30 or _alternation(value) > -0.75:
        return None
    return (
        f"OSCILLATING: the loss jumps up and down from row to row, by about"
        f" {short(np.median(np.abs(np.diff(value))))} around {short(np.median(value))}."
        " Lower the learning rate."
    )


def _swings(value: np.ndarray) -> list[int]:
    """Returns the rows where a positive loss peaks, threefold the lows around them.

    Peaks as high as the start, and far beyond the noise.
    """
    if value.min() <= 0:
        return []
    logs = np.log(value)
    leg = max(np.log(3), SURE * noise(logs))
    peaks, low, high = [], 0, 0  # rows of the last low, and of the highest since
    for i, x in enumerate(logs):
        if x > logs[high]:
            high = i
        if logs[high] - logs[low] < leg:  # no peak yet
            low = high = i if x < logs[low] else low
        elif logs[high] - x > leg:
            peaks += [high] if value[high] > value[0] else []
            low = high = i
    return peaks


def _is_felt(run: Run, step: int) -> bool:
    """Whether the norm was high just before, too; true where there are no norms."""
    norm = series(run, run.norm)
    near = norm.value[norm.step <= step][-5:]
    return not len(near) or bool(near.max() > 3 * np.median(norm.value))


def _alternation(value: np.ndarray) -> float:
    """Returns the correlation of what is beside the trend with the value before."""
    rest = value - rolling_median(value, 9)
    return float(np.corrcoef(rest[1:], rest[:-1])[0, 1]) if rest.std() else 0.0
