"""Where do results go, and which of those that are there do they replace?

A row is one answer to a question. `results/<device>/<question>.jsonl` keeps the newest
row of each setting, minor version of JAX and version of optaxclip. Rows are sorted, so
that a run changes few lines; what they replace is in the history of git. A file grows
with the versions alone: delete the lines of those that nobody asks about.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jaxlib
import optax

import optaxclip

Row = dict[str, Any]

FOLDER = pathlib.Path(__file__).parent / "results"
PACKAGES = (jax, jaxlib, optax, optaxclip)
# What every row needs beside the settings of its question.
COMMON = ("question", "date", "device", "platform", "cpus", "jax", "optaxclip")


def make_parser(description: str | None, quick: str) -> argparse.ArgumentParser:
    """Returns a parser of the options that all benchmarks have.

    Args:
      description: docstring of the benchmark.
      quick: what `--quick` runs.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, help=f"folder, default {FOLDER}")
    parser.add_argument(
        "--quick", action="store_true", help=f"{quick}; keeps no rows without --out"
    )
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parses the command line; `out` is None where no rows are to be kept."""
    args = parser.parse_args()
    if not args.quick:
        args.out = args.out or FOLDER
    return args


def machine() -> Row:
    """Returns what a figure depends on besides the code: device, versions, date."""
    device = jax.devices()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M"),
        "device": _cpu_name() if device.platform == "cpu" else device.device_kind,
        "platform": device.platform,
        "cpus": os.cpu_count() or 1,
        "python": platform.python_version(),
        **{package.__name__: package.__version__ for package in PACKAGES},
    }


def print_machine() -> Row:
    """Prints what figures depend on, in a line, and returns it."""
    found = machine()
    print(", ".join(f"{name} {value}" for name, value in found.items()))
    return found


def rounded(row: Row) -> Row:
    """Keeps five digits of each float."""
    return {
        name: float(f"{value:.5g}") if isinstance(value, float) else value
        for name, value in row.items()
    }


def store(
    rows: Iterable[Row], settings: Sequence[str], folder: pathlib.Path | None
) -> None:
    """Puts rows into their files, in place of older ones with the same key.

    Args:
      rows: those of one question; each has the fields `COMMON`.
      settings: names of the fields that tell one row of the question from another.
      folder: where the folders of the devices are; None keeps nothing.

    Raises:
      ValueError: a row, given or stored, lacks a field that it is found by. Then no
        file has changed.
    """
    if folder is None:
        return
    found: dict[pathlib.Path, dict[tuple[Any, ...], Row]] = {}
    for row in rows:
        own_key, path = key(row, settings), path_of(row, folder)
        if path not in found:
            found[path] = {key(old, settings): old for old in load(path)}
        found[path][own_key] = row
    for path, kept in found.items():
        _write(path, [kept[own_key] for own_key in sorted(kept)])


def load(path: pathlib.Path) -> list[Row]:
    """Returns the rows of a file; none if there is no such file."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def key(row: Row, settings: Sequence[str]) -> tuple[Any, ...]:
    """Returns what only one row of a file may have: versions and settings."""
    lacks = [name for name in (*COMMON, *settings) if row.get(name) is None]
    if lacks:
        raise ValueError(
            f"Every row is found by its fields {', '.join((*COMMON, *settings))};"
            f" this one has no value for {', '.join(lacks)}: {json.dumps(row)}."
        )
    minor = tuple(int(number) for number in row["jax"].split(".")[:2])
    return minor, row["optaxclip"], *(row[name] for name in settings)


def path_of(row: Row, folder: pathlib.Path) -> pathlib.Path:
    """Returns the file of a row, such as `nvidia-h200/overhead.jsonl`.

    How many cores there are matters where they do the work.
    """
    device = row["device"]
    if row["platform"] == "cpu":
        device += f" {row['cpus']} cpus"
    slug = re.sub("[^a-z0-9]+", "-", device.lower()).strip("-")
    return folder / slug / f"{row['question']}.jsonl"


def _write(path: pathlib.Path, rows: Iterable[Row]) -> None:
    """Replaces a file at once: whoever stops it halfway leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".new")
    with beside.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    beside.replace(path)


def _cpu_name() -> str:
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1] for line in lines if line.startswith("model name")]
    return names[0].strip() if names else platform.machine()
