"""Does the loss swing, or stand above its start?"""

import numpy as np

from optaxclip._advice.run import (
    Run,
    evened,
    noise,
    rolling_median,
    series,
    short,
)

SURE = 6.0  # standard deviations
THREEFOLD = 3.0
UP_AND_DOWN = -0.85  # correlation of a change with the one before; -0.5 by chance
ROWS = 30  # for that
LITTLE = 0.1  # of the loss


def oscillating(run: Run) -> str | None:
    """Says that the loss rose above its start, or swings from row to row."""
    run = evened(run)
    loss = series(run, run.loss)
    value = loss.value
    if len(value) < 5 or run.begins_late:
        return None
    if _never_came_back(run, value):
        return (
            f"OSCILLATING, or too fast: the loss began at {short(value[0])}, rose to"
            f" {short(value.max())} and never came back to its start (now"
            f" {short(value[-1])}). Lower the learning rate, or warm it up more slowly."
        )
    peaks = [row for row in _swings(value) if _is_felt(run, loss.step[row])]
    if len(peaks) > 1:
        where = ", ".join(str(step) for step in loss.step[peaks][:5])
        return (
            f"OSCILLATING: {len(peaks)} times the loss rose threefold or more, above"
            f" the {short(value[0])} that it began with, and fell back; the peaks are"
            f" at steps {where}. The steps are too large: lower the learning rate, or"
            " clip."
        )
    usual, jump = float(value.mean()), float(np.median(np.abs(np.diff(value))))
    is_little = len(value) < ROWS or jump < LITTLE * abs(usual)
    if is_little or _alternation(value) > UP_AND_DOWN:
        return None
    return (
        f"OSCILLATING: the loss jumps up and down from row to row, by about"
        f" {short(jump)} around {short(usual)}."
        " Unless the data alternate so, lower the learning rate."
    )


def _never_came_back(run: Run, value: np.ndarray) -> bool:
    """Whether the loss is above its start ever since, clearly.

    A loss that begins near zero by construction rises, but not at once with the norms.
    """
    start, rest = value[0], value[1:]
    if start <= 0 or rest.min() <= 1.15 * start:
        return False
    usual = float(np.median(rest))
    is_chance = np.log(usual / start) < 5 * noise(np.log(rest))
    if is_chance and rest.min() < start + 3 * noise(rest):
        return False
    if start > 0.1 * usual:
        return True
    norm = series(run, run.norm).value
    with_norms = len(norm) > 5 and np.median(norm[1:]) > THREEFOLD * norm[0]
    return bool(with_norms and np.median(rest[:3]) > 0.3 * usual)


def _swings(value: np.ndarray) -> list[int]:
    """Returns the rows where a positive loss peaks, threefold the lows around them.

    Peaks as high as the start, and far beyond the noise.
    """
    if value.min() <= 0:
        return []
    logs = rolling_median(np.log(value), 3)
    leg = max(np.log(THREEFOLD), SURE * _jumps(np.log(value)))
    peaks, low, high = [], 0, 0  # rows of the last low, and of the highest since
    for i, x in enumerate(logs):
        if x > logs[high]:
            high = i
        if logs[high] - logs[low] < leg:  # no peak yet
            low = high = i if x < logs[low] else low
        elif logs[high] - x > leg:
            peaks += [high] if logs[high] > np.log(value[0]) else []
            low = high = i
    return peaks


def _jumps(values: np.ndarray) -> float:
    """Returns the deviation from the larger changes, in the quietest third of the rows.

    A loss of two kinds of batches jumps between two levels: that is noise, too.
    """
    thirds = np.array_split(np.abs(np.diff(values)), 3)
    return min(float(np.quantile(x, 0.8)) for x in thirds if len(x)) / 1.28 / 2**0.5


def _is_felt(run: Run, step: int) -> bool:
    """Whether the norm was high just before, too; true where there are no norms."""
    norm = series(run, run.norm)
    near = norm.value[norm.step <= step][-5:]
    return not len(near) or bool(near.max() > THREEFOLD * np.median(norm.value))


def _alternation(value: np.ndarray) -> float:
    """Returns the correlation of each change with the one before."""
    change = np.diff(value)
    change = change / (np.abs(change).max() or 1.0)
    power = float(np.sum(change[1:] ** 2) + np.sum(change[:-1] ** 2)) / 2
    return float(np.sum(change[1:] * change[:-1])) / power if power > 0 else 0.0
