"""Trains the textbooks' regression in one of three ways, from the start of a process.

Run:  python benchmarks/studies/_regression_runs.py together --seeds 2

    keras       one run after the other, as in the textbooks
    alone       one run after the other, as a user of this library would write it
    together    all runs in one program of `_regression.py`, thresholds as an array

Prints one line of JSON: the seconds that the imports took, those of each training,
compiled from nothing, by the clock and of the processor, and the last MSE of each run
on both halves.
"""

import argparse
import importlib
import itertools
import json
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

Errors = Sequence[Sequence[Sequence[float]]]  # [clips][seeds], of train and test
Seconds = tuple[float, float]  # by the clock, and of the processor
Trained = tuple[list[Seconds], Errors]  # with the seconds of each training
Train = Callable[[Sequence[str], int, int], Trained]  # of clips, seeds, epochs


class Clip(NamedTuple):
    """One clip: as arguments of Keras' SGD, as our function, and as a `Setting`."""

    keras: dict[str, float]
    alone: dict[str, float]
    together: dict[str, float]


CLIPS = {
    "no clip": Clip({}, {}, {}),
    "global norm 1": Clip(
        {"global_clipnorm": 1.0}, {"clip_by_global_norm": 1.0}, {"max_norm": 1.0}
    ),
    "norm 1 per leaf": Clip(
        {"clipnorm": 1.0}, {"clip_by_leaf_norm": 1.0}, {"max_leaf_norm": 1.0}
    ),
    "values within 5": Clip({"clipvalue": 5.0}, {"clip": 5.0}, {"max_value": 5.0}),
    "values within 0.5": Clip({"clipvalue": 0.5}, {"clip": 0.5}, {"max_value": 0.5}),
}


def clocks() -> Seconds:
    return time.perf_counter(), time.process_time()


def since(start: Seconds) -> Seconds:
    clock, processor = clocks()
    return clock - start[0], processor - start[1]


def one_by_one(way: str, module: Any) -> Train:
    """Returns what trains clip after clip and seed after seed, and times each."""

    def train(names: Sequence[str], seeds: int, epochs: int) -> Trained:
        seconds, errors = [], []
        for name, seed in itertools.product(names, range(seeds)):
            start = clocks()
            clip = getattr(CLIPS[name], way)
            errors.append(module.train_once(clip, seed, epochs))
            seconds.append(since(start))
        return seconds, [errors[i : i + seeds] for i in range(0, len(errors), seeds)]

    return train


def together(module: Any, data: Any) -> Train:
    """Returns what trains all clips and seeds in one program, and times that."""

    def train(names: Sequence[str], seeds: int, epochs: int) -> Trained:
        start = clocks()
        settings = [module.Setting(**CLIPS[name].together) for name in names]
        found = module.train(settings, seeds, epochs, data.regression_data())
        last = [half[..., -1] for half in (found.train_mse, found.test_mse)]
        errors = [list(zip(*own, strict=True)) for own in zip(*last, strict=True)]
        return [since(start)], errors

    return train


def load(way: str) -> Train:
    """Imports what a way needs, and returns what trains like that."""
    if way == "together":
        names = "_regression", "_regression_data"
        return together(*map(importlib.import_module, names))
    return one_by_one(way, importlib.import_module(f"_regression_{way}"))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("way", choices=Clip._fields)
    parser.add_argument("--clips", nargs="+", choices=CLIPS, default=list(CLIPS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=100)
    args = parser.parse_args()
    start = clocks()
    train = load(args.way)
    imports, _ = since(start)
    seconds, errors = train(args.clips, args.seeds, args.epochs)
    clock, processor = zip(*seconds, strict=True)
    row = {"imports_s": imports, "train_s": clock, "train_cpu_s": processor}
    print(json.dumps(row | {"mse": errors}, default=float))


if __name__ == "__main__":
    main()
