"""Verdicts in plain words on what a run did, worst first."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from optaxclip._advice import (
    clipping,
    courses,
    explosions,
    layers,
    not_finite,
    oscillations,
    spikes,
    traction,
    weights,
)
from optaxclip._advice.run import Run, runs, short
from optaxclip._looking.history import history as _history

Rule = Callable[[Run], str | None]

# Worst first, with the rules of each, of which the first counts that has something to
# say. The last ones are information, and hold for a healthy run too.
BAD: dict[str, list[Rule]] = {
    "not_finite": [not_finite.not_finite, weights.broken],
    "exploded": [explosions.exploded],
    "diverged": [courses.diverged],
    "growing": [courses.growing, weights.large],
    "dead": [layers.dead],
    "vanishing": [layers.vanishing],
    "no_traction": [traction.no_traction],
    "oscillating": [oscillations.oscillating],
    "spikes": [spikes.spikes],
}
INFORMATION: dict[str, list[Rule]] = {
    "overflow_skips": [not_finite.overflow_skips],
    "always_clipped": [clipping.always_clipped],
    "never_clipped": [clipping.never_clipped],
}
# What one verdict says already, so that the other is not told.
SAYS = {"exploded": ["diverged", "growing"], "diverged": ["no_traction", "oscillating"]}
NAMES = (*BAD, *INFORMATION, "too_short", "healthy")
COMPLETE = {"step", "width", "nonfinite"}  # columns of every history
ENOUGH = 10  # finite rows, to call a run healthy


def diagnose(history: Any, params: Any = None) -> dict[str, str]:
    """Returns what a run did, in sentences: what happened, the evidence, what to do.

    Args:
      history: of the run, by :func:`optaxclip.history`, or anything that this takes.
      params: the parameters at the end, or their shapes. With shapes ``vanishing`` can
        be told, with values also weights that are not finite, or huge.

    Returns:
      A dictionary from names to sentences, worst first. The names are

      * ``not_finite``: NaN or infinity that nothing announced;
      * ``exploded``: the norm, or the loss, grew tenfold or more, then NaN;
      * ``diverged``: finite, but the loss is far above its best and stays there;
      * ``growing``: norms of ten times the former, and a loss that gets no better;
      * ``dead``: gradients that are exactly 0;
      * ``vanishing``: gradients of the first layers a thousandth of the last one's;
      * ``no_traction``: a loss that is flat from the start;
      * ``oscillating``: a loss that rose above its start, or jumps from row to row;
      * ``spikes``: norms far above the others' that the loss followed;
      * ``overflow_skips``: single steps that were not finite, in a run that went on;
      * ``always_clipped``, ``never_clipped``: no faults, but worth knowing;
      * ``too_short``: fewer than ten finite rows, and nothing of the above;
      * ``healthy``: none of the faults.

      Of several runs in one history each is judged by itself. A rule compares a run
      with itself and its own noise: there is no norm that is too large. Names are
      those of leaves only where these are certain.

    Raises:
      TypeError, ValueError: as :func:`optaxclip.history`.

    Examples:
      >>> norms = [3.0, 2.0, 2.1, 1.9, 2.0, 2.2, 2.0, 9.0, 80.0, 900.0, float("nan")]
      >>> for name, sentence in optaxclip.diagnose({"norm": norms}).items():
      ...     print(name, "-", sentence[:60])
      exploded - EXPLODED at step 10. The gradient norm grew from 2 to 900 in
    """
    is_history = isinstance(history, Mapping) and history.keys() >= COMPLETE
    seen = dict(history) if is_history else _history(history, params)
    # What overflows is infinite, and compares as such.
    with np.errstate(all="ignore"):
        told = [_told(run) for run in runs(seen, params)]
    found: dict[str, str] = {}
    for name in NAMES:
        texts = {i: x[name] for i, x in enumerate(told, 1) if name in x}
        if len(told) > 1:
            texts = {i: f"Run {i} of {len(told)}: {x}" for i, x in texts.items()}
        if texts and (name != "healthy" or len(texts) == len(told)):
            found[name] = "\n".join(texts.values())
    return found


def _told(run: Run) -> dict[str, str]:
    """Returns the verdicts on one run."""
    if not len(run.step):
        return {"too_short": "TOO SHORT: there are no rows."}
    bad, others = _said(BAD, run), _said(INFORMATION, run)
    for name, implied in SAYS.items():
        if name in bad:
            bad = {k: text for k, text in bad.items() if k not in implied}
    if bad:
        return bad | others
    finite = int(np.sum(~run.bad & (np.isfinite(run.loss) | np.isfinite(run.norm))))
    if finite < ENOUGH:
        return others | {"too_short": _too_short(run, finite)}
    return others | {"healthy": _healthy(run)}


def _said(rules: dict[str, list[Rule]], run: Run) -> dict[str, str]:
    said = {k: [text for rule in v if (text := rule(run))] for k, v in rules.items()}
    return {name: texts[0] for name, texts in said.items() if texts}


def _too_short(run: Run, finite: int) -> str:
    late = f" that begin at step {run.step[0]}" if finite and run.begins_late else ""
    return (
        f"TOO SHORT: {finite} finite row{'s' * (finite != 1)}{late}, and nothing stands"
        f" out. {ENOUGH} are needed to tell a level from its noise."
    )


def _healthy(run: Run) -> str:
    norms = run.norm[np.isfinite(run.norm) & ~run.bad]
    losses = run.loss[np.isfinite(run.loss) & ~run.bad]
    text = f"HEALTHY: {run.steps} steps"
    text += ", all finite." if not run.bad.any() else "."
    if len(losses) > 2:
        first, last = short(losses[0]), short(np.median(losses[-3:]))
        text += f" Loss: {first} at first, {last} at the end."
    if len(norms):
        high = short(np.percentile(norms, 90))
        largest = max(*norms, *run.peak[~run.bad & np.isfinite(run.peak)])
        text += (
            f" Gradient norms: median {short(np.median(norms))}, 90 % below {high},"
            f" largest {short(largest)}."
        )
    if alone := [x for x in spikes.found(run) if not x.follows]:
        text += (
            f" {len(alone)} stood out from their neighbours, at most"
            f" {short(max(x.times for x in alone))} times; the loss did not follow."
        )
    return text
