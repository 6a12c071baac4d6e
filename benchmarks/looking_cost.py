"""What does it cost to look at the statistics of every step?

Run:  python benchmarks/looking_cost.py            # half a minute
      python benchmarks/looking_cost.py --quick    # does it run?

The step is a clip of each leaf, SGD with momentum and `optax.apply_updates`, compiled.
It is timed as it is and with `summary(opt_state, params)` among what it returns.
Outside of `jit`, `summary` and reading all of its numbers are timed together.

The floor is 1: the clip computes these numbers anyway. Returned, they are another copy
of a few vectors, whatever the number of leaves.
"""

import argparse
import pathlib
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

import _timing
import optaxclip

RESULTS = pathlib.Path(__file__).parent / "results" / "looking_cost.jsonl"
WITHOUT, WITH = "without", "with summary"


def make_params(leaves: int) -> dict[str, jax.Array]:
    return {f"layer_{i:03d}": jnp.ones((64, 64)) for i in range(leaves)}


def make_steps(optimizer: Any) -> dict[str, Any]:
    """Returns the step as it is, and one that returns its statistics too."""

    def step(params, opt_state, grads):
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    def watched(params, opt_state, grads):
        params, opt_state = step(params, opt_state, grads)
        return params, opt_state, optaxclip.summary(opt_state, params)

    return {WITHOUT: jax.jit(step), WITH: jax.jit(watched)}


def seconds_of(work: Any, rounds: int) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def compare(leaves: int, rounds: int) -> dict[str, Any]:
    """Returns the figures for a tree of so many leaves."""
    params = make_params(leaves)
    optimizer = optax.chain(
        optaxclip.clip_by_leaf_norm(0.1), optax.sgd(0.01, momentum=0.9)
    )
    state = optimizer.init(params)
    steps = make_steps(optimizer)
    compiled, compile_times = _timing.compile_apart(
        {
            name: lambda s=step: s.lower(params, state, params)
            for name, step in steps.items()
        },
        3,
    )
    first = {name: step(params, state, params)[0] for name, step in compiled.items()}
    _timing.assert_equal_answers(first, 1e-6)

    def runner(step):
        def run(calls):
            for _ in range(calls):
                jax.block_until_ready(step(params, state, params))

        return run

    times = _timing.interleave({x: runner(s) for x, s in compiled.items()}, rounds)
    run = _timing.summarize(times, WITHOUT)
    compiling = _timing.summarize(compile_times, WITHOUT)
    _, state, seen = compiled[WITH](params, state, params)
    return {
        "leaves": leaves,
        "rounds": rounds,
        "statistics": len(seen),
        "run_ms": 1e3 * run[WITHOUT].seconds,
        "run_ratio": run[WITH].ratio,
        "compile_s": compiling[WITHOUT].seconds,
        "compile_ratio": compiling[WITH].ratio,
        "eager_ms": 1e3
        * seconds_of(lambda: list(optaxclip.summary(state, params).items()), rounds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--leaves", type=int, nargs="+", default=[4, 150, 1000])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--label", default="", help="what the rows are of")
    parser.add_argument("--quick", action="store_true", help="four leaves alone")
    args = parser.parse_args()
    if args.quick:
        args.leaves, args.rounds = [4], 5
    jax.config.update("jax_enable_compilation_cache", False)
    machine = _timing.machine()
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    columns = ("leaves", "run ms", "ratio", "compile s", "ratio", "eager ms")
    print(("{:>11}" * len(columns)).format(*columns))
    for leaves in args.leaves:
        row = compare(leaves, args.rounds)
        cells = [row[key] for key in ("run_ms", "run_ratio", "compile_s")]
        cells += [row["compile_ratio"], row["eager_ms"]]
        print(f"{leaves:11}" + "".join(f"{x:11.3f}" for x in cells), flush=True)
        rounded = {
            key: float(f"{x:.5g}") if isinstance(x, float) else x
            for key, x in row.items()
        }
        _timing.append_rows(args.out, [machine | {"label": args.label} | rounded])


if __name__ == "__main__":
    main()
