"""Where does a finite run go: does it learn, turn back, or run away?

Levels say nothing, for they scale with the loss and the batch, and single norms far
above the others are routine. So these rules compare a run with itself, and what is not
beyond its own noise is not said.
"""

import numpy as np

from optaxclip._advice.run import (
    Run,
    Series,
    evened,
    noise,
    rolling_median,
    series,
    short,
    wander,
)

ENOUGH = 8  # rows, for a level and its noise
SURE = 6.0  # standard deviations
TENFOLD = 10.0
FLAT = 0.08  # of the loss
HUGE = 1e6  # of a loss whose beginning nobody saw

GROWS = " Such growth ends in an explosion: clip, or lower the learning rate."
ENDLESS = (
    " The loss has no lower end, and the steps follow it down: bound the loss, or clip."
)


def diverged(run: Run) -> str | None:
    """Says that the loss ends far above its best, and stays there."""
    run = evened(run)
    loss = series(run, run.loss)
    if len(loss.value) < ENOUGH:
        return None
    window = max(3, len(loss.value) // 20)
    level = rolling_median(loss.value, window)
    best, end = int(np.argmin(level)), float(np.median(loss.value[-window:]))
    start, low = float(np.median(loss.value[:3])), float(level[best])
    sure = SURE * max(wander(loss.value), noise(loss.value[-4 * window :]))
    is_far = end - low > max(sure, 0.25 * (start - low), 0.15 * abs(low))
    stays = level[-window:].min() > (low + end) / 2 and best < len(level) - window
    if not (is_far and stays and _norms_agree(run, loss, best)):
        return _as_if_diverged(run, loss)
    return (
        f"DIVERGED: the loss was {short(low)} near step {loss.step[best]} and is"
        f" {short(end)} at the end, step {loss.step[-1]}; it began at {short(start)}."
        f"{_norms(run, int(loss.step[best]))} The steps are too large: go back to a"
        f" checkpoint from before step {loss.step[best]}, with a lower learning rate or"
        " a lower threshold."
    )


def growing(run: Run) -> str | None:
    """Says that the norms grew tenfold while the loss got no better."""
    run = evened(run)
    norm, loss = series(run, run.norm), series(run, run.loss)
    if len(norm.value) < ENOUGH:
        return _speeding_up(norm)
    few = max(3, len(norm.value) // 10)
    from_first = len(norm.value) < 2 * ENOUGH or _falls_without_end(loss)
    early = slice(0, 3) if from_first else _second_quarter(norm)
    low, high = np.median(norm.value[early]), float(np.median(norm.value[-few:]))
    sure = np.exp(3 * noise(np.log(norm.value[norm.value > 0])))
    endless = _falls_without_end(loss)
    if not 0 < low < high / max(TENFOLD, sure):
        return _speeding_up(norm)
    if not endless and not _no_better(norm, loss, early):
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


def no_traction(run: Run) -> str | None:
    """Says that the loss is flat from the start, as surely as its noise allows."""
    run = evened(run)
    loss = series(run, run.loss)
    value = loss.value
    if len(value) < 12 or run.begins_late or value.min() <= 0 or learns(loss):
        return None
    level, change, error = trend(value)
    most = (max(-change, 0) + 2 * error) / level
    if most > FLAT or change > 3 * error:
        return None
    norms = run.norm[np.isfinite(run.norm)]
    usual = float(np.median(norms)) if len(norms) else 0.0
    moved = f" There are gradients: their norm is {short(usual)}." if usual else ""
    return (
        f"NO TRACTION: the loss is {short(level)} from step {loss.step[0]} to"
        f" {loss.step[-1]}; if it fell, then by less than {100 * most:.0f} %, within"
        f" its noise.{moved} Look at the learning rate (too low, or the threshold cuts"
        " the steps too short), at what is frozen, and at the targets."
    )


def learns(loss: Series) -> bool:
    """Whether the loss falls, be it in the first rows alone."""
    value = loss.value
    if len(value) < 3:
        return False
    spread = noise(value[1:])
    if value[0] - np.median(value[1:]) > 4 * spread:
        return True
    _, change, error = trend(value)
    return bool(change < -3 * error)


def trend(value: np.ndarray) -> tuple[float, float, float]:
    """Returns the level, the change over all rows by a fitted line, and its error."""
    time = np.linspace(-0.5, 0.5, len(value))
    slope = float(np.sum(time * (value - value.mean())) / np.sum(time**2))
    rest = value - value.mean() - slope * time
    error = float(np.sqrt(np.mean(rest**2) / np.sum(time**2)))
    return float(abs(np.median(value))), slope, error


def _second_quarter(norm: Series) -> slice:
    return slice(len(norm.value) // 4, len(norm.value) // 2)


def _no_better(norm: Series, loss: Series, early: slice) -> bool:
    """Whether the loss at the end is no lower than when the norms were low."""
    if len(loss.value) < 3:
        return True
    steps = norm.step[early]
    then = loss.value[(loss.step >= steps[0]) & (loss.step <= steps[-1])]
    then = then if len(then) else loss.value[:3]
    return bool(np.median(loss.value[-3:]) > np.median(then) - noise(loss.value))


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


def _norms_agree(run: Run, loss: Series, best: int) -> bool:
    """Whether the norms rose too, without which not every loss can be believed.

    Objectives of both signs, or that begin near zero by construction, may rise.
    """
    end = np.median(loss.value[-3:])
    if loss.value.min() > 0 and np.median(loss.value[:3]) > 0.1 * end:
        return True
    norm = series(run, run.norm)
    near = norm.value[norm.step <= loss.step[best]][-10:]
    return len(near) > 0 and bool(np.median(norm.value[-10:]) > 3 * np.median(near))


def _norms(run: Run, step: int) -> str:
    norm = series(run, run.norm)
    before, after = norm.value[norm.step <= step], norm.value[norm.step > step]
    if not len(before) or not len(after):
        return ""
    then, high = short(np.median(before[-10:])), short(after.max())
    return f" The gradient norm was {then} then, and {high} at its highest since."


def _as_if_diverged(run: Run, loss: Series) -> str | None:
    """Says that a loss is huge whose beginning is not in the log."""
    level = float(np.median(loss.value))
    if level < HUGE or not run.begins_late or learns(loss):
        return None
    return (
        f"DIVERGED, it seems: the log begins at step {loss.step[0]}, and the loss is"
        f" {short(level)} in it and does not fall.{_norms(run, int(loss.step[0]))}"
        " There is no healthy row to compare with: look at the log of the steps before."
    )
