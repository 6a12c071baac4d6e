"""One form for what a run did, whatever it was seen by."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from optaxclip._looking import (
    cells as _cells,
    columns as _columns,
    logs as _logs,
    meanings as _meanings,
    record,
)
from optaxclip._looking.by_name import Summary
from optaxclip._trees import paths as _paths


def history(seen: Any, params: Any = None) -> _columns.History:
    """Returns what a run did as columns, one number for each row, oldest first.

    Args:
      seen: one of

        * the state of an optimizer with :func:`optaxclip.record` in it, or anything
          that holds one; of a batch of them, by ``vmap``, take one;
        * a mapping from names to arrays of one number for each step, where nothing is
          missing: a :func:`optaxclip.summary` that ``scan`` has stacked, with the loss
          if you have it, ``{"loss": losses, **summaries}``; or a history;
        * a list of mappings from names to numbers, one for each step logged:
          ``[{"loss": loss, **optaxclip.summary(opt_state)}, ...]``. What is missing is
          None or not there;
        * the path of a log of any framework: a table (``.csv``, with commas, semicolons
          or tabs), a mapping a line (``.jsonl``, or as Python prints it), lines such as
          ``step 10 | loss: 2.5``, the ``trainer_state.json`` of Hugging Face, a
          ``.npz`` (made by ``np.savez(path, **history)``), or a folder of
          TensorBoard's, if the package ``tensorboard`` is installed.

      params: the parameters, to name the scopes of a record by, and of summaries that
        were made without; shapes will do. Where there are none, scopes are numbered.

    Returns:
      A dictionary of arrays, each of shape ``[rows]``:

      * ``step``, int64, and ``width``, how many steps the row stands for;
      * ``loss``, ``norm`` (global, before the first clip), ``learning_rate``, float64,
        where there are any; NaN where a row has none, as at a step that was skipped;
      * ``norm/<path>``: of the scopes; ``clip/...``: what :func:`optaxclip.summary`
        shows;
      * ``nonfinite``: whether the row's loss or a norm was NaN or infinite; missing is
        neither. ``clipped``, ``skipped``: at how many of the row's steps a factor was
        below 1 (of several clips and scopes, the most of one), or a guard skipped;
      * ``run``, where a file holds several runs: their number;
      * what else there is, under its own name.

      Of a log, rows of evaluations are left out, steps that a resumed run did once more
      replace what was there, and columns are renamed: ``grad_norm`` is ``norm``,
      ``lr`` is ``learning_rate``, ``train/loss`` is ``loss``. Only names that mean one
      thing are: ``eval_loss``, ``param_norm`` or ``grad_norm_clipped`` never are. In
      :func:`optax.partition` no clip sees the global norm, nor does one behind
      :func:`clip_by_value`; log it yourself, as ``norm``.

    Raises:
      TypeError: there is no history in what was passed.
      ValueError: the file is none, or has neither a loss nor a norm; it can be read in
        two ways; columns differ in length, or have further axes.

    Examples:
      >>> losses, norms = [2.3, 2.1, float("nan")], [1.5, 40.0, float("nan")]
      >>> history = optaxclip.history({"loss": losses, "grad_norm": norms})
      >>> list(history)
      ['step', 'width', 'loss', 'norm', 'nonfinite']
      >>> history["nonfinite"]
      array([0, 0, 1])
    """
    if isinstance(seen, str | os.PathLike):
        path = Path(seen)
        if path.suffix.lower() == ".npz" and path.is_file():
            return _columns.of_columns(_logs.arrays(path))
        return _columns.of_rows(_logs.rows(path))
    if records := _records(seen):
        rows = record.rows(_only(records), _paths.paths(params))
        return _columns.of_columns(rows)
    if isinstance(seen, Mapping):
        return _columns.of_columns(jax.device_get(_named(seen, params)))
    if isinstance(seen, Sequence) and seen and all(map(_is_mapping, seen)):
        fetched = jax.device_get([_named(row, params) for row in seen])
        return _columns.of_rows(_meanings.training([_of_one_step(x) for x in fetched]))
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


def _is_mapping(seen: Any) -> bool:
    return isinstance(seen, Mapping)


def _named(seen: Any, params: Any) -> Any:
    """Returns the same with the names of scopes in its summaries, still unfetched."""
    if isinstance(seen, Summary):
        return seen if params is None else seen.named(params)
    if isinstance(seen, Mapping):
        return {key: _named(value, params) for key, value in seen.items()}
    return seen


def _of_one_step(row: Mapping[str, Any]) -> dict[str, Any]:
    flat = dict(_cells.flat(row))
    for name, value in flat.items():
        if np.ndim(value) and _meanings.is_of_training(_meanings.meaning(name)):
            raise ValueError(
                "Expected one number for each name in each row of the list, got shape"
                f" {np.shape(value)} for {name}. Of a batch of runs take one:"
                " `jax.tree.map(lambda x: x[0], seen)`; of stacked summaries pass the"
                " mapping itself."
            )
    return flat
