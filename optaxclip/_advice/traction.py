"""Does the loss move at all?"""

import numpy as np

from optaxclip._advice.run import Run, Series, coarse, evened, noise, series, short

ROWS = 12  # at least
FLAT = 0.08  # of the loss
LEAST = 1e-3  # of the loss, that is more than rounding
AT_FIRST = 0.12  # of the loss, that it may have lost in its first rows


def no_traction(run: Run) -> str | None:
    """Says that the loss is flat from the start, as surely as its noise allows."""
    run = evened(run)
    loss = series(run, run.loss)
    if len(loss.value) < ROWS or run.begins_late or loss.value.min() <= 0:
        return None
    value = coarse(loss).value
    level, change, error = trend(np.clip(value, *np.quantile(value, [0.02, 0.98])))
    most = (max(-change, 0) + 2 * error) / level
    early = np.median(loss.value[:3]) + 2 * noise(loss.value) / np.sqrt(3)
    is_flat = (
        most < FLAT
        and change <= 3 * error + LEAST * level
        and early < (1 + AT_FIRST) * level
    )
    if learns(loss) or not is_flat:
        return None
    norms = run.norm[np.isfinite(run.norm)]
    usual = float(np.median(norms)) if len(norms) else 0.0
    moved = f" There are gradients: their norm is {short(usual)}." if usual else ""
    return (
        f"NO TRACTION: the loss is {short(level)} from step {loss.step[0]} to"
        f" {loss.step[-1]}; if it fell, then by less than {np.ceil(100 * most):.0f} %,"
        f" within its noise.{moved} Look at the learning rate (too low, or the"
        " threshold cuts the steps too short), at what is frozen, and at the targets."
    )


def learns(loss: Series) -> bool:
    """Whether the loss falls, be it in the first rows alone.

    One that jumps up in a few early rows, and comes back, has a falling trend as well.
    """
    value = loss.value
    if len(value) < 3:
        return False
    level, change, error = trend(coarse(loss).value)
    few = max(3, len(value) // 10)
    drop = value[0] - np.median(value[1:])
    fall = np.median(value[:few]) - np.median(value[-few:])
    at_once = drop > 4 * noise(value[1:]) + LEAST * level
    return bool(at_once or min(fall, -change - 3 * error) > LEAST * level)


def trend(value: np.ndarray) -> tuple[float, float, float]:
    """Returns the level, the change over all rows by a fitted line, and its error."""
    time = np.linspace(-0.5, 0.5, len(value))
    slope = float(np.sum(time * (value - value.mean())) / np.sum(time**2))
    rest = value - value.mean() - slope * time
    error = float(np.sqrt(np.mean(rest**2) / np.sum(time**2)))
    return float(abs(np.median(value))), slope, error
