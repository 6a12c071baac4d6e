"""How is a log file read, whoever wrote it?

Into rows, each a mapping from the names in the file to numbers. What is no number is
left out: what is missing is not NaN.
"""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from optaxclip._looking import (
    boards as _boards,
    cells as _cells,
    meanings as _meanings,
    texts as _texts,
)
from optaxclip._looking.cells import Row
from optaxclip._looking.texts import Raw

_KINDS = (
    "a .npz, .csv or .jsonl file, a `trainer_state.json`, or a folder with event files"
    " of TensorBoard"
)


def rows(path: Path) -> list[Row]:
    """Returns the rows of a log with at least one number in them.

    Raises:
      ValueError: nothing is there, or it is none of the kinds of files.
    """
    if not path.exists():
        raise ValueError(f"Expected a log, got the path {path}, where nothing is.")
    if path.is_dir() or ".tfevents." in path.name:
        raw: Raw = _boards.rows(path)
    else:
        raw = _of_text(_text(path), path)
    found = _meanings.training(raw)
    if not found:
        raise ValueError(
            f"Expected rows with numbers in {path}, found none. A log is {_KINDS}."
        )
    return found


def arrays(path: Path) -> dict[str, Any]:
    """Returns what is in a `.npz` file."""
    try:
        with np.load(path) as file:
            return dict(file)
    except (OSError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"Expected arrays in {path}, got none: {error}.") from None


def _text(path: Path) -> str:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        text = f"\0{error}"
    if "\0" in text:
        raise ValueError(f"Expected a log, got {path}, which is no text in UTF-8.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _of_text(text: str, path: Path) -> Raw:
    start = text.lstrip()[:1]
    if start and start in "[{" and (found := _of_json(text, path)):
        return found
    if start == "{":
        return _texts.mappings(text, path)
    mappings, pairs = _texts.printed(text), _texts.pairs(text)
    if (count := _telling(mappings)) and count >= _telling(pairs):
        return mappings
    return pairs if _telling(pairs) > 1 else _texts.table(text, path)


def _telling(raw: Raw) -> int:
    """Returns how many rows have a loss or a norm in them."""
    every = [map(_meanings.meaning, _cells.numbers(row)) for row in raw]
    return sum(any(map(_meanings.is_of_training, names)) for names in every)


def _of_json(text: str, path: Path) -> Raw:
    """Reads `trainer_state.json`, a list of rows or a mapping of columns, if it is one.

    If it is no JSON but has lines, each may be some.
    """
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        if "\n" in text.strip():
            return []
        raise ValueError(f"Expected JSON in {path}, got none: {error}.") from None
    if isinstance(found, dict) and "log_history" in found:
        found = found["log_history"]
    if isinstance(found, dict):
        return _of_mapping(found, path)
    if not isinstance(found, list) or not all(isinstance(x, dict) for x in found):
        raise ValueError(
            f"Expected a list of mappings in {path}, or one under `log_history`; got"
            f" {text.lstrip()[:20]!r}."
        )
    return found


def _of_mapping(found: dict[str, Any], path: Path) -> Raw:
    """Returns the rows of columns, or the one row that it is.

    pandas writes a mapping with numbers for names for each column, or for each row.
    """
    inner = [
        x for x in found.values() if isinstance(x, dict) and all(map(str.isdecimal, x))
    ]
    if found and all(map(str.isdecimal, found)):
        return [row for row in found.values() if isinstance(row, dict)]
    if found and len(inner) == len(found):
        found = {name: list(column.values()) for name, column in found.items()}
    every = dict(_cells.flat(found))
    lists = {key: value for key, value in every.items() if isinstance(value, list)}
    if not lists:
        return [every]
    if len({len(x) for x in lists.values()}) > 1:
        lengths = {key: len(value) for key, value in lists.items()}
        raise ValueError(f"Expected columns of one length in {path}, got {lengths}.")
    return [dict(zip(lists, x, strict=True)) for x in zip(*lists.values(), strict=True)]
