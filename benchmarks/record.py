"""What does `record` add to a clipped training step?

Run:  python benchmarks/record.py            # all trees, some minutes
      python benchmarks/record.py --quick    # does it run? less than a minute

The step is a clip, SGD with momentum and `optax.apply_updates`, compiled, with the
params and the optimizer's state donated. It is timed as it is, and within a record,
after all have been seen to give the same updates. By default a record measures the norm
of each leaf, which a clip of leaves measures anyway; a clip by the global norm measures
less, but of large leaves the same sums.

  * bytes: what the record itself takes, of any length of the run.
  * copied: bytes that are copied in every step, over those of the record. It is written
    in place, so 0 is right: a copy of the record would be 1.
  * compile: by the clock, and in seconds of the processor, which count no others.
"""

import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import _compiled
import _results
import _steps
import _timing
import _trees
import optaxclip
from _steps import CLIP_ALONE

Row = dict[str, Any]

SETTINGS = ("tree", "clip", "contender")
CLIPS = ("global_norm", "leaf_norm")
RTOL = 1e-6  # between two compilations of one step


def compare(tree: str, clip: str, repeats: int, compiles: int) -> dict[str, Row]:
    """Returns the figures of the step with the clip alone and within each record."""
    optimizers, shapes = _steps.recorded(clip), _trees.TREES[tree]()
    grads = _trees.random_tree(shapes, seed=0)
    params = _trees.random_tree(shapes, seed=1)
    carries = {
        name: (jax.tree.map(jnp.copy, params), optimizer.init(params))
        for name, optimizer in optimizers.items()
    }
    del params
    lowers = {
        name: functools.partial(_steps.jit_step(optimizer).lower, *carries[name], grads)
        for name, optimizer in optimizers.items()
    }
    compiled, compile_times = _timing.compile_apart(lowers, compiles)
    cpu = {name: processor_seconds(lower, compiles) for name, lower in lowers.items()}
    sizes = {name: memory_of(carry[1]) for name, carry in carries.items()}
    runners, updates = {}, {}
    for name, carry in carries.items():
        carry = compiled[name](*carry, grads)
        updates[name] = jax.tree.map(np.array, optax.tree.get(carry[1], "trace"))
        runners[name] = _steps.make_runner(compiled[name], carry, grads)
    _timing.assert_equal_answers(updates, RTOL)
    run = _timing.summarize(_timing.interleave(runners, repeats), CLIP_ALONE)
    compiling = _timing.summarize(compile_times, CLIP_ALONE)
    return {
        name: _timing.figures(run[name], compiling[name])
        | {"compile_cpu_s": cpu[name]}
        | {"compile_cpu_ratio": cpu[name] / cpu[CLIP_ALONE], "bytes": sizes[name]}
        | {"copied": copied(compiled[name], sizes[name])}
        for name in optimizers
    }


def processor_seconds(lower: Any, rounds: int) -> float:
    """Returns the time of all processors that it takes to trace and compile."""
    times = []
    for _ in range(rounds):
        jax.clear_caches()
        start = time.process_time()
        lower().compile()
        times.append(time.process_time() - start)
    return statistics.median(times)


def memory_of(state: Any) -> int:
    """Returns the bytes of a record, 0 if there is none."""
    is_record = isinstance(state, optaxclip.RecordState)
    own = state._replace(recorded_state=()) if is_record else ()
    return sum(x.nbytes for x in jax.tree.leaves(own))


def copied(step: jax.stages.Compiled, size: int) -> float:
    return _compiled.bytes_of("copy", step) / size if size else 0.0


def report(tree: str, clip: str, repeats: int, compiles: int) -> list[Row]:
    """Prints a line for each record on one tree, and returns them as rows."""
    common = {"question": "record", **_trees.describe(tree), "clip": clip}
    rounds = {"rounds": repeats, "compiles": compiles}
    rows = []
    for name, row in compare(tree, clip, repeats, compiles).items():
        print(
            f"{tree:8}{common['leaves']:7}  {clip:12} {name:20}{row['run_ms']:9.3f}"
            f"{row['run_ratio']:8.3f}{1e3 * row['added_ms']:10.1f}{row['bytes']:10}"
            f"{row['copied']:8.4f}{row['compile_s']:11.2f}{row['compile_ratio']:7.2f}"
            f"{row['compile_cpu_s']:8.2f}{row['compile_cpu_ratio']:7.2f}",
            flush=True,
        )
        rows.append(common | {"contender": name} | rounds | row)
    return rows


def main() -> None:
    clips = {"nargs": "+", "choices": CLIPS, "default": list(CLIPS)}
    args = _timing.parse_args(__doc__, 61, ("--clips", clips))
    machine = _results.print_machine()
    print(f"{args.repeats} rounds, medians")
    columns = ("tree", "leaves", "clip", "record", "run ms", "ratio", "added us")
    print("{:8}{:>7}  {:12} {:20}{:>9}{:>8}{:>10}".format(*columns), end="")
    columns = ("bytes", "copied", "compile s", "ratio", "cpu s", "ratio")
    print("{:>10}{:>8}{:>11}{:>7}{:>8}{:>7}".format(*columns))
    for tree in args.trees:
        for clip in args.clips:
            rows = report(tree, clip, args.repeats, args.compiles)
            rows = [machine | _results.rounded(row) for row in rows]
            _results.store(rows, SETTINGS, args.out)


if __name__ == "__main__":
    main()
