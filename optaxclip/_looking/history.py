"""One form for what a run did, whatever it was seen by."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from optaxclip._looking import columns, logs, record
from optaxclip._trees import paths as _paths


def history(seen: Any, params: Any = None) -> columns.History:
    """Returns what a run did as columns, one number for each row, oldest first.

    Args:
      seen: one of

        * the state of an optimizer with :func:`optaxclip.record` in it, or anything
          that holds one; of a batch of them, by ``vmap``, take one;
        * a mapping from names to arrays of one number for each step: a
          :func:`optaxclip.summary` that ``scan`` has stacked, with the loss if you have
          it, ``{"loss": losses, **summaries}``; or a history;
        * a list of mappings from names to numbers, one for each step logged:
          ``[{"loss": loss, **optaxclip.summary(opt_state)}, ...]``;
        * the path of a log, of any framework: ``.csv``, ``.jsonl``, ``.npz`` (made by
          ``np.savez(path, **history)``), the ``trainer_state.json`` of Hugging Face, or
          a folder of TensorBoard's, if the package ``tensorboard`` is installed.

      params: the parameters, to name the scopes of a record by; shapes will do. Without
        them scopes are numbered.

    Returns:
      A dictionary of arrays, each of shape ``[rows]``:

      * ``step``, int64, and ``width``, how many steps the row stands for;
      * ``loss``, ``norm`` (before the clip), ``learning_rate``, float64, where there
        are any; NaN where a row has none;
      * ``norm/<path>``: of the scopes; ``clip/...``: what :func:`optaxclip.summary`
        shows;
      * ``nonfinite``, ``clipped``, ``skipped``: at how many of the row's steps the loss
        or a norm was NaN or infinite, a factor was below 1, a guard skipped the step;
      * ``run``, where a file holds several runs: their number.

      Of a log, rows of evaluations are left out, steps that a resumed run did once more
      replace what was there, and columns are renamed: ``grad_norm`` is ``norm``,
      ``lr`` is ``learning_rate``, ``train/loss`` is ``loss``.

    Raises:
      TypeError: there is no history in what was passed.
      ValueError: the file is none, or has neither a loss nor a norm; columns differ in
        length, or have further axes.

    Examples:
      >>> losses, norms = [2.3, 2.1, float("nan")], [1.5, 40.0, float("nan")]
      >>> history = optaxclip.history({"loss": losses, "grad_norm": norms})
      >>> list(history)
      ['step', 'width', 'loss', 'norm', 'nonfinite']
      >>> history["nonfinite"]
      array([0, 0, 1])
    """
    if isinstance(seen, str | os.PathLike):
        return columns.of_rows(logs.rows(Path(seen)))
    if records := _records(seen):
        return columns.completed(record.rows(_only(records), _names(params)))
    if isinstance(seen, Mapping):
        return columns.of_columns(jax.device_get(dict(seen)))
    if _is_rows(seen):
        rows = jax.device_get([dict(row) for row in seen])
        return columns.of_rows([dict(logs.numbers(row)) for row in rows])
    raise TypeError(
        "Expected the state of an optimizer with `optaxclip.record` in it, stacked"
        " summaries, a list of them, or the path of a log; got"
        f" {type(seen).__name__}."
    )


def _records(seen: Any) -> list[tuple[Any, record.RecordState]]:
    """Returns every record in a state, with the path to it."""
    found = jax.tree_util.tree_leaves_with_path(
        seen, is_leaf=lambda x: isinstance(x, record.RecordState)
    )
    return [(path, x) for path, x in found if isinstance(x, record.RecordState)]


def _only(records: list[tuple[Any, record.RecordState]]) -> record.RecordState:
    if len(records) > 1:
        places = ", ".join(f"state{jax.tree_util.keystr(path)}" for path, _ in records)
        raise ValueError(
            f"Expected a state with one record, found {len(records)}, at {places}. Pass"
            " one of them."
        )
    return records[0][1]


def _names(params: Any) -> list[str]:
    return [] if params is None else _paths.paths(params)


def _is_rows(seen: Any) -> bool:
    is_list = isinstance(seen, Sequence) and len(seen) > 0
    return is_list and all(isinstance(row, Mapping) for row in seen)
