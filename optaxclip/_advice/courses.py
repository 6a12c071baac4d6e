"""Where does a finite run go: does it turn back, or run away?

Levels say nothing, for they scale with the loss and the batch, and single norms far
above the others are routine. So these rules compare a run with itself, and what is not
beyond its own noise is not said.
"""

import numpy as np

from optaxclip._advice.run import (
    Run,
    Series,
    coarse,
    evened,
    noise,
    rolling_median,
    series,
    short,
    wander,
)
from optaxclip._advice.traction import learns

ENOUGH = 8  # rows, for a level and its noise
SURE = 6.0  # standard deviations
TENFOLD = 10.0
HUGE = 1e6  # of a loss whose beginning nobody saw

GROWS = " Such growth often ends in an explosion: clip, or lower the learning rate."
ENDLESS = (
    " The loss has no lower end, and the steps follow it down: bound the loss, or clip."
)


def diverged(run: Run) -> str | None:
    """Says that the loss ends far above its best, and stays there."""
    run = evened(run)
    loss = coarse(series(run, run.loss))
    if len(loss.value) < ENOUGH:
        return _diverged_in_a_few(run, loss)
    window = max(3, len(loss.value) // 20)
    level = rolling_median(loss.value, window)
    best, end = int(np.argmin(level)), float(np.median(loss.value[-window:]))
    low, found = float(level[best]), Series(loss.step[best], level[best])
    sure = SURE * max(wander(loss.value), noise(loss.value[-4 * window :]))
    stays = level[-window:].min() > (low + end) / 2
    is_told = stays and end - low > sure and _is_far(run, loss, found, end)
    if not is_told and not _ran_away(run, loss, found, level[-window:].min()):
        return _as_if_diverged(run, loss)
    start, since = short(np.median(loss.value[:3])), loss.step[best]
    again = f"go back to a checkpoint from step {since} or before, and go on"
    return (
        f"DIVERGED: the loss was {short(low)} near step {since} and is {short(end)} at"
        f" the end, step {loss.step[-1]}; it began at {start}.{_norms(run, int(since))}"
        " Most often the steps are too large:"
        f" {'begin anew' if best < window else again} with a lower learning rate or a"
        " lower threshold."
    )


def growing(run: Run) -> str | None:
    """Says that the norms grew tenfold while the loss got no better."""
    run = evened(run)
    norm, loss = coarse(series(run, run.norm)), series(run, run.loss)
    if len(norm.value) < ENOUGH:
        return _speeding_up(norm)
    endless = _falls_without_end(loss)
    few, quarter = max(3, len(norm.value) // 10), len(norm.value) // 4
    from_first = len(norm.value) < 2 * ENOUGH or endless
    early = slice(0, 3) if from_first else slice(quarter, 2 * quarter)
    low, high = np.median(norm.value[early]), float(np.median(norm.value[-few:]))
    sure = np.exp(min(3 * noise(np.log(norm.value[norm.value > 0])), 700))
    if not 0 < low < high / max(TENFOLD, sure):
        return _speeding_up(norm)
    if not endless and not _no_better(loss, norm.step[early], norm.step[-few]):
        return None
    losses = ""
    if len(loss.value):
        best, last = short(loss.value.min()), short(loss.value[-1])
        losses = f", while the loss, {best} at best, is {last} at the end"
    return (
        f"GROWING: the gradient norm rose from {short(low)} near step"
        f" {norm.step[early][0]} to {short(high)} at step {norm.step[-1]}{losses}."
        f"{ENDLESS if endless else GROWS}"
    )


def _diverged_in_a_few(run: Run, loss: Series) -> str | None:
    """Says that the last three losses of an excerpt are far above the first two."""
    first, last = loss.value[:2], loss.value[-3:]
    if len(loss.value) < 5 or first.min() <= 0:
        return None
    times = last.min() / first.max()
    norms = _norms_rose(run, int(loss.step[1]))
    if times < TENFOLD and not (times > 3 and norms > 3):
        return None
    return (
        f"DIVERGED: the loss was {short(first[-1])} at step {loss.step[1]} and is"
        f" {short(np.median(last))} in the last rows.{_norms(run, int(loss.step[1]))}"
        " Most often the steps are too large: go on from a checkpoint of before, with a"
        " lower learning rate or a lower threshold."
    )


def _ran_away(run: Run, loss: Series, low: Series, end: float) -> bool:
    """Whether a loss and its norms grew by orders of magnitude, and go on to.

    Such a loss ends in swings as large as itself, which hide the rise.
    """
    if loss.value.min() <= 0 or end < TENFOLD * np.median(loss.value[:3]):
        return False
    is_far = end > TENFOLD**2 * float(low.value)
    return is_far and _norms_rose(run, int(low.step)) > 3


def _is_far(run: Run, loss: Series, low: Series, end: float) -> bool:
    """Whether a loss at its end is so far above its best that it means something.

    A rise to a quarter of the way back to the start does. A smaller one does if the
    norms tripled. They must have, too, where the objective has both signs, or begins
    near zero by construction, and may rise.
    """
    start, best = float(np.median(loss.value[:3])), float(low.value)
    rise = end - best
    norms = _norms_rose(run, int(low.step))
    is_loss = loss.value.min() > 0 and start > 0.1 * end
    if rise > max(0.25 * (start - best), 0.15 * abs(best)):
        return is_loss or norms > 3
    return is_loss and best > 0.1 * start and rise > 0.08 * best and norms > 3


def _norms_rose(run: Run, step: int) -> float:
    """Returns how many times higher the norms are at the end than up to a step."""
    norm = series(run, run.norm)
    near, after = norm.value[norm.step <= step][-10:], norm.value[norm.step > step]
    if not len(near) or not len(after) or np.median(near) <= 0:
        return 0.0
    return float(np.median(after[-10:]) / np.median(near))


def _no_better(loss: Series, early: np.ndarray, late: int) -> bool:
    """Whether the loss fell no more since the norms were low, or has turned upward."""
    if len(loss.value) < 3:
        return True
    then = loss.value[(loss.step >= early[0]) & (loss.step <= early[-1])]
    then = then if len(then) else loss.value[:3]
    now = loss.value[loss.step >= late]
    now = now if len(now) >= 3 else loss.value[-3:]
    error = noise(loss.value) * np.sqrt(1 / len(then) + 1 / len(now))
    if np.median(then) - np.median(now) < 3 * error:
        return True
    best = float(rolling_median(loss.value, 3).min())
    turn = max(0.25 * abs(best), 2 * noise(loss.value))
    return bool(np.median(loss.value[-3:]) > best + turn)


def _falls_without_end(loss: Series) -> bool:
    """Whether the loss is below zero, ten times as far as where it began."""
    if len(loss.value) < ENOUGH:
        return False
    start, end = np.median(loss.value[:3]), np.median(loss.value[-3:])
    return bool(end < 0 and end < -TENFOLD * abs(start))


def _speeding_up(norm: Series) -> str | None:
    """Says that the last three norms rose faster and faster, far beyond the noise."""
    logs = np.log(norm.value[norm.value > 0])
    if len(logs) < 6:
        return None
    changes = np.diff(logs)
    last, quiet = changes[-3:], np.abs(changes[:-3]).max()
    is_faster = (last[1:] > 1.5 * last[:-1]).all() and last[0] > 0
    if not is_faster or last.sum() < max(0.2, 20 * quiet):
        return None
    return (
        f"GROWING, faster and faster: the gradient norm rose from"
        f" {short(norm.value[-4])} to {short(norm.value[-1])} between steps"
        f" {norm.step[-4]} and {norm.step[-1]}, after {len(logs) - 3} quiet rows. Too"
        " few rows to say more: watch it, and have a clip in place."
    )


def _norms(run: Run, step: int) -> str:
    norm = series(run, run.norm)
    before, after = norm.value[norm.step <= step], norm.value[norm.step > step]
    if not len(before) or not len(after):
        return ""
    then, high = short(np.median(before[-10:])), short(after.max())
    return f" The gradient norm was {then} then, and {high} at its highest since."


def _as_if_diverged(run: Run, loss: Series) -> str | None:
    """Says that a loss is huge, and moves about, whose beginning is not in the log."""
    level = float(np.median(loss.value))
    is_calm = loss.value.max() < 2 * loss.value.min()
    if level < HUGE or is_calm or not run.begins_late or learns(loss):
        return None
    return (
        f"DIVERGED, it seems: the log begins at step {loss.step[0]}, and the loss is"
        f" {short(level)} in it and does not fall.{_norms(run, int(loss.step[0]))}"
        " There is no healthy row to compare with: look at the log of the steps before."
    )
