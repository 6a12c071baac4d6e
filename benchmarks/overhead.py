"""What does a clip add to a training step?

Run:  python benchmarks/overhead.py            # all clips on all trees, some minutes
      python benchmarks/overhead.py --quick    # does it run? less than a minute

The step is a clip, SGD with momentum and `optax.apply_updates`, compiled, with the
params and the optimizer's state donated. It is timed without a clip, with Optax's clip
and with ours, after both have been seen to give the same updates.

Without a clip the step passes over memory five times: it reads the gradients, the
momentum and the params, and writes the latter two. A norm has to see all gradients
before the first of them can be scaled: six passes. So 6/5 = 1.20 of the time is the
floor on trees much larger than the cache; on those that fit, a sixth pass costs less.
"""

import argparse
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import _results
import _steps
import _timing
import _trees
from _steps import CLIPS, NO_CLIP, OPTAX, OURS, PASSES

Row = dict[str, Any]

SETTINGS = ("clip", "tree", "contender")
RTOL = 1e-5  # between Optax's float32 norms and ours


def contenders(clip: _steps.Clip) -> dict[str, optax.GradientTransformation]:
    """Returns the optimizer without a clip, with Optax's, and with ours."""
    clips = {NO_CLIP: optax.identity(), OPTAX: clip.optax, OURS: clip.ours}
    return {
        name: _steps.with_momentum(transformation)
        for name, transformation in clips.items()
        if transformation is not None
    }


def compare(clip: str, tree: str, repeats: int, compiles: int) -> dict[str, Row]:
    """Returns the times of the step without a clip, with Optax's, and with ours."""
    optimizers, shapes = contenders(CLIPS[clip]), _trees.TREES[tree]()
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
    runners, clipped = {}, {}
    for name, carry in carries.items():
        carry = compiled[name](*carry, grads)
        # After its first step the momentum is what came out of the clip.
        if name != NO_CLIP:
            clipped[name] = jax.tree.map(np.array, optax.tree.get(carry[1], "trace"))
        runners[name] = _steps.make_runner(compiled[name], carry, grads)
    _timing.assert_equal_answers(clipped, RTOL)
    run = _timing.summarize(_timing.interleave(runners, repeats), NO_CLIP)
    compiling = _timing.summarize(compile_times, NO_CLIP)
    return {name: _timing.figures(run[name], compiling[name]) for name in runners}


def report(clip: str, args: argparse.Namespace) -> list[Row]:
    """Prints one table, clip against clip on each tree, and returns its rows."""
    floor = CLIPS[clip].passes / PASSES
    print(f"\n{clip}: {PASSES} passes over memory become {CLIPS[clip].passes}")
    print(f"floor x{floor:.2f}, {args.repeats} rounds, medians")
    columns = ("tree", "leaves", "clip", "run ms", "ratio", "added ms", "compile s")
    print("{:8}{:>7}  {:10}{:>10}{:>8}{:>11}{:>11}{:>8}".format(*columns, "ratio"))
    rows = []
    for tree in args.trees:
        common = {"question": "overhead", "clip": clip, **_trees.describe(tree)}
        settings = {
            "floor_ratio": floor,
            "rounds": args.repeats,
            "compiles": args.compiles,
        }
        for name, row in compare(clip, tree, args.repeats, args.compiles).items():
            print(
                f"{tree:8}{common['leaves']:7}  {name:10}{row['run_ms']:10.3f}"
                f"{row['run_ratio']:8.2f}{row['added_ms']:11.3f}"
                f"{row['compile_s']:11.2f}{row['compile_ratio']:8.2f}",
                flush=True,
            )
            rows.append(common | {"contender": name} | settings | row)
    return rows


def main() -> None:
    clips = {"nargs": "+", "choices": CLIPS, "default": list(CLIPS)}
    args = _timing.parse_args(__doc__, 31, ("--clips", clips))
    machine = _results.print_machine()
    for clip in args.clips:
        rows = [machine | _results.rounded(row) for row in report(clip, args)]
        _results.store(rows, SETTINGS, args.out)


if __name__ == "__main__":
    main()
