"""Which steps stand out, and did the loss follow?

Norms far above their neighbours are routine, in healthy runs too: they are told only
where the loss went up with them.
"""

import math
from typing import NamedTuple

import numpy as np

from optaxclip._advice.run import Run, few, rolling_median, short, spread

SURE = 6.0  # robust standard deviations of the logarithm
TIMES = 4.0  # the level of the neighbours
FELT = 4.0  # robust standard deviations of the loss
REACH = 8  # rows before and after, whose levels count
AFTER = 3  # rows in which the loss may follow
CHANCE = 0.02
LONG = 3  # rows in a row, to believe a loss without norms
MUCH = 0.2  # of the loss, likewise


class Spike(NamedTuple):
    """A row whose norm is far above its neighbours'.

    Attributes:
      step: of the row.
      norm: the largest in the row.
      times: the level of its neighbours.
      follows: whether the loss rose in this row or the next two.
    """

    step: int
    norm: float
    times: float
    follows: bool


def found(run: Run) -> list[Spike]:
    """Returns the spikes of the norm."""
    is_seen = ~run.bad & np.isfinite(run.peak) & (run.peak > 0)
    rows = np.flatnonzero(is_seen & ~_before_a_crash(run.bad))
    if len(rows) < 2 * REACH:
        return []
    above, usual = _above(np.log(run.peak[rows]))
    high = rows[above > max(SURE * usual, np.log(TIMES))]
    times = dict(zip(rows, np.exp(above), strict=True))
    risen = _risen(run)
    return [
        Spike(
            step=int(run.step[row]),
            norm=float(run.peak[row]),
            times=float(times[row]),
            follows=bool(risen[row : row + AFTER].any()),
        )
        for row in high
    ]


def spikes(run: Run) -> str | None:
    """Says that norms far above the others took the loss with them."""
    every = found(run)
    felt = [spike for spike in every if spike.follows]
    if not np.isfinite(run.norm).any():
        return _of_the_loss(run)
    if not felt or _by_chance(len(every), len(felt), run) > CHANCE:
        return None
    largest = max(felt, key=lambda spike: spike.times)
    limit = _usual(run, largest.step)
    clip = (
        f" A clip at {short(limit)}, the 90th percentile of the norms before it, would"
        " have cut it;"
    )
    return (
        f"SPIKES at step{'s' * (len(felt) > 1)} {few((x.step for x in felt), 5)}: the"
        f" gradient norm was up to {short(largest.times)} times that of its neighbours"
        f" ({short(largest.norm)} at step {largest.step}), and the loss rose with it."
        f" {_recovered(run, felt[-1].step)}{clip * (limit < largest.norm)}"
        " `skip_if_spike` leaves such steps out."
    )


def _of_the_loss(run: Run) -> str | None:
    """Says that the loss was far above its neighbours for some rows.

    Where there are no norms. One such row may be an average of few batches.
    """
    risen = _risen(run, MUCH) & ~_before_a_crash(run.bad)
    edges = np.flatnonzero(np.diff(risen.astype(int), prepend=0, append=0))
    long = [a for a, b in zip(edges[::2], edges[1::2], strict=True) if b - a >= LONG]
    if not long:
        return None
    highest = max(long, key=_losses(run).__getitem__)
    return (
        f"SPIKES at step{'s' * (len(long) > 1)} {few(run.step[long], 5)}: the loss was"
        f" far above its neighbours, for {LONG} rows or more"
        f" ({short(float(_losses(run)[highest]))} at step {run.step[highest]})."
        f" {_recovered(run, int(run.step[long[-1]]))} Log the gradient norm: if it"
        " rises there too, a clip helps, or `skip_if_spike`."
    )


def _by_chance(count: int, felt: int, run: Run) -> float:
    """Returns how probable it is that the loss rose where it did by accident."""
    others = max(int(_risen(run).sum()) - AFTER * felt, 0)
    expected = count * AFTER * (others + 1) / len(run.step)
    return float(expected**felt / math.factorial(min(felt, 100)))


def _recovered(run: Run, step: int) -> str:
    is_seen = np.isfinite(run.loss) & ~run.bad
    before = run.loss[is_seen & (run.step < step)][-10:]
    after = run.loss[is_seen & (run.step > step)]
    if len(after) < 5:
        return "It is too early to say whether the run recovers."
    margin = SURE * max(spread(before), 1e-3 * abs(np.median(before)))
    back = np.median(after[-10:]) <= np.median(before) + margin
    return "The loss came back." if back else "The loss has not come back."


def _before_a_crash(bad: np.ndarray) -> np.ndarray:
    """Returns the rows that lead to one that is not finite: no spikes by themselves."""
    near = np.convolve(bad, np.ones(2 * REACH + 1), mode="full")[REACH * 2 :]
    return near[: len(bad)] > 0


def _usual(run: Run, step: int) -> float:
    """Returns the 90th percentile of the hundred norms before a step."""
    before = run.norm[np.isfinite(run.norm) & ~run.bad & (run.step < step)]
    return float(np.percentile(before[-100:], 90)) if len(before) else np.inf


def _risen(run: Run, share: float = 1e-3) -> np.ndarray:
    """Returns the rows whose loss is far above that of the rows before and after."""
    loss = _losses(run)
    risen = np.zeros(len(loss), bool)
    rows = np.flatnonzero(np.isfinite(loss) & ~run.bad)
    if len(rows) >= 2 * REACH:
        above, usual = _above(loss[rows])
        risen[rows] = above > max(FELT * usual, share * np.median(np.abs(loss[rows])))
    return risen


def _losses(run: Run) -> np.ndarray:
    """Returns the largest loss of each row's steps, or the one that is known."""
    return run.columns.get("peak/loss", run.loss)


def _above(values: np.ndarray) -> tuple[np.ndarray, float]:
    """Returns how far each value is above its neighbours', and what is usual.

    Above the level of those before and of those after it, whichever is higher: a trend
    is no spike, up or down. The first rows have nothing to compare with.
    """
    level = rolling_median(values, 2 * REACH - 1)
    # At the end nothing comes after that could be the new level.
    after = np.full(len(values) - REACH, -np.inf)
    after[:-REACH] = level[2 * REACH :]
    above = np.full(len(values), -np.inf)
    above[REACH:] = values[REACH:] - np.maximum(level[:-REACH], after)
    beside = values[REACH:] - level[REACH:]
    # What a tenth of the rows does is usual: two kinds of batches are no spikes.
    return above, max(spread(beside), float(np.quantile(np.abs(beside), 0.9)) / 1.645)
