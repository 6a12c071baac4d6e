"""What does it cost to look at the statistics of every step?

Run:  python benchmarks/looking_cost.py            # half a minute
      python benchmarks/looking_cost.py --quick    # does it run?

The step is a clip of each leaf, SGD with momentum and `optax.apply_updates`, compiled.
It is timed as it is and with `summary(opt_state, params)` among what it returns.
Outside of `jit`, `summary` and reading all of its numbers are timed together.

The floor is 1: the clip computes these numbers anyway. Returned, they are another copy
of a few vectors, whatever the number of leaves.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import _results
import _steps
import _timing
import optaxclip

Row = dict[str, Any]

SETTINGS = ("leaves",)
COMPILES = 3
RTOL = 1e-6  # between two compilations of one step
WITHOUT, WITH = "without", "with summary"


def make_params(leaves: int) -> dict[str, jax.Array]:
    return {f"layer_{i:03d}": jnp.ones((64, 64)) for i in range(leaves)}


def make_steps(optimizer: Any) -> dict[str, Any]:
    """Returns the step as it is, and one that returns its statistics too."""
    step = _steps.make_step(optimizer)

    def watched(params, opt_state, grads):
        params, opt_state = step(params, opt_state, grads)
        return params, opt_state, optaxclip.summary(opt_state, params)

    return {WITHOUT: jax.jit(step), WITH: jax.jit(watched)}


def make_runner(step: Any, *args: Any) -> Callable[[int], None]:
    """Returns a function that takes the same step so many times, and waits for each."""

    def run(calls: int) -> None:
        for _ in range(calls):
            jax.block_until_ready(step(*args))

    return run


def seconds_of(work: Callable[[], Any], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def compare(leaves: int, rounds: int) -> Row:
    """Returns the figures for a tree of so many leaves."""
    params = make_params(leaves)
    optimizer = _steps.with_momentum(optaxclip.clip_by_leaf_norm(0.1))
    args = params, optimizer.init(params), params
    lowers = {
        name: lambda s=step: s.lower(*args)
        for name, step in make_steps(optimizer).items()
    }
    compiled, compile_times = _timing.compile_apart(lowers, COMPILES)
    first = {name: step(*args)[0] for name, step in compiled.items()}
    _timing.assert_equal_answers(first, RTOL)
    runners = {name: make_runner(step, *args) for name, step in compiled.items()}
    run = _timing.summarize(_timing.interleave(runners, rounds), WITHOUT)
    compiling = _timing.summarize(compile_times, WITHOUT)
    _, state, seen = compiled[WITH](*args)
    eager = seconds_of(lambda: list(optaxclip.summary(state, params).items()), rounds)
    return {
        "question": "looking_cost",
        "leaves": leaves,
        "rounds": rounds,
        "statistics": len(seen),
        "run_ms": 1e3 * run[WITHOUT].seconds,
        "run_ratio": run[WITH].ratio,
        "compile_s": compiling[WITHOUT].seconds,
        "compile_ratio": compiling[WITH].ratio,
        "eager_ms": 1e3 * eager,
    }


def main() -> None:
    parser = _results.make_parser(__doc__, "four leaves alone")
    parser.add_argument("--leaves", type=int, nargs="+", default=[4, 150, 1000])
    parser.add_argument("--rounds", type=int, default=31)
    args = _results.parse(parser)
    if args.quick:
        args.leaves, args.rounds = [4], 5
    machine = _results.print_machine()
    columns = ("leaves", "run ms", "ratio", "compile s", "ratio", "eager ms")
    print(("{:>11}" * len(columns)).format(*columns))
    for leaves in args.leaves:
        row = compare(leaves, args.rounds)
        cells = [row[key] for key in ("run_ms", "run_ratio", "compile_s")]
        cells += [row["compile_ratio"], row["eager_ms"]]
        print(f"{leaves:11}" + "".join(f"{x:11.3f}" for x in cells), flush=True)
        _results.store([machine | _results.rounded(row)], SETTINGS, args.out)


if __name__ == "__main__":
    main()
