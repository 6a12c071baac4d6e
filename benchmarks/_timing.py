"""Times several ways of doing one thing in one process, so that they can be compared.

The contenders take turns within each round, and every figure is a median over rounds of
something measured within a round: a slow moment of the machine hits all of them alike.
Compiling is timed apart, and equal answers come before any time.
"""

import datetime
import json
import math
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jaxlib
import numpy as np
import optax

import optaxclip

Tree = Any
Times = dict[str, list[float]]  # seconds, one entry per round, by contender

PACKAGES = (jax, jaxlib, optax, optaxclip)
SHORTEST_SAMPLE = 0.005  # seconds; shorter calls are timed several at once


class Summary(NamedTuple):
    """Medians over rounds, in seconds; the last two against the baseline."""

    seconds: float
    ratio: float
    added: float


def machine() -> dict[str, str | int]:
    """Returns what a time depends on besides the code: device, versions, date."""
    device = jax.devices()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M"),
        "device": _cpu_name() if device.platform == "cpu" else device.device_kind,
        "platform": device.platform,
        "cpus": os.cpu_count() or 1,
        "python": platform.python_version(),
        **{package.__name__: package.__version__ for package in PACKAGES},
    }


def compile_apart(
    lowers: Mapping[str, Callable[[], jax.stages.Lowered]], rounds: int
) -> tuple[dict[str, jax.stages.Compiled], Times]:
    """Traces and compiles every contender once per round, each time from nothing.

    Args:
      lowers: by name, a function that traces and lowers.
      rounds: how often each is compiled.

    Returns:
      The compiled contenders, and the seconds.
    """
    compiled, times = {}, {name: [] for name in lowers}
    for _ in range(rounds):
        for name, lower in lowers.items():
            jax.clear_caches()
            start = time.perf_counter()
            compiled[name] = lower().compile()
            times[name].append(time.perf_counter() - start)
    return compiled, times


def assert_equal_answers(answers: Mapping[str, Tree], rtol: float) -> None:
    """Raises unless all answers agree, relative to the largest element of each leaf."""
    (first, expected), *others = answers.items()
    for name, answer in others:
        leaves = jax.tree.leaves_with_path(expected)
        for (path, want), got in zip(leaves, jax.tree.leaves(answer), strict=True):
            error = float(abs(got - want).max()) / float(abs(want).max())
            if not error <= rtol:
                raise AssertionError(
                    f"{name} and {first} differ by {error:.1e} at"
                    f" {jax.tree_util.keystr(path)}, expected at most {rtol:.0e}."
                )


def interleave(contenders: Mapping[str, Callable[[int], None]], rounds: int) -> Times:
    """Times every contender once per round, starting with another one each time.

    Args:
      contenders: by name, a function that does its work so many times and waits.
      rounds: how often each is timed.

    Returns:
      Seconds per call, one entry per round.
    """
    names = list(contenders)
    once = max(_seconds(contenders[name], 1) for name in names)
    calls = math.ceil(SHORTEST_SAMPLE / once)
    times: Times = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(_seconds(contenders[name], calls) / calls)
    return times


def summarize(times: Times, baseline: str) -> dict[str, Summary]:
    """Returns medians of the times, and of the ratios and differences by round."""
    base = np.asarray(times[baseline])
    return {
        name: Summary(
            seconds=statistics.median(seconds),
            ratio=float(np.median(seconds / base)),
            added=float(np.median(seconds - base)),
        )
        for name, seconds in times.items()
    }


def append_rows(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    """Adds one JSON line per row, so that a later run can be compared."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def _seconds(work: Callable[[int], None], calls: int) -> float:
    start = time.perf_counter()
    work(calls)
    return time.perf_counter() - start


def _cpu_name() -> str:
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1] for line in lines if line.startswith("model name")]
    return names[0].strip() if names else platform.machine()
