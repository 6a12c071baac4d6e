"""Verdicts in plain words on what a run did, worst first."""

from collections.abc import Callable
from typing import Any

import numpy as np

from optaxclip._advice import (
    clipping,
    courses,
    explosions,
    layers,
    not_finite,
    oscillations,
    run as _run,
    spikes,
)
from optaxclip._advice.run import Run, short
from optaxclip._looking.columns import History
from optaxclip._looking.history import history as _history

Rule = Callable[[Run], str | None]

# Worst first. The last ones are information, and hold for a healthy run too.
BAD: dict[str, Rule] = {
    "not_finite": not_finite.not_finite,
    "exploded": explosions.exploded,
    "diverged": courses.diverged,
    "growing": courses.growing,
    "dead": layers.dead,
    "vanishing": lambda _: None,  # needs the params
    "no_traction": courses.no_traction,
    "oscillating": oscillations.oscillating,
    "spikes": spikes.spikes,
}
INFORMATION: dict[str, Rule] = {
    "overflow_skips": not_finite.overflow_skips,
    "always_clipped": clipping.always_clipped,
    "never_clipped": clipping.never_clipped,
}
NAMES = (*BAD, *INFORMATION, "too_short", "healthy")
ENOUGH = 10  # finite rows, to call a run healthy


def diagnose(history: History, params: Any = None) -> dict[str, str]:
    """Returns what a run did, in sentences: what happened, the evidence, what to do.

    Args:
      history: of the run, by :func:`optaxclip.history`, or anything that this takes.
      params: the parameters at the end, or their shapes. With shapes ``vanishing`` can
        be told, with values also weights that are not finite, or huge.

    Returns:
      A dictionary from names to sentences, worst first:

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
    if not {"step", "width", "nonfinite"} <= {*history}:
        history = _history(history, params)
    every = _run.runs(history)
    told = [_told(one, params if one is every[-1] else None) for one in every]
    found: dict[str, str] = {}
    for name in NAMES:
        texts = [(i, x[name]) for i, x in enumerate(told, 1) if name in x]
        if len(told) > 1 and texts:
            texts = [(i, f"Run {i} of {len(told)}: {text}") for i, text in texts]
        if name != "healthy" or len(texts) == len(told):
            found |= {name: "\n".join(text for _, text in texts)} if texts else {}
    return found


def _told(run: Run, params: Any) -> dict[str, str]:
    """Returns the verdicts on one run."""
    bad = {name: text for name, rule in BAD.items() if (text := rule(run))}
    if text := layers.vanishing(run, params):
        bad["vanishing"] = text
    if params is not None:
        for name, text in layers.weights(params).items():
            bad.setdefault(name, text)
    if "exploded" in bad:
        bad.pop("growing", None)
    others = {name: text for name, rule in INFORMATION.items() if (text := rule(run))}
    if bad:
        return bad | others
    finite = int(np.sum(~run.bad & (np.isfinite(run.loss) | np.isfinite(run.norm))))
    if finite < ENOUGH:
        return others | {"too_short": _too_short(run, finite)}
    return others | {"healthy": _healthy(run)}


def _too_short(run: Run, finite: int) -> str:
    late = f" that begin at step {run.step[0]}" if run.begins_late else ""
    return (
        f"TOO SHORT: {finite} finite rows{late}, and nothing stands out in them."
        f" {ENOUGH} are needed to tell a level from its noise."
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
        text += (
            f" Norms: median {short(np.median(norms))}, 90 % below {high}, largest"
            f" {short(np.nanmax(run.peak[~run.bad]))}."
        )
    if alone := [x for x in spikes.found(run) if not x.follows]:
        text += (
            f" {len(alone)} stood out from their neighbours, at most"
            f" {short(max(x.times for x in alone))} times; the loss did not follow."
        )
    return text
