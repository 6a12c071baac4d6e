"""What every study needs: options, a bar, quartiles of the seeds, and a table."""

import argparse
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

WORST = 1e300  # beyond float32: sorts where an infinity would, and can be averaged

# ---- Options -------------------------------------------------------------------------


def option_parser(
    description: str, full: Mapping[str, int], quick: Mapping[str, Any]
) -> argparse.ArgumentParser:
    """Lists the options that all studies have.

    Args:
      description: one sentence.
      full: numbers that can be set, and their defaults, such as `{"seeds": 16}`.
      quick: the defaults of these, and of any option, with `--quick`.
    """
    parser = argparse.ArgumentParser(description=description)
    for name, default in full.items():
        text = f"default {default}"
        parser.add_argument(f"--{name}", type=whole_number, default=default, help=text)
    values = ", ".join(f"{name} {value}" for name, value in quick.items())
    text = f"does it run? Unless said otherwise: {values}"
    parser.add_argument("--quick", action="store_true", help=text)
    text = "folder of the figures"
    parser.add_argument("--out", type=Path, default=Path("figures"), help=text)
    return parser


def parse_options(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    quick: Mapping[str, Any],
) -> argparse.Namespace:
    """Reads the options, and makes the folder for the figures."""
    options = parser.parse_args(arguments)
    if options.quick:
        parser.set_defaults(**quick)
        options = parser.parse_args(arguments)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: expected a folder to write to: {error}")
    return options


def whole_number(text: str) -> int:
    """Reads an option that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number >= 1, got {text!r}")
    return int(text)


def positive_number(text: str) -> float:
    """Reads an option that must be a finite number above zero."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number > 0, got {text!r}")
    return value


# ---- Runs ----------------------------------------------------------------------------


def progress_bar(**options: Any) -> tqdm:
    """Makes a bar that does not guess the time left: much of it goes into compiling."""
    form = "{l_bar}{bar}| {n_fmt}/{total_fmt} {unit} [{elapsed}]"
    return tqdm(desc="compiling and training", bar_format=form, **options)


def took(start: float) -> str:
    """Says on what it ran, and how long since `time.perf_counter()` was `start`."""
    seconds = time.perf_counter() - start
    return f"on {jax.devices()[0].device_kind}: {seconds:.1f} s"


# ---- Numbers -------------------------------------------------------------------------


def quartiles(values, axis: int = 0) -> np.ndarray:
    """Takes quartiles, in which what is not finite is infinite: nothing is worse."""
    values = np.asarray(values, np.float64)
    values = np.where(np.isfinite(values), values, WORST)
    result = np.percentile(values, (25, 50, 75), axis=axis)
    return np.where(result < 1e100, result, np.inf)


def median(values, axis: int = 0) -> np.ndarray:
    """Takes the median, in which what is not finite is infinite."""
    return quartiles(values, axis)[1]


def three_quartiles(values) -> str:
    """Writes the quartiles of one number per seed; `QUARTILES` is their head."""
    return " / ".join(map(short, quartiles(values)))


QUARTILES = "25 % / median / 75 %"


def short(value: float) -> str:
    """Writes a number in five characters or so."""
    if not np.isfinite(value):
        return "inf"
    if abs(value) < 100:
        return f"{value:.3g}"
    return f"{value:.0f}" if abs(value) < 1e5 else f"{value:.0e}"


def last_finite(values) -> np.ndarray:
    """Gives the place before the first value that is not finite; -1 if none is."""
    broken = ~np.isfinite(values)
    first = np.where(broken.any(axis=-1), broken.argmax(axis=-1), broken.shape[-1])
    return first - 1


def print_table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Prints columns, the first one to the left; heads may have several lines."""
    parts = [head.split("\n") for head in heads]
    depth = max(map(len, parts))
    padded = [[""] * (depth - len(part)) + part for part in parts]
    lines = [*zip_longest(*padded), *(tuple(map(str, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        cells = [f"{cell:>{w}}" for cell, w in zip(others, widths[1:], strict=True)]
        print("  ".join([f"{first:{widths[0]}}", *cells]).rstrip())
