"""How long does a step with a clip take to compile, by the number of leaves?

Run:  python benchmarks/compile_time.py            # all counts, half an hour
      python benchmarks/compile_time.py --quick    # ten leaves, a few seconds

The step is a clip, SGD with momentum and `optax.apply_updates`, on leaves of about 1000
elements, ten to a layer: vectors, and in every tenth leaf a matrix. It is traced,
lowered and compiled from nothing, without a clip, with Optax's and with ours, in turn.
Each part is timed by the clock, and the whole in seconds of the processor, too, which
count no others; of several turns the medians are told, and of ratios that within a
turn.

No clip is the floor. To expect is a time in proportion to the leaves at best: each
leaf has a kernel of its own that scales and applies it, and a norm or a part in one.
What would take longer than `--limit` is left out, and said to be.
"""

import argparse
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import _results
import _steps
import _trees
from _steps import CLIPS, NO_CLIP, OPTAX
from overhead import contenders

Row = dict[str, Any]
Times = dict[str, list[dict[str, float]]]  # one entry per turn, by contender

SETTINGS = ("clip", "leaves", "contender")
COUNTS = (10, 30, 100, 300, 1000, 3000, 5000)
PARTS = ("trace_s", "lower_s", "compile_s")
DROP_INS = [name for name, clip in CLIPS.items() if clip.optax is not None]
ONCE = 30.0  # seconds of a turn from which on one has to do


def shapes(leaves: int) -> _trees.Shapes:
    """Returns so many shapes of about 1000 elements, ten to a layer."""
    layers: _trees.Shapes = {}
    for i in range(leaves):
        shape = (32, 32) if i % 10 == 0 else (1000,)
        layers.setdefault(f"layer_{i // 10:03}", {})[f"w{i % 10}"] = shape
    return layers


def compile_parts(step: jax.stages.Wrapped, args: tuple[Any, ...]) -> dict[str, float]:
    """Traces, lowers and compiles a step from nothing; returns the seconds of each."""
    jax.clear_caches()
    processor, clock = time.process_time(), [time.perf_counter()]
    traced = step.trace(*args)
    clock.append(time.perf_counter())
    lowered = traced.lower()
    clock.append(time.perf_counter())
    lowered.compile()
    clock.append(time.perf_counter())
    parts = dict(zip(PARTS, np.diff(clock).tolist(), strict=True))
    whole = {"total_s": clock[-1] - clock[0], "cpu_s": time.process_time() - processor}
    return parts | whole


def time_in_turns(clip: str, leaves: int, compiles: int) -> Times:
    """Compiles every contender once per turn; one turn has to do where it is long."""
    params = jax.eval_shape(lambda: _trees.of_shapes(jnp.zeros, shapes(leaves)))
    optimizers = contenders(CLIPS[clip])
    args = {
        name: (params, jax.eval_shape(optimizer.init, params), params)
        for name, optimizer in optimizers.items()
    }
    times: Times = {name: [] for name in optimizers}
    start = time.perf_counter()
    for _ in range(compiles):
        for name, optimizer in optimizers.items():
            step = _steps.jit_step(optimizer)
            times[name].append(compile_parts(step, args[name]))
        if time.perf_counter() - start > ONCE:
            break
    return times


def summarize(times: Times) -> dict[str, Row]:
    """Returns medians of the seconds, and of the ratios to Optax by turn."""
    return {
        name: {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
        | {
            f"{key}_ratio": statistics.median(
                own[f"{key}_s"] / base[f"{key}_s"]
                for own, base in zip(turns, times[OPTAX], strict=True)
            )
            for key in ("total", "cpu")
        }
        | {"compiles": len(turns)}
        for name, turns in times.items()
    }


def report(clip: str, leaves: int, compiles: int) -> list[Row]:
    """Prints a line for each contender, and returns them as rows."""
    common = {"question": "compile_time", "clip": clip, "leaves": leaves}
    rows = []
    for name, row in summarize(time_in_turns(clip, leaves, compiles)).items():
        seconds = (*(row[part] for part in PARTS), row["total_s"], row["cpu_s"])
        print(
            f"{clip:12}{leaves:7}  {name:10}",
            *(f"{x:8.2f}" for x in (*seconds, row["total_ratio"], row["cpu_ratio"])),
            flush=True,
        )
        rows.append(common | {"contender": name} | row)
    return rows


def run(clip: str, args: argparse.Namespace, machine: Row) -> None:
    """Reports one clip, from few leaves to many, as far as the limit allows."""
    time_in_turns(clip, leaves=1, compiles=1)  # what a process does once, it has done
    seconds, last = 0.0, 1
    for leaves in sorted(args.leaves):
        guess = seconds * leaves / last  # or longer
        if guess > args.limit:
            print(f"{clip:12}{leaves:7}  left out: a turn takes {guess:.0f} s or more")
            continue
        rows = report(clip, leaves, args.compiles)
        seconds, last = sum(row["total_s"] for row in rows), leaves
        rows = [machine | _results.rounded(row) for row in rows]
        _results.store(rows, SETTINGS, args.out)


def main() -> None:
    parser = _results.make_parser(__doc__, "ten leaves, once")
    clips = {"nargs": "+", "choices": DROP_INS, "default": DROP_INS}
    parser.add_argument("--clips", **clips)
    parser.add_argument("--leaves", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--compiles", type=int, default=3, help="times to compile")
    text = "seconds of a turn beyond which a number of leaves is left out, default 240"
    parser.add_argument("--limit", type=float, default=240.0, help=text)
    args = _results.parse(parser)
    if args.quick:
        args.leaves, args.compiles = [10], 1
    # A cache on disk would make the second compilation look free.
    jax.config.update("jax_enable_compilation_cache", False)
    machine = _results.print_machine()
    print(f"seconds, and those of {NO_CLIP}, {OPTAX} and ours over those of {OPTAX}")
    columns = ("trace", "lower", "compile", "total", "cpu", "ratio", "of cpu")
    print(f"{'clip':12}{'leaves':>7}  {'':10}", *(f"{x:>8}" for x in columns))
    for clip in args.clips:
        run(clip, args, machine)


if __name__ == "__main__":
    main()
