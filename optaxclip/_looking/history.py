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
)
from optaxclip._looking.by_name import Summary


def history(seen: Any, params: Any = None) -> _columns.History:
    """Returns what a run did as columns, one number for each row, oldest first.

    Args:
      seen: one of

        * a mapping from names to arrays of one number for each step: a
          :func:`optaxclip.summary` that ``scan`` has stacked, with the loss if you have
          it, ``{"loss": losses, **summaries}``; or a history;
        * a list of mappings from names to numbers, one for each step logged:
          ``[{"loss": loss, **optaxclip.summary(opt_state)}, ...]``;
        * the path of a log, of any framework: ``.csv``, ``.jsonl``, ``.npz`` (made by
          ``np.savez(path, **history)``), the ``trainer_state.json`` of Hugging Face, or
          a folder of TensorBoard's, if the package ``tensorboard`` is installed.

      params: the parameters, to name scopes by; shapes will do.

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
        path = Path(seen)
        if path.suffix.lower() == ".npz" and path.is_file():
            return _columns.of_columns(_logs.arrays(path))
        return _columns.of_rows(_logs.rows(path))
    if isinstance(seen, Mapping):
        return _columns.of_columns(jax.device_get(_named(seen, params)))
    if isinstance(seen, Sequence) and seen and all(map(_is_mapping, seen)):
        fetched = jax.device_get([_named(row, params) for row in seen])
        return _columns.of_rows([_of_one_step(row) for row in fetched])
    raise TypeError(
        "Expected the state of an optimizer with `optaxclip.record` in it, stacked"
        " summaries, a list of them, or the path of a log; got"
        f" {type(seen).__name__}."
    )


def _is_mapping(seen: Any) -> bool:
    return isinstance(seen, Mapping)


def _named(seen: Any, params: Any) -> Any:
    """Returns the same with the names of scopes in its summaries, still unfetched."""
    if isinstance(seen, Summary):
        return seen if params is None else seen.named(params)
    if isinstance(seen, Mapping):
        return {key: _named(value, params) for key, value in seen.items()}
    return seen


def _of_one_step(row: Mapping[str, Any]) -> _cells.Row:
    for name, value in _cells.flat(row):
        if np.ndim(value) and _meanings.is_of_training(_meanings.meaning(name)):
            raise ValueError(
                "Expected one number for each name in each row of the list, got shape"
                f" {np.shape(value)} for {name}. Of a batch of runs take one:"
                " `jax.tree.map(lambda x: x[0], seen)`; of stacked summaries pass the"
                " mapping itself."
            )
    return _cells.numbers(row)
