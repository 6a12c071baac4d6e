"""How is a log file read, whoever wrote it?

Into rows, each a mapping from the names in the file to numbers. What is no number is
left out: what is missing is not NaN.
"""

import ast
import csv
import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, float]

_KINDS = (
    "a .npz, .csv or .jsonl file, a `trainer_state.json`, or a folder with event files"
    " of TensorBoard"
)
_NUMBER = re.compile(r"([-+]?[\d.,]+(?:e[-+]?\d+)?)([kmb]?)", re.IGNORECASE)
_WORDS = {"nan": np.nan, "inf": np.inf, "infinity": np.inf}
_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9}


def rows(path: Path) -> list[Row]:
    """Returns the rows of a log with at least one number in them.

    Raises:
      ValueError: nothing is there, or it is none of the kinds of files.
    """
    if not path.exists():
        raise ValueError(f"Expected a log, got the path {path}, where nothing is.")
    if path.is_dir() or ".tfevents." in path.name:
        raw = _of_tensorboard(path)
    elif path.suffix == ".npz":
        raw = _of_columns(_arrays(path), path)
    else:
        raw = _of_text(path)
    found = [flat for row in raw if (flat := dict(numbers(row)))]
    if not found:
        raise ValueError(
            f"Expected rows with numbers in {path}, found none. A log is {_KINDS}."
        )
    return found


def _of_text(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"Expected a log, got {path}, no text: {error}.") from None
    start = text.lstrip()[:1]
    if start == "[" or (start == "{" and path.suffix == ".json"):
        return _of_json(text, path)
    if start == "{":
        return _of_lines(text, path)
    return _of_table(text, path)


def _of_json(text: str, path: Path) -> list[Any]:
    """Reads `trainer_state.json`, a list of rows or a mapping of columns."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        if "\n" in text.strip() and error.msg == "Extra data":
            return _of_lines(text, path)
        raise ValueError(f"Expected JSON in {path}, got none: {error}.") from None
    if isinstance(found, dict) and "log_history" in found:
        found = found["log_history"]
    if isinstance(found, dict):
        return _of_columns(found, path)
    if not isinstance(found, list) or not all(isinstance(x, dict) for x in found):
        raise ValueError(
            f"Expected a list of mappings in {path}, or one under `log_history`; got"
            f" {type(found).__name__}."
        )
    return found


def _of_lines(text: str, path: Path) -> list[Any]:
    """Reads a mapping a line, as JSON or as Python prints it; skips the others.

    The last line may be torn: the run may still be going on, or have been killed.
    """
    lines = [line.strip() for line in text.splitlines()]
    found = [row for line in lines if isinstance(row := _mapping(line), dict)]
    count = sum(line.startswith("{") for line in lines)
    if len(found) < count - 1 or not found:
        raise ValueError(
            f"Expected a mapping in each line of {path}, got {len(found)} in {count}"
            " lines that begin with a brace."
        )
    return found


def _mapping(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        pass
    # Python's own words are no literals for NaN and infinity.
    line = re.sub(r"(?<=[:\s])(-?)(nan|inf)\b(?=\s*[,}])", r"'\1\2'", line)
    try:
        return ast.literal_eval(line) if line.startswith("{") else None
    except (ValueError, SyntaxError):
        return None


def _of_table(text: str, path: Path) -> list[Any]:
    lines = [line for line in text.splitlines() if line.strip(" ,;\t#")]
    head = lines[0] if lines else ""
    separator = max(",;\t", key=head.count)
    names = [name.strip().lstrip("#").strip() for name in head.split(separator)]
    if len(lines) < 2 or not head.count(separator) or all(map(_number, names)):
        raise ValueError(
            f"Expected a first line with the names of columns in {path}, such as"
            f" `step,loss,grad_norm`, got {head[:60]!r}. A log is {_KINDS}."
        )
    table = csv.reader(lines[1:], delimiter=separator)
    return [dict(zip(names, row, strict=False)) for row in table]


def _arrays(path: Path) -> dict[str, Any]:
    try:
        with np.load(path) as file:
            return dict(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"Expected arrays in {path}, got none: {error}.") from None


def _of_columns(columns: dict[str, Any], path: Path) -> list[Any]:
    lists = {k: list(v) for k, v in columns.items() if np.ndim(v) == 1}
    if not lists or len({len(x) for x in lists.values()}) > 1:
        lengths = {key: len(value) for key, value in lists.items()}
        raise ValueError(f"Expected columns of one length in {path}, got {lengths}.")
    return [dict(zip(lists, x, strict=True)) for x in zip(*lists.values(), strict=True)]


def _of_tensorboard(path: Path) -> list[Any]:
    try:
        events = importlib.import_module(
            "tensorboard.backend.event_processing.event_accumulator"
        )
    except ImportError:
        raise ValueError(
            f"Expected the package `tensorboard`, to read {path}: `pip install"
            " tensorboard`, or write a CSV file."
        ) from None
    # Every scalar; by default it keeps a sample of them.
    found: dict[int, Row] = {}
    folders = sorted({x.parent for x in path.rglob("*.tfevents.*")}) or [path]
    for source in folders if path.is_dir() else [path]:
        log = events.EventAccumulator(
            str(source), size_guidance={events.SCALARS: 0}
        ).Reload()
        for tag in log.Tags()["scalars"]:
            for event in log.Scalars(tag):
                found.setdefault(event.step, {"step": event.step})[tag] = event.value
    return [found[step] for step in sorted(found)]


def numbers(row: Any, above: str = "") -> Iterator[tuple[str, float]]:
    """Yields what a row holds that is a number, under a flat name."""
    for key, value in row.items():
        name = f"{above}{key}"
        if isinstance(value, dict):
            yield from numbers(value, f"{name}/")
        elif (number := _number(value)) is not None:
            yield name, number


def _number(value: Any) -> float | None:
    """Returns a number, as trainers write it: `1.5e3`, `1,500`, `2K`, `-inf`."""
    if not isinstance(value, str):
        array = np.asarray(value)
        return float(array) if array.ndim == 0 and array.dtype.kind in "iuf" else None
    text = value.strip()
    if (word := text.lstrip("+-").casefold()) in _WORDS:
        return -_WORDS[word] if text[0] == "-" else _WORDS[word]
    found = _NUMBER.fullmatch(text)
    try:
        return found and float(found[1].replace(",", "")) * _UNITS[found[2].lower()]
    except ValueError:
        return None
