"""How long do the textbooks' runs take in Keras, and how long here?

Run:  python benchmarks/against_keras.py            # some minutes
      python benchmarks/against_keras.py --quick    # does it run? less than a minute

The task is that of `studies/mlp_regression.py`: a small network on unscaled targets,
100 epochs of 16 steps. Keras runs on JAX, too. Every figure is of a process that starts
with nothing, the two in turn:

  * one run: a script that trains once with a global norm of 1, from its start to its
    end, imports told apart, and in seconds of the processor.
  * all runs: no clip and four clips from 24 seeds. Ours trains the 120 in one program,
    thresholds as an array; Keras trains one after the other, of which some are timed,
    and the rest is taken to last as long as their median. The time is that after the
    imports.

Nearly all of one run is imports and compiling, which are the floor: the arithmetic of
100 epochs takes a tenth of a second. To expect is less time than Keras takes for one
run, and some thirtieth for all.

Equal answers are equal distributions of the last MSE, for the two draw their parameters
and batches by themselves: printed are its quartiles, and how likely samples of one
distribution differ as much (Kolmogorov and Smirnov). It stops where that is too little.

Keras is in a package of its own. Without it, ours alone is timed.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np
import scipy.stats

import _results

Row = dict[str, Any]

SETTINGS = ("work", "clip", "contender")
SCRIPT = pathlib.Path(__file__).parent / "studies" / "_regression_runs.py"
OURS, KERAS = "optaxclip", "keras"
ONE, ALL, MSE = "one run", "all runs", "last MSE"
WAYS = {ONE: {OURS: "alone", KERAS: "keras"}, ALL: {OURS: "together", KERAS: "keras"}}
CLIP = "global norm 1"  # of the one run
CLIPS = ("no clip", CLIP, "norm 1 per leaf", "values within 5", "values within 0.5")
LEAST = 1e-4  # probability below which the answers are not equal


def start(way: str, *options: Any) -> Row:
    """Trains in a new process; returns what it printed, and the time that it took."""
    command = [sys.executable, SCRIPT, way, *options]
    # A cache on disk would make the second compilation look free.
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    processor, begin = _seconds_of_children(), time.perf_counter()
    done = subprocess.run(
        list(map(str, command)), env=environment, stdout=subprocess.PIPE, check=True
    )
    total, cpu = time.perf_counter() - begin, _seconds_of_children() - processor
    return json.loads(done.stdout) | {"total_s": total, "cpu_s": cpu}


def _seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def one_run(names: list[str], rounds: int, epochs: int) -> list[Row]:
    """Returns medians of the parts of one run, and of the ratios to Keras by round."""
    options = ("--clips", CLIP, "--epochs", epochs)
    runs: dict[str, list[Row]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            run = start(WAYS[ONE][name], *options)
            runs[name].append(run | {"train_s": run["train_s"][0]})
    rows = []
    for name, own in runs.items():
        row = {"work": ONE, "clip": CLIP, "contender": name, "rounds": rounds}
        for key in ("imports_s", "train_s", "total_s", "cpu_s"):
            row[key] = statistics.median(run[key] for run in own)
        if KERAS in runs:
            for key in ("total", "cpu"):
                row[f"{key}_ratio"] = statistics.median(
                    run[f"{key}_s"] / base[f"{key}_s"]
                    for run, base in zip(own, runs[KERAS], strict=True)
                )
        rows.append(row)
    return rows


def all_runs(names: list[str], seeds: dict[str, int], epochs: int) -> list[Row]:
    """Returns the time of all runs, and what comes of them."""
    count, rows, errors = len(CLIPS) * seeds[OURS], [], {}
    for name in names:
        options = ("--clips", *CLIPS, "--seeds", seeds[name], "--epochs", epochs)
        run = start(WAYS[ALL][name], *options)
        errors[name] = np.array(run["mse"])
        trainings = 1 if name == OURS else count
        row = {"work": ALL, "clip": "all", "contender": name, "runs": count}
        row |= {"timed": errors[name][..., 0].size}
        for key in ("train_s", "train_cpu_s"):
            row[key] = trainings * statistics.median(run[key])
        rows.append(row)
    for row in rows:
        if KERAS in names:  # the last
            row["total_ratio"] = row["train_s"] / rows[-1]["train_s"]
            row["cpu_ratio"] = row["train_cpu_s"] / rows[-1]["train_cpu_s"]
    return rows + compared(errors)


def compared(errors: dict[str, np.ndarray]) -> list[Row]:
    """Returns the quartiles of the last MSE for each clip and contender.

    Args:
      errors: of train and test, by contender, `[clips, seeds, 2]`.

    Raises:
      AssertionError: the MSE of two contenders are of different distributions.
    """
    rows = []
    for i, clip in enumerate(CLIPS):
        samples = {name: own[i] for name, own in errors.items()}
        likely = min(map(equally_distributed, *(x.T for x in samples.values())))
        if likely < LEAST:
            raise AssertionError(
                f"With {clip!r} the last MSE of {' and '.join(samples)} are of one"
                f" distribution with probability {likely:.1e} only: look at the clips."
            )
        for name, own in samples.items():
            finite = np.isfinite(own).all(axis=1)
            row = {"work": MSE, "clip": clip, "contender": name, "runs": len(own)}
            row |= {"not_finite": int((~finite).sum()), "probability": likely}
            if finite.any():
                quartiles = np.percentile(own[finite], [25, 50, 75], axis=0)
                row["train_mse"], row["test_mse"] = quartiles.T.tolist()
            rows.append(row)
    return rows


def equally_distributed(*samples: np.ndarray) -> float:
    """Returns how likely two samples of one distribution differ as much, 1 for one.

    What is not finite counts as larger than all else.
    """
    if len(samples) == 1:
        return 1.0
    first, second = (np.nan_to_num(sample, nan=np.inf) for sample in samples)
    found: Any = scipy.stats.ks_2samp(first, second)
    return float(found.pvalue)


def find_contenders() -> list[str]:
    """Returns whose runs are timed, and says how to get Keras where it is missing."""
    if importlib.util.find_spec("keras"):
        return [OURS, KERAS]
    print("Keras is left out, and no row kept: it is not there. To get it,")
    print("in an environment of its own:  pip install keras")
    return [OURS]


def show(rows: list[Row]) -> None:
    for row in rows:
        figures = {
            name: value
            for name, value in row.items()
            if name not in ("question", *SETTINGS)
        }
        cells = ", ".join(f"{name} {_short(value)}" for name, value in figures.items())
        print(f"{row['work']:9} {row['clip']:18}{row['contender']:10} {cells}")


def _short(value: Any) -> str:
    if isinstance(value, list):
        return "/".join(f"{x:.3g}" for x in value)
    return f"{value:.3g}"


def main() -> None:
    parser = _results.make_parser(__doc__, "a few epochs, without Keras if not there")
    parser.add_argument("--seeds", type=int, default=24, help="of ours, for each clip")
    parser.add_argument("--keras-seeds", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5, help="of one run")
    parser.add_argument("--epochs", type=int, default=100)
    args = _results.parse(parser)
    if args.quick:
        args.seeds, args.keras_seeds, args.rounds, args.epochs = 2, 1, 1, 2
    machine, names = _results.print_machine(), find_contenders()
    if KERAS in names:
        machine["keras"] = importlib.metadata.version("keras")
        print(f"keras {machine['keras']}")
    report(names, machine, args)


def report(names: list[str], machine: Row, args: argparse.Namespace) -> None:
    """Times one run and all runs, prints and keeps what came out."""
    seeds = {OURS: args.seeds, KERAS: args.keras_seeds}
    parts = (
        lambda: one_run(names, args.rounds, args.epochs),
        lambda: all_runs(names, seeds, args.epochs),
    )
    for part in parts:
        rows = [{"question": "against_keras"} | row for row in part()]
        show(rows)
        if KERAS in names:  # a row says what it was compared with
            rows = [machine | _results.rounded(row) for row in rows]
            _results.store(rows, SETTINGS, args.out)


if __name__ == "__main__":
    main()
