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
    who,
)
from optaxclip._advice.explosions import growth
from optaxclip._advice.run import Run, short

HALF = 65504.0  # the largest float16
FEW = 8  # rows before, to say that nothing grew

FIRST = (
    " No length of step can be the cause: look at the first batch, at the initial"
    " weights, and at the dtype; float16 holds 65504 at most."
)
LATE = " What came before is not in the log."
AT_ONCE = " Nothing grew before, so it is no explosion, and a clip can't repair it."
TOO_FEW = " The rows before are too few to say whether the steps were too large."


def not_finite(run: Run) -> str | None:
    """Says that a step was not finite and that nothing announced it."""
    for crash in crashes(run):
        passes = is_overflow(run, crash) or is_average(run, crash)
        if not passes and not growth(run, crash):
            return _from_the_first(run, crash) or _in_the_middle(run, crash)
    return _zero_for_nan(run)


def overflow_skips(run: Run) -> str | None:
    """Says that single steps were not finite while the run went on."""
    found = [crash for crash in crashes(run) if is_overflow(run, crash)]
    averages = [crash for crash in crashes(run) if is_average(run, crash)]
    if averages:
        return (
            f"NOT FINITE NORMS from step {run.step[averages[0].first]} on, while the"
            " loss goes on to fall: an average with one infinite step in it looks so."
            " Log the norm of each step."
        )
    if not found:
        return None
    rows = sum(crash.end - crash.first for crash in found)
    steps = _listed([int(run.step[crash.first]) for crash in found])
    by = "a guard skipped" if run.skipped[found[0].first] else "apparently skipped"
    return (
        f"NOT FINITE AND SKIPPED: {rows} of {len(run.bad)} rows (step {steps}), {by};"
        " the run went on. With float16 that is loss scaling at work, and needs nothing"
        " as long as it is rare. Otherwise look at what is in these batches."
    )


def _from_the_first(run: Run, crash: Crash) -> str | None:
    if crash.first > 0:
        return None
    return (
        f"NOT FINITE from the first row on, step {run.step[0]}{who(run, crash)}."
        + (LATE if run.step[0] > run.width[0] else FIRST)
        + _as_if_nothing(run, crash)
    )


def _in_the_middle(run: Run, crash: Crash) -> str:
    before = run.norm[: crash.first][np.isfinite(run.norm[: crash.first])]
    norm = f"; the norm before was {short(before[-1])}" if len(before) else ""
    if len(before) and HALF / 10 < before[-1] < 10 * HALF:
        norm += f", {short(before[-1] / HALF)} times what float16 can hold"
    usual = f" (median {short(np.median(before))})" if len(before) > 1 else ""
    after = "" if crash.is_last else f" It went on after {_steps(run, crash)} steps."
    return (
        f"NOT FINITE at step {run.step[crash.first]}{who(run, crash)}{norm}{usual}."
        f"{AT_ONCE if len(before) >= FEW else TOO_FEW} Look at this batch, at"
        " logarithms, divisions and roots, and at the dtype: in float16 scale the loss,"
        " or use bfloat16. `skip_if_nonfinite(optimizer)` keeps such a step out of the"
        f" weights.{after}{_as_if_nothing(run, crash)}"
    )


def _as_if_nothing(run: Run, crash: Crash) -> str:
    """Says what a sound loss beside norms that are not finite means."""
    losses = run.loss[crash.first : crash.end]
    if crash.end - crash.first <= SINGLE or not np.isfinite(losses).all():
        return ""
    if not losses.any():
        return " A loss of exactly 0 beside it is a NaN that was not printed."
    return " The loss stays finite all the same: apparently no step is taken any more."


def _zero_for_nan(run: Run) -> str | None:
    """Says that a loss fell to exactly 0 at once, and no norm tells why."""
    rows = np.flatnonzero(np.isfinite(run.loss))
    alive = rows[run.loss[rows] != 0]
    if len(alive) < 3 or alive[-1] == rows[-1]:
        return None
    after = rows[rows > alive[-1]]
    is_sudden = run.loss[alive[-1]] > 0.1 * np.median(np.abs(run.loss[alive]))
    if not is_sudden or np.isfinite(run.norm[after]).any():
        return None
    last = short(float(run.loss[alive[-1]]))
    return (
        f"NOT FINITE, it seems, at step {run.step[after[0]]}: the loss was {last} and"
        " is exactly 0 from there on. Some trainers print a NaN so. Log the gradient"
        " norm to be sure."
    )


def _steps(run: Run, crash: Crash) -> int:
    return int(run.width[crash.first : crash.end].sum())


def _listed(steps: list[int]) -> str:
    text = ", ".join(map(str, steps[:5]))
    return f"{text} and {len(steps) - 5} more" if len(steps) > 5 else text
