"""Which tables does `README.md` show, and how are they made of the rows that are kept?

A table answers a question; each device that has rows of it gets a part, made of the
newest row of each setting. In the text its place is between two lines,

    <!-- table: NAME -->
    <!-- end -->

and what is there is replaced, so no figure is typed by hand. A question of your own
needs an entry in `TABLES` and such a place.
"""

import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks import _results

Row = dict[str, Any]

PAGE = pathlib.Path(__file__).with_name("README.md")
PLACE = re.compile(r"(<!-- table: (.+?) -->\n)(?:.*?\n)??(<!-- end -->\n)", re.DOTALL)
# What figures depend on, besides the device; not all rows have all of them.
VERSIONS = ("python", "jax", "jaxlib", "optax", "optaxclip", "torch", "keras")
VERSIONS += ("compiler",)


class Table(NamedTuple):
    """How rows of a question become a table.

    Attributes:
      question: of the rows.
      head: fields that begin a line, with their titles.
      figures: fields that are shown, with their titles.
      pivot: field of which each value has figures of its own, side by side.
      only: values that a row must have to be shown, by field; one, or one of a tuple.
      floor: sentence on what can't be undercut.
    """

    question: str
    head: Mapping[str, str]
    figures: Mapping[str, str]
    pivot: str = ""
    only: Mapping[str, Any] = {}
    floor: str = ""


def _scaling(along: str, figures: Mapping[str, str]) -> Table:
    """Returns that of how figures grow along leaves, elements or devices."""
    head = {"clip": "clip", "at": along}
    return Table("scaling", head, figures, "contender", only={"along": along})


TREE = {"tree": "tree", "leaves": "leaves"}
TABLES = {
    "overhead": Table(
        "overhead",
        {"clip": "clip", **TREE, "floor_ratio": "floor"},
        {"run_ratio": "x", "added_ms": "+ ms", "compile_s": "compile s"},
        "contender",
        floor="as many passes over memory as the clip needs, to five without one: the"
        " column `floor`, for trees that are larger than the cache.",
    ),
    "whole_step": Table(
        "whole_step",
        {"optimizer": "optimizer", "contender": "clip"},
        {
            "run_ms": "ms",
            "run_added": "+ % (from/median/to)",
            "cpu_ms": "processor ms",
            "cpu_added": "processor + % (from/median/to)",
        },
        floor="`one read` of the gradients, from memory.",
    ),
    "compiled": Table(
        "compiled",
        {"clip": "clip", **TREE, "dtype": "dtype", "floor_traffic": "floor"},
        {"kernels": "kernels", "traffic": "traffic", "temporary": "temporary"},
        "contender",
        floor="of traffic, as many passes over memory as the clip needs: the column.",
    ),
    "scaling, leaves": _scaling("leaves", {"kernels": "kernels"}),
    "scaling, elements": _scaling("elements", {"traffic": "traffic"}),
    "scaling, devices": _scaling(
        "devices", {"all_reduce": "all-reduces", "collective_bytes": "bytes of them"}
    ),
    "compile_time": Table(
        "compile_time",
        {"clip": "clip", "leaves": "leaves"},
        {"total_s": "s", "total_ratio": "x Optax's", "cpu_ratio": "processor x"},
        "contender",
        floor="the step without a clip.",
    ),
    "against_torch": Table(
        "against_torch",
        {"clip": "clip", **TREE, "work": "what", "threads": "threads"},
        {"run_ms": "ms", "cpu_ms": "processor ms", "gb_per_s": "GB/s"},
        "contender",
        floor="the bytes that the work has to pass over, of which GB/s are told: what"
        " the memory can do, for trees that are larger than the cache.",
    ),
    "against_torch, errors": Table(
        "against_torch",
        {"clip": "clip", **TREE},
        {"error": "error"},
        "contender",
        only={"work": "clip alone"},
        floor="6e-8, the rounding to float32.",
    ),
    "against_keras, one run": Table(
        "against_keras",
        {"contender": "library"},
        {
            "imports_s": "imports s",
            "train_s": "compile and train s",
            "total_s": "start to end s",
            "cpu_s": "processor s",
            "total_ratio": "x Keras'",
            "cpu_ratio": "processor x",
        },
        only={"work": "one run"},
        floor="imports and compiling; the arithmetic takes 0.1 s.",
    ),
    "against_keras, all runs": Table(
        "against_keras",
        {"contender": "library"},
        {
            "runs": "runs",
            "timed": "timed",
            "train_s": "s",
            "total_ratio": "x Keras'",
            "train_cpu_s": "processor s",
            "cpu_ratio": "processor x",
        },
        only={"work": "all runs"},
        floor="the arithmetic of one run, 0.1 s, times the runs.",
    ),
    "against_keras, last MSE": Table(
        "against_keras",
        {"clip": "clip"},
        {
            "runs": "runs",
            "not_finite": "NaN",
            "train_mse": "train 25/50/75 %",
            "test_mse": "test 25/50/75 %",
            "probability": "p",
        },
        "contender",
        only={"work": "last MSE"},
    ),
    "guards": Table(
        "guards",
        {"optimizer": "optimizer", **TREE},
        {"run_ratio": "x", "compile_ratio": "compile x"},
        "contender",
        floor="1.00, the step with the clip alone.",
    ),
    "record": Table(
        "record",
        {"clip": "clip", **TREE},
        {"run_ratio": "x", "compile_ratio": "compile x"},
        "contender",
        floor="1.00, the step with the clip alone.",
    ),
    "looking_cost": Table(
        "looking_cost",
        {"leaves": "leaves"},
        {
            "run_ratio": "run x",
            "compile_ratio": "compile x",
            "eager_ms": "outside of jit ms",
        },
        floor="1.00, the step without `summary`.",
    ),
}


def rewrite(
    text: str,
    folder: pathlib.Path = _results.FOLDER,
    tables: Mapping[str, Table] | None = None,
) -> str:
    """Puts the tables of the rows in a folder into their places in a text.

    Args:
      text: of the page.
      folder: of the rows.
      tables: those of the page; None for those of `README.md`.

    Raises:
      ValueError: a place has a name that no table has, or a table has no place.
    """
    tables = TABLES if tables is None else tables
    places = [place[2] for place in PLACE.finditer(text)]
    if sorted(places) != sorted(tables):
        raise ValueError(
            f"Each table needs one place, `<!-- table: NAME -->` and `<!-- end -->`:"
            f" there are tables {sorted(tables)}, and places {sorted(places)}. Add"
            " the place to the page, or the table to `TABLES`."
        )
    return PLACE.sub(lambda x: x[1] + render(tables[x[2]], folder) + x[3], text)


def render(table: Table, folder: pathlib.Path) -> str:
    """Returns a table of each device, and what its figures depend on."""
    parts = []
    for path in sorted(folder.glob(f"*/{table.question}.jsonl")):
        if rows := newest(table, _results.load(path)):
            lines = (describe(rows), f"Floor: {table.floor}" if table.floor else "")
            text = "\n".join(line for line in lines if line)
            parts.append(f"{text}\n\n{as_markdown(*cells(table, rows))}\n")
    return "\n".join(["", *parts, ""]) if parts else ""


def newest(table: Table, rows: Iterable[Row]) -> list[Row]:
    """Returns the row of each cell's setting that was made last, whatever made it."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in sorted(rows, key=lambda row: row["date"]):
        if all(_is_among(row[name], value) for name, value in table.only.items()):
            found[*(row[name] for name in table.head), row.get(table.pivot)] = row
    return list(found.values())


def _is_among(value: Any, allowed: Any) -> bool:
    return value in allowed if isinstance(allowed, tuple) else value == allowed


def describe(rows: Sequence[Row]) -> str:
    """Returns device, versions and days of some rows, in a line."""
    device = rows[0]["device"]
    if rows[0]["platform"] == "cpu":
        device += f", {rows[0]['cpus']} cores"
    found = {
        name: sorted({row[name] for row in rows if name in row}) for name in VERSIONS
    }
    versions = (f"{name} {' and '.join(own)}" for name, own in found.items() if own)
    days = sorted({row["date"][:10] for row in rows})
    day = " to ".join(dict.fromkeys((days[0], days[-1])))
    return f"**{device}**: {', '.join(versions)}; {day}."


def cells(table: Table, rows: Iterable[Row]) -> tuple[list[str], list[list[str]]]:
    """Returns the titles of a table, and its lines."""
    rows = sorted(rows, key=lambda row: [_order(row, name) for name in table.head])
    head = dict(table.head)
    if len({row["jax"] for row in rows}) > 1:
        head["jax"] = "jax"
    lines: dict[tuple[Any, ...], dict[tuple[str, str], Any]] = {}
    for row in rows:
        line = lines.setdefault(tuple(row[name] for name in head), {})
        for name in table.figures:
            line[row.get(table.pivot, ""), name] = row.get(name)
    across = sorted({row.get(table.pivot, "") for row in rows})
    keys = [
        (value, name)
        for name in table.figures
        for value in across
        # A baseline is 1 or 0 throughout, and what nobody told is None.
        if any(line.get((value, name)) not in (0, 1, None) for line in lines.values())
    ]
    titles = [f"{value} {table.figures[name]}".strip() for value, name in keys]
    body = [
        [*map(short, own), *(short(line.get(key)) for key in keys)]
        for own, line in lines.items()
    ]
    return [*head.values(), *titles], body


def _order(row: Row, name: str) -> Any:
    """Trees go from small to large."""
    return row["elements"] if name == "tree" else row[name]


def short(value: Any) -> str:
    """Returns three digits of a number, or of each of several."""
    if isinstance(value, list):
        return "/".join(map(short, value))
    if isinstance(value, float):
        return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"
    return "-" if value is None else str(value)


def as_markdown(titles: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
