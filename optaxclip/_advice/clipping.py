"""How often does the clip act, and what does that mean?"""

import numpy as np

from optaxclip._advice.run import Run, short

ALL = 0.99  # of the steps
FAR = 3.0  # times the largest norm
ROWS = 10  # at least


def always_clipped(run: Run) -> str | None:
    """Says that the clip acts at every step: no error, but a rate of its own."""
    share = _share(run)
    if share is None or share < ALL:
        return None
    limit, norms = _limits(run), _norms(run)
    if limit is None or not len(norms):
        return (
            f"CLIPPED AT {_percent(share)} of the steps, in every scope. With SGD a"
            " step is as long as learning rate x threshold then: tune the two as one."
        )
    return (
        f"CLIPPED AT {_percent(share)} of the steps: the threshold {short(limit)} is"
        f" below {'all' if share == 1 else 'nearly all'} norms (median"
        f" {short(np.median(norms))}, lowest {short(norms.min())}). With SGD a step is"
        " as long as learning rate x threshold then: tune the two as one, by the loss."
    )


def never_clipped(run: Run) -> str | None:
    """Says that the threshold is far above all norms: a safety net."""
    limit, norms = _limits(run), _norms(run)
    counts = run.columns.get("clipped")
    if limit is None or not len(norms) or counts is None or counts.any():
        return None
    largest = float(np.fmax(norms, run.peak[_rows(run)]).max())
    if not largest > 0 or limit < FAR * largest:
        return None
    return (
        f"NEVER CLIPPED: the threshold is {short(limit)}, the largest norm was"
        f" {short(largest)}: a safety net. One of {short(np.percentile(norms, 99))}"
        " would catch the largest 1 % of the steps."
    )


def _percent(share: float) -> str:
    return f"{np.floor(100 * share):.0f} %"


def _rows(run: Run) -> np.ndarray:
    return np.flatnonzero(~run.bad & np.isfinite(run.norm))


def _norms(run: Run) -> np.ndarray:
    return run.norm[_rows(run)]


def _share(run: Run) -> float | None:
    """Returns at which share of the steps every scope of the clip was cut."""
    factors = [x for k, x in run.columns.items() if _is_of_clip(k, "factor")]
    rows = np.flatnonzero(~run.bad)
    if not factors or len(rows) < ROWS:
        return None
    cut = (np.array(factors)[:, rows] < 1).all(axis=0)
    return float(np.average(cut, weights=run.width[rows]))


def _limits(run: Run) -> float | None:
    """Returns the last threshold of the one clip that has one for all leaves."""
    found = [x for k, x in run.columns.items() if _is_of_clip(k, "max_norm")]
    limits = found[0][np.isfinite(found[0])] if len(found) == 1 else []
    return float(limits[-1]) if len(limits) else None


def _is_of_clip(key: str, what: str) -> bool:
    first, _, rest = key.partition("/")
    return first.startswith("clip") and rest.split("/")[0] == what
