"""How long do several ways of doing one thing take, compared with each other?

The contenders share a process and take turns within each round, and every figure is a
median over rounds of something measured within a round: a slow moment of the machine
hits all of them alike. Compiling is timed apart; equal answers come before any time.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import _results
import _trees

Tree = Any
Times = dict[str, list[float]]  # seconds, one entry per round, by contender

SHORTEST_SAMPLE = 0.005  # seconds; shorter calls are timed several at once


class Summary(NamedTuple):
    """Medians over rounds, in seconds; the last two against the baseline."""

    seconds: float
    ratio: float
    added: float


def parse_args(
    description: str | None, repeats: int, *options: tuple[str, dict[str, Any]]
) -> argparse.Namespace:
    """Parses the command line of a benchmark that times steps on trees.

    Args:
      description: docstring of the benchmark.
      repeats: default number of rounds.
      *options: name and keywords of each further one.
    """
    parser = _results.make_parser(description, "the small tree alone")
    add, trees = parser.add_argument, list(_trees.TREES)
    add("--trees", nargs="+", choices=trees, default=trees)
    add("--repeats", type=int, default=repeats, help="rounds per tree")
    add("--compiles", type=int, default=3, help="times to compile")
    for name, keywords in options:
        add(name, **keywords)
    args = _results.parse(parser)
    if args.repeats < 1 or args.compiles < 1:
        parser.error("--repeats and --compiles must be at least 1")
    if args.quick:
        args.trees, args.repeats, args.compiles = ["lstm"], 11, 1
    return args


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
    # A cache on disk would make the second compilation look free.
    jax.config.update("jax_enable_compilation_cache", False)
    compiled, times = {}, {name: [] for name in lowers}
    for _ in range(rounds):
        for name, lower in lowers.items():
            jax.clear_caches()
            start = time.perf_counter()
            compiled[name] = lower().compile()
            times[name].append(time.perf_counter() - start)
    return compiled, times


def assert_equal_answers(answers: Mapping[str, Tree], rtol: float) -> float:
    """Raises unless all answers agree, relative to the largest element of each leaf.

    Args:
      answers: by name; the others are compared with the first.
      rtol: largest difference allowed.

    Returns:
      The largest difference.
    """
    (first, expected), *others = answers.items()
    largest = 0.0
    for name, answer in others:
        leaves = jax.tree.leaves_with_path(expected)
        for (path, want), got in zip(leaves, jax.tree.leaves(answer), strict=True):
            error = float(abs(got - want).max()) / float(abs(want).max())
            if not error <= rtol:
                raise AssertionError(
                    f"{name} and {first} differ by {error:.1e} at"
                    f" {jax.tree_util.keystr(path)}, expected at most {rtol:.0e}."
                )
            largest = max(largest, error)
    return largest


def interleave(
    contenders: Mapping[str, Callable[[int], None]], rounds: int, rest: float = 0.0
) -> Times:
    """Times every contender once per round, starting with another one each time.

    Args:
      contenders: by name, a function that does its work so many times and waits.
      rounds: how often each is timed.
      rest: seconds before each. The threads of a library wait for more work a while,
        and would slow down another library that comes next.

    Returns:
      Seconds per call, one entry per round.
    """
    return interleave_on(contenders, rounds, [time.perf_counter], rest)[0]


def interleave_on(
    contenders: Mapping[str, Callable[[int], None]],
    rounds: int,
    clocks: Sequence[Callable[[], float]],
    rest: float = 0.0,
) -> list[Times]:
    """Does what `interleave` does, on several clocks at once; returns those of each."""
    names = list(contenders)
    once = max(_seconds(contenders[name], 1, [time.perf_counter])[0] for name in names)
    calls = math.ceil(SHORTEST_SAMPLE / once)
    times: list[Times] = [{name: [] for name in names} for _ in clocks]
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            time.sleep(rest)
            seconds = _seconds(contenders[name], calls, clocks)
            for own, passed in zip(times, seconds, strict=True):
                own[name].append(passed / calls)
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


def medians(times: Times, baseline: str) -> dict[str, list[float]]:
    """Returns the median of the ratios to the baseline by round, and its 95 % interval.

    The interval is that of order statistics, whatever the distribution: smallest first,
    the median in the middle. Of a few rounds it is all that was seen.
    """
    base = np.asarray(times[baseline])
    reach = min(98 / np.sqrt(len(base)), 50)  # 1.96 standard errors of a share of 1/2
    shares = [50 - reach, 50, 50 + reach]
    return {
        name: np.percentile(seconds / base, shares).tolist()
        for name, seconds in times.items()
    }


def figures(run: Summary, compiling: Summary) -> dict[str, float]:
    """Returns what is told of a contender."""
    return {
        "run_ms": 1e3 * run.seconds,
        "run_ratio": run.ratio,
        "added_ms": 1e3 * run.added,
        "compile_s": compiling.seconds,
        "compile_ratio": compiling.ratio,
    }


def _seconds(
    work: Callable[[int], None], calls: int, clocks: Sequence[Callable[[], float]]
) -> list[float]:
    starts = [clock() for clock in clocks]
    work(calls)
    return [clock() - start for clock, start in zip(clocks, starts, strict=True)]
