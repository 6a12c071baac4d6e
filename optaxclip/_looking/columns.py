"""How do the rows of any log become a history?

Trainers write what they like: under names of their own, with evaluations between, from
several runs into one file, and once more after a resume.
"""

import collections
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from optaxclip._looking import runs as _runs
from optaxclip._looking.logs import Row

History = dict[str, np.ndarray]

_WHOLE = ("step", "width", "run", "clipped", "skipped", "nonfinite")
_FIRST = ("step", "width", "run", "loss", "norm", "learning_rate", *_WHOLE[3:])
_OURS = re.compile(r"(clip|guard)(_\d+)?/")

# Words in a name that say nothing of what it is; an evaluation's is another thing.
_NOISE = {"train", "training", "trainer", "learning", "optim", "total", "mean", "avg"}
_NOISE |= {"metrics", "current", "average", "running", "batch", "global", "raw"}
_ELSEWHERE = {"eval", "val", "valid", "validation", "test", "dev", "param", "params"}
_MEANINGS = {
    "step": "step|steps|iteration|iterations|iter|update|updates|num updates",
    "loss": "loss|lm loss|nll|nll loss|ce loss|cross entropy|cost|objective",
    "norm": "grad norm|gradient norm|gnorm|grdn|norm|gradnorm|l2 norm grad"
    "|grads norm|clip norm|grad norm preclip|gradients norm|grad 2 0 norm",
    "learning_rate": "lr|rate|lr adam|lr sgd|lr adamw|lr group 0",
}
_SCOPES = re.compile(
    r"(?:.*/)?(?:grad_norm|grad/norm|l2_norm/grad|grad_2\.0_norm|gradients/norm)/(.+)"
)


def meaning(name: str) -> str:
    """Returns what a column of a log is called here: its own name, where none fits."""
    if name.split("/")[0] in ("norm", "peak") or _OURS.match(name):
        return name
    found = _SCOPES.fullmatch(name)
    if found and found[1] not in ("global", "total"):
        return f"norm/{found[1]}"
    words = [x for x in re.split(r"[^a-z0-9]+", name.lower()) if x]
    if _ELSEWHERE & {*words}:
        return name
    short = " ".join(x for x in words if x not in _NOISE)
    for column, names in _MEANINGS.items():
        if short in names.split("|"):
            return column
    return name


def of_rows(rows: Sequence[Row]) -> History:
    """Returns the history that the rows of a log tell; what is missing is NaN.

    Rows without a loss or a norm, of evaluations, are left out.
    """
    names = _chosen([name for row in rows for name in row])
    every = [{names[k]: v for k, v in row.items() if k in names} for row in rows]
    found = [row for row in every if any(map(_runs.is_of_training, row))]
    if not found:
        names = ", ".join(sorted({name for row in rows for name in row}))
        raise ValueError(
            "Expected a column with the loss or with the gradient norm, such as"
            f" `step,loss,grad_norm`, got {names}."
        )
    if any("step" not in row for row in found):
        found = [row | {"step": i} for i, row in enumerate(found)]
    every = [_runs.merged(run) for run in _runs.divided(found)]
    rows = [row | {"run": i} for i, run in enumerate(every) for row in run]
    keys = dict.fromkeys(name for row in rows for name in row)
    columns = {key: np.array([x.get(key, np.nan) for x in rows], float) for key in keys}
    is_bad = [not np.isfinite([*_runs.of_training(row).values()]).all() for row in rows]
    columns.setdefault("nonfinite", np.array(is_bad, float))
    return completed(columns)


def of_columns(seen: Mapping[str, Any]) -> History:
    """Returns the history of columns, or of one row, where nothing is missing."""
    arrays = {key: np.atleast_1d(np.asarray(value)) for key, value in seen.items()}
    shapes = {key: x.shape for key, x in arrays.items() if x.dtype.kind in "biuf"}
    if len({*shapes.values()}) != 1 or len(next(iter(shapes.values()))) != 1:
        raise ValueError(
            "Expected columns of one length, one number for each step, got shapes"
            f" {shapes}. Of a batch of runs take one: `jax.tree.map(lambda x: x[0],"
            " seen)`."
        )
    names = _chosen(list(shapes))
    columns = {names[key]: arrays[key].astype(float) for key in shapes if key in names}
    return completed(columns)


def completed(columns: History) -> History:
    """Returns a history with what follows from its columns, in order.

    What a clip saw at a step that was skipped is of the step before.
    """
    history = _with_norms(columns)
    seen = np.array([x for key, x in history.items() if _runs.is_of_training(key)])
    if not seen.size:
        raise ValueError(
            "Expected the loss or a norm among the columns, got"
            f" {', '.join(sorted(columns))}."
        )
    counts: History = {"nonfinite": ~np.isfinite(seen).all(axis=0)}
    steps = _of_clips(history, "/update_count")[:1]
    skips = _of_clips(history, "/skipped_count")
    skipped = np.diff(np.sum(skips, axis=0), prepend=0.0) if skips else np.zeros(1)
    if skips:
        counts["skipped"] = skipped
    if factors := _of_clips(history, "/factor"):
        counts["clipped"] = (np.array(factors) < 1).any(axis=0) & (skipped == 0)
    if steps:
        counts["step"] = steps[0] - 1 + np.cumsum(skipped)
    history = {"step": np.arange(seen.shape[1])} | counts | history
    history = {key: _whole(key, column) for key, column in history.items()}
    history.setdefault("width", _widths(history["step"], history.get("run")))
    if "run" in history and not history["run"].any():
        del history["run"]
    return _ordered(history)


def _of_clips(history: History, what: str) -> list[np.ndarray]:
    return [x for key, x in history.items() if _OURS.match(key) and what in key]


def _with_norms(columns: History) -> History:
    """Returns the columns and the norms that the first clip saw, where there are none.

    Of norms of scopes alone, the total is the root of the sum of their squares.
    """
    history = dict(columns)
    for key, column in columns.items():
        if found := re.fullmatch(r"(?:clip|clip_0)/norm(/.+)?", key):
            history.setdefault(f"norm{found[1] or ''}", column)
    norms = [x for key, x in history.items() if key.startswith("norm/")]
    if norms and "norm" not in history:
        largest = np.max(norms, axis=0)  # whose square may overflow
        scale = np.where(np.isfinite(largest) & (largest > 0), largest, 1)
        history["norm"] = scale * np.sqrt(np.sum((norms / scale) ** 2, axis=0))
    return history


def _chosen(names: Sequence[str]) -> dict[str, str]:
    """Returns which names count, and what they are called here.

    Of those with one meaning it is our own, else the most frequent one, else the one
    that says it is raw, else the shortest.
    """
    counts = collections.Counter(names)

    def rank(name: str) -> Any:
        return name != meaning(name), -counts[name], "raw" not in name, len(name)

    best: dict[str, str] = {}
    for name in sorted(counts, key=rank):
        best.setdefault(meaning(name), name)
    return {name: column for column, name in best.items()}


def _widths(steps: np.ndarray, runs: np.ndarray | None) -> np.ndarray:
    """Returns the steps since the row before; of a first row as many as usual."""
    widths = np.diff(steps, prepend=steps[:1])
    first = np.zeros(len(steps), bool) if runs is None else np.diff(runs, prepend=0) > 0
    first[:1] = True
    usual = np.median(widths[~first]) if (~first).any() else 1
    widths[first] = np.minimum(steps[first] + 1, usual)
    return np.maximum(np.round(widths), 1).astype(np.int64)


def _whole(name: str, column: np.ndarray) -> np.ndarray:
    if name not in _WHOLE or not np.isfinite(column).all():
        return column.astype(float)
    return np.round(column).astype(np.int64)


def _ordered(history: History) -> History:
    """Returns the columns that all have first; in other names, numbers are numbers.

    So `Dense_2` comes before `Dense_10`, which is the order of the forward pass as far
    as names tell.
    """

    def place(name: str) -> Any:
        parts = [x for x in re.split(r"(\d+)", name) if x]
        digits = [(int(x), "") if x.isdecimal() else (-1, x) for x in parts]
        return (_FIRST.index(name), []) if name in _FIRST else (len(_FIRST), digits)

    return {name: history[name] for name in sorted(history, key=place)}
