"""What does a guard add to a clipped training step?

Run:  python benchmarks/guards.py            # all guards on all trees, some minutes
      python benchmarks/guards.py --quick    # does it run? less than a minute

The step is a clip by the global norm, SGD with momentum (or Adam) and
`optax.apply_updates`, compiled, with the params and the optimizer's state donated. It
is timed as it is, then within each of our guards and within Optax's, after all have
been seen to give the same updates. Each is timed with two sets of arrays, made in turn
and then in reverse: of equal programs that of the later arrays may take a tenth longer.

A guard need not pass over memory once more: the sums that it asks for are those of the
clip, and what it selects from, the old state and the new one, the step reads and makes
anyway. What comes out of the optimizer is looked at before either is written over, in a
sample of each leaf that is computed beforehand, and element by element where the params
are written. So 1.00 is the floor, where the compiler sees all of this. Whether it does
shows in the compiled step, of which three columns count bytes over those of the
gradients; the first two leave out branches that are hardly ever taken:

  * sums: what goes into reductions. A norm takes 1.00; more says that the guard's sums
    were not the same to the compiler.
  * copies: what is copied. A guard needs the old state beside the new one, and the new
    one is to be written over the old one, which was donated. If the params come from
    the state that was selected, nothing needs the old one then.
  * temp: memory for what is neither argument nor result. More than with the clip alone
    says that a whole array is kept, for instance because all of it was looked at.

Optax's guard has the clip within a branch, and so no figures in the first two.
"""

import functools
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
from _steps import CLIP_ALONE, OPTAX_GUARD, OPTIMIZERS

Row = dict[str, Any]
Compiled = dict[str, jax.stages.Compiled]

SETTINGS = ("tree", "optimizer", "contender")
KINDS = {"sums": "reduce", "copies": "copy"}  # of instructions, by column
RTOL = 1e-5  # between two compilations of one sum


def compare(tree: str, optimizer: str, repeats: int, compiles: int) -> dict[str, Row]:
    """Returns the figures of the step with the clip alone and within each guard."""
    compiled, compile_times = compile_steps(tree, optimizer, compiles)
    times = run_in_pairs(compiled, tree, optimizer, repeats)
    run = _timing.summarize(times, CLIP_ALONE)
    compiling = _timing.summarize(compile_times, CLIP_ALONE)
    gradient_bytes = 4 * _trees.describe(tree)["elements"]
    return {
        name: _timing.figures(run[name], compiling[name])
        | {x: n / gradient_bytes for x, n in bytes_of(name, step).items()}
        for name, step in compiled.items()
    }


def draw(tree: str) -> tuple[Any, Any]:
    """Returns params and gradients."""
    shapes = _trees.TREES[tree]()
    grads = _trees.random_tree(shapes, seed=0)
    return _trees.random_tree(shapes, seed=1), grads


def compile_steps(
    tree: str, optimizer: str, compiles: int
) -> tuple[Compiled, _timing.Times]:
    params, grads = draw(tree)
    lowers = {
        name: functools.partial(
            _steps.jit_step(tx).lower, params, tx.init(params), grads
        )
        for name, tx in _steps.guarded(optimizer).items()
    }
    return _timing.compile_apart(lowers, compiles)


def run_in_pairs(
    compiled: Compiled, tree: str, optimizer: str, repeats: int
) -> _timing.Times:
    """Times each step on two sets of arrays, made in turn and then in reverse."""
    optimizers, names = _steps.guarded(optimizer), list(compiled)
    params, grads = draw(tree)
    turns = [(name, "there") for name in names]
    turns += [(name, "back") for name in reversed(names)]
    runners, updates = {}, {}
    for name, turn in turns:
        carry = jax.tree.map(jnp.copy, params), optimizers[name].init(params)
        carry = compiled[name](*carry, grads)
        if turn == "there":
            state = optax.tree.get(carry[1], OPTIMIZERS[optimizer][1])
            updates[name] = jax.tree.map(np.array, state)
        run = _steps.make_runner(compiled[name], carry, grads)
        runners[f"{name} {turn}"] = run
    _timing.assert_equal_answers(updates, RTOL)
    del updates, params
    times = _timing.interleave(runners, repeats)
    return {
        name: list(np.mean([times[f"{name} there"], times[f"{name} back"]], axis=0))
        for name in names
    }


def bytes_of(name: str, step: jax.stages.Compiled) -> dict[str, int]:
    """Returns what a step sums, copies and needs beside arguments and results."""
    analysis: Any = step.memory_analysis()
    counted = {
        column: _compiled.bytes_of(kind, step)
        for column, kind in KINDS.items()
        if name != OPTAX_GUARD
    }
    return counted | {"temp": analysis.temp_size_in_bytes}


def report(tree: str, optimizer: str, repeats: int, compiles: int) -> list[Row]:
    """Prints a line for each guard on one tree, and returns them as rows."""
    common = {"question": "guards", **_trees.describe(tree), "optimizer": optimizer}
    rounds = {"rounds": repeats, "compiles": compiles}
    rows = []
    for name, row in compare(tree, optimizer, repeats, compiles).items():
        counts = [f"{row[key]:.2f}" if key in row else "-" for key in KINDS]
        print(
            f"{tree:8}{common['leaves']:7}  {name:18}{row['run_ms']:10.3f}"
            f"{row['run_ratio']:8.3f}{row['added_ms']:11.3f}{counts[0]:>7}"
            f"{counts[1]:>8}{row['temp']:7.2f}"
            f"{row['compile_s']:11.2f}{row['compile_ratio']:8.2f}",
            flush=True,
        )
        rows.append(common | {"contender": name} | rounds | row)
    return rows


def main() -> None:
    optimizer = {"choices": OPTIMIZERS, "default": "momentum"}
    args = _timing.parse_args(__doc__, 61, ("--optimizer", optimizer))
    machine = _results.print_machine()
    print(f"{args.optimizer}, {args.repeats} rounds, medians")
    columns = ("tree", "leaves", "guard", "run ms", "ratio", "added ms", *KINDS, "temp")
    print("{:8}{:>7}  {:18}{:>10}{:>8}{:>11}{:>7}{:>8}{:>7}".format(*columns), end="")
    print("{:>11}{:>8}".format("compile s", "ratio"))
    for tree in args.trees:
        rows = report(tree, args.optimizer, args.repeats, args.compiles)
        rows = [machine | _results.rounded(row) for row in rows]
        _results.store(rows, SETTINGS, args.out)


if __name__ == "__main__":
    main()
