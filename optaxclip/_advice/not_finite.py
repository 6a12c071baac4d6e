"""Was a step not finite though nothing announced it?

Then the batch, the loss or the dtype is the cause, and no clip repairs it.
"""

import numpy as np

from optaxclip._advice.crashes import (
    SINGLE,
    Crash,
    crashes,
    is_average,
    is_overflow,
    printed_as_zero,
    who,
)
from optaxclip._advice.explosions import growth
from optaxclip._advice.run import Run, few, short

HALF = 65504.0  # the largest float16
ENOUGH = 8  # rows before, to say that nothing grew
CLOSE = 2  # steps from row to row, between which no explosion is hidden
RARE = 0.05  # of the rows

SKIP = " `skip_if_nonfinite(optimizer)` keeps such a step out of the weights."
FIRST = (
    " If that is the very first step, no length of steps can be the cause: look at the"
    " first batch, at the initial weights, and at the dtype; float16 holds 65504 at"
    " most."
)
LATE = " What came before is not in the log."
AT_ONCE = " Nothing grew before, so it is no explosion, and a clip can't repair it."
TOO_FEW = " The rows before are too few to say whether the steps were too large."
BETWEEN = (
    " Nothing grew in the rows before; but an explosion takes a few steps, and would"
    " not show between these rows: log every step there."
)
NO_NORMS = (
    " Log the gradient norm: without it an explosion can't be told from a bad batch."
)


def not_finite(run: Run) -> str | None:
    """Says that a step was not finite and that nothing announced it."""
    for crash in crashes(run):
        passes = is_overflow(run, crash) or is_average(run, crash)
        if not passes and not growth(run, crash):
            return _from_the_first(run, crash) or _in_the_middle(run, crash)
    return _zero_for_nan(run)


def overflow_skips(run: Run) -> str | None:
    """Says that single steps were not finite while the run went on."""
    every = crashes(run)
    averages = [x for x in every if is_average(run, x) and not is_overflow(run, x)]
    if averages:
        return (
            f"NOT FINITE NORMS from step {run.step[averages[0].first]} on, while the"
            " loss goes on to fall: an average with one infinite step in it looks so."
            " Log the norm of each step."
        )
    found = [crash for crash in every if is_overflow(run, crash)]
    if not found:
        return None
    rows = np.concatenate([np.arange(x.first, x.end) for x in found])
    by = "a guard skipped" if run.skipped[rows].all() else "apparently skipped"
    often = len(rows) > RARE * len(run.bad) and rows[-1] >= len(run.bad) / 2
    return (
        f"NOT FINITE AND SKIPPED: {len(rows)} of {len(run.bad)} rows"
        f" (step{'s' * (len(rows) > 1)} {few(run.step[rows], 5)}), {by}; the run went"
        " on. With float16 that is loss scaling at work, and needs nothing as long as"
        f" it is rare{', which it is not here' if often else ''}. Otherwise look at"
        " what is in these batches."
    )


def _from_the_first(run: Run, crash: Crash) -> str | None:
    if crash.first > 0:
        return None
    return (
        f"NOT FINITE from the first row on, step {run.step[0]}{who(run, crash)}."
        + (LATE if run.step[0] > 1 else FIRST)
        + _as_if_nothing(run, crash)
    )


def _in_the_middle(run: Run, crash: Crash) -> str:
    before = run.norm[: crash.first][np.isfinite(run.norm[: crash.first])]
    norm = f"; the norm before was {short(before[-1])}" if len(before) else ""
    usual = f" (median {short(np.median(before))})" if len(before) > 1 else ""
    if len(before) and HALF / 10 < before[-1] < 10 * HALF:
        usual += f", {short(before[-1] / HALF)} times what float16 can hold"
    skip = "" if run.skipped[crash.first : crash.end].all() else SKIP
    after = "" if crash.is_last else f" It lasted {_steps(run, crash)} steps."
    return (
        f"NOT FINITE at step {run.step[crash.first]}{who(run, crash)}{norm}{usual}."
        f"{_grew(run, crash, len(before))} Look at this batch, at logarithms, divisions"
        " and roots, and at the dtype: in float16 scale the loss, or use bfloat16."
        f"{skip}{after}{_as_if_nothing(run, crash)}"
    )


def _grew(run: Run, crash: Crash, norms: int) -> str:
    """Says what is known of the steps before."""
    if not norms:
        return NO_NORMS
    if norms < ENOUGH:
        return TOO_FEW
    return AT_ONCE if run.width[crash.first - 1] <= CLOSE else BETWEEN


def _as_if_nothing(run: Run, crash: Crash) -> str:
    """Says what a sound loss beside norms that are not finite means."""
    losses = run.loss[crash.first : crash.end]
    if run.skipped[crash.first : crash.end].all():
        return (
            " A guard skips every step since: the weights are sound, and nothing is"
            " trained any more."
        )
    if crash.end - crash.first <= SINGLE or not np.isfinite(losses).all():
        return ""
    if not losses.any():
        return " A loss of exactly 0 beside it is a NaN that was not printed."
    return " The loss stays finite all the same: apparently no step is taken any more."


def _zero_for_nan(run: Run) -> str | None:
    """Says that a loss fell to exactly 0 at once, and no norm tells why."""
    row = printed_as_zero(run)
    if row is None:
        return None
    losses = run.loss[:row][np.isfinite(run.loss[:row]) & (run.loss[:row] != 0)]
    return (
        f"NOT FINITE, it seems, at step {run.step[row]}: the loss was"
        f" {short(losses[-1])} and is exactly 0 from there on. Some trainers print a"
        " NaN so. Log the gradient norm to be sure."
    )


def _steps(run: Run, crash: Crash) -> int:
    return int(run.width[crash.first : crash.end].sum())
