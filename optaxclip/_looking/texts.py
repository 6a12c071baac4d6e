"""How is a text log read: a table, mappings line by line, or `name: number`?"""

import ast
import csv
import json
import re
from pathlib import Path
from typing import Any

from optaxclip._looking import cells as _cells, meanings as _meanings

Raw = list[dict[str, Any]]

_WORD = r"(?!nan\b|inf\b|INFO\b|DEBUG\b|WARNING\b)[A-Za-z][\w/.-]*"
_PAIR = re.compile(rf"\b({_WORD}(?: {_WORD}){{0,3}})(?:\s*[:=]\s*|\s+)([\w.,+-]+)")
_LETTERS = re.compile("[A-Za-z]{2}")
_COMMA = re.compile(r"[-+]?[\d.]*\d,\d[\d,.]*(?:e[-+]?\d+)?", re.IGNORECASE)
_POINT = re.compile(r"[-+]?\d*\.\d+(?:e[-+]?\d+)?", re.IGNORECASE)
_GROUPS = re.compile(r"[-+]?[1-9]\d{0,2}(?:,\d{3})+")


def mappings(text: str, path: Path) -> Raw:
    """Reads a mapping a line, as JSON or as Python prints it; skips the others.

    A line may be torn: the run may still be going on, or have been killed.
    """
    lines = [line.strip() for line in text.split("\n")]
    found = printed(text)
    count = sum(line.startswith("{") for line in lines)
    if count - len(found) > max(1, count / 10) or not found:
        raise ValueError(
            f"Expected a mapping in each line of {path}, got {len(found)} in {count}"
            " lines that begin with a brace."
        )
    return found


def printed(text: str) -> Raw:
    """Returns the mappings in lines that may have more before and after them."""
    lines = [line for line in text.split("\n") if "{" in line]
    return [row for line in lines if isinstance(row := _mapping(line), dict)]


def _mapping(line: str) -> Any:
    line = line[line.index("{") : line.rfind("}") + 1]
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        pass
    # Python's own words are no literals for NaN, infinity, and numbers of arrays.
    line = re.sub(r"\b(?:\w+\.)?\w+\(([^(),]*)(?:,[^()]*)?\)", r"\1", line)
    line = re.sub(r"(?<=[:\s,[])(-?)(nan|inf)\b(?=\s*[],}])", r"'\1\2'", line)
    try:
        return ast.literal_eval(line)
    except (ValueError, SyntaxError):
        return None


def pairs(text: str) -> Raw:
    """Reads lines such as `step 200 | loss: 1.5 lr=1e-4`, but for evaluations."""
    rows = []
    for line in filter(_LETTERS.search, text.split("\n")):
        words = {*re.findall("[a-z]+", line.lower())}
        if not _meanings.EVALUATIONS & words:
            found = _PAIR.findall(line)
            names = [name for name, _ in found]
            rows.append({k: x.rstrip(",.") for k, x in found if names.count(k) == 1})
    return rows


def table(text: str, path: Path) -> Raw:
    """Reads a first line with names and the others with as many numbers each.

    Where a resumed run wrote another line with names, these count from there on.
    """
    lines = [x.strip() for x in text.split("\n") if x.strip(" ,;\t\r#")]
    lines = _after_comments(lines)
    separator = max(",;\t", key=lines[0].count) if lines else ","
    rows = [_split(line.lstrip("# "), separator) for line in lines]
    if len(rows) < 2 or len(rows[0]) < 2 or not _is_head(rows[0]):
        raise ValueError(
            f"Expected a first line with the names of columns in {path}, such as"
            f" `step,loss,grad_norm`, got {text.lstrip()[:60].splitlines()[:1]}."
        )
    if separator != ",":
        rows = _with_points(rows, path)
    found, torn = [], []
    names, words = rows[0], {*rows[0]} - {""}
    for row in rows:
        if not words.isdisjoint(row) and _is_head(row):
            names = _unique(row, path)
            words = {*names} - {""}
        elif len(row) < len(names) or any(row[len(names) :]):
            torn.append(row)
        else:
            found.append(dict(zip(names, row, strict=False)))
    if len(torn) > max(1, len(rows) / 10):
        raise ValueError(
            f"Expected {len(names)} numbers in each line of {path}, as many as names,"
            f" got {len(torn[0])} in {separator.join(torn[0])[:60]!r}."
        )
    return found


def _after_comments(lines: list[str]) -> list[str]:
    """Leaves out comments, but for one that holds the names of the columns."""
    first = next((i for i, x in enumerate(lines) if not x.startswith("#")), 0)
    data = [x for x in lines if not x.startswith("#")]
    has_numbers = bool(data) and not _is_head(re.split("[,;\t]", data[0]))
    return lines[max(first - 1, 0) : first] + data if has_numbers else data


def _split(line: str, separator: str) -> list[str]:
    cells = line.split(separator)
    if '"' in line:
        cells = next(csv.reader([line], delimiter=separator))
    return [cell.strip() for cell in cells]


def _is_head(row: list[str]) -> bool:
    """Whether most of a line are words."""
    return 2 * sum(bool(x) and _cells.number(x) is None for x in row) > len(row)


def _unique(names: list[str], path: Path) -> list[str]:
    for name in names:
        if name and names.count(name) > 1:
            raise ValueError(
                f"Expected different names of columns in {path}, got {name!r} twice."
            )
    return names


def _with_points(rows: list[list[str]], path: Path) -> list[list[str]]:
    """Returns rows in which a decimal comma is a point, if there are such."""
    found = [cell for row in rows for cell in row if _COMMA.fullmatch(cell)]
    if not found:
        return rows
    has_points = any(_POINT.fullmatch(cell) for row in rows for cell in row)
    if has_points or all(map(_GROUPS.fullmatch, found)) or any("." in x for x in found):
        raise ValueError(
            f"Expected decimal points or decimal commas in {path}, got {found[0]!r},"
            " which may be either. Write points."
        )
    return [
        [x.replace(",", ".") if _COMMA.fullmatch(x) else x for x in row] for row in rows
    ]
