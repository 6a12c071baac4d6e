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

import argparse
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import _compiled
import _timing
import optaxclip
import overhead

Row = dict[str, Any]
Guard = Callable[[optax.GradientTransformation], optax.GradientTransformation]

RESULTS = pathlib.Path(__file__).parent / "results" / "guards.jsonl"
CLIP_ALONE = "clip alone"
GUARDS: dict[str, Guard] = {
    CLIP_ALONE: lambda inner: inner,
    "skip_if_nonfinite": optaxclip.skip_if_nonfinite,
    "skip_if_spike": optaxclip.skip_if_spike,
    "apply_if_finite": lambda inner: optax.apply_if_finite(inner, 10),
}
# With the state that is, after a first step, what came out of the clip.
OPTIMIZERS = {
    "momentum": (optax.sgd(0.01, momentum=0.9), "trace"),
    "adam": (optax.adam(0.01), "mu"),
}
KINDS = {"sums": "reduce", "copies": "copy"}  # of instructions, by column
RTOL = 1e-5  # between two compilations of one sum


def guarded(optimizer: str) -> dict[str, optax.GradientTransformation]:
    """Returns the optimizer with a clip, alone and within each guard."""
    inner = optax.chain(optaxclip.clip_by_global_norm(0.1), OPTIMIZERS[optimizer][0])
    return {name: guard(inner) for name, guard in GUARDS.items()}


def compare(
    shapes: overhead.Shapes, optimizer: str, repeats: int, compiles: int
) -> dict[str, Row]:
    """Returns the figures of the step with the clip alone and within each guard."""
    optimizers = guarded(optimizer)
    grads = overhead.random_tree(shapes, seed=0)
    params = overhead.random_tree(shapes, seed=1)
    compiled, compile_times = _timing.compile_apart(
        {
            name: functools.partial(
                overhead.make_step(tx).lower, params, tx.init(params), grads
            )
            for name, tx in optimizers.items()
        },
        compiles,
    )
    runners, updates = {}, {}
    names = list(optimizers)
    for name, turn in [(x, "there") for x in names] + [
        (x, "back") for x in names[::-1]
    ]:
        carry = jax.tree.map(jnp.copy, params), optimizers[name].init(params)
        carry = compiled[name](*carry, grads)
        if turn == "there":
            state = optax.tree.get(carry[1], OPTIMIZERS[optimizer][1])
            updates[name] = jax.tree.map(np.array, state)
        run = overhead.make_runner(compiled[name], carry, grads)
        runners[f"{name} {turn}"] = run
    _timing.assert_equal_answers(updates, RTOL)
    del updates, params
    times = _timing.interleave(runners, repeats)
    means = {
        name: [
            (one + other) / 2
            for one, other in zip(
                times[f"{name} there"], times[f"{name} back"], strict=True
            )
        ]
        for name in names
    }
    run = _timing.summarize(means, CLIP_ALONE)
    compiling = _timing.summarize(compile_times, CLIP_ALONE)
    gradient_bytes = sum(x.nbytes for x in jax.tree.leaves(grads))
    return {
        name: {
            "run_ms": 1e3 * run[name].seconds,
            "run_ratio": run[name].ratio,
            "added_ms": 1e3 * run[name].added,
            **{
                column: bytes_of(kind, compiled[name]) / gradient_bytes
                for column, kind in KINDS.items()
                if name != "apply_if_finite"
            },
            "temp": temporary_bytes(compiled[name]) / gradient_bytes,
            "compile_s": compiling[name].seconds,
            "compile_ratio": compiling[name].ratio,
        }
        for name in names
    }


def bytes_of(kind: str, compiled: jax.stages.Compiled) -> int:
    """Returns how many bytes one kind of instruction reads in every step."""
    program = _compiled.read(compiled.as_text() or "")
    return sum(x.bytes for x in program if x.kind == kind and not x.in_branch)


def temporary_bytes(compiled: jax.stages.Compiled) -> int:
    """Returns how much memory a step takes beside its arguments and results."""
    analysis: Any = compiled.memory_analysis()
    return analysis.temp_size_in_bytes


def describe(tree: str, optimizer: str, question: str = "guards") -> Row:
    """Returns what all rows of one tree have in common."""
    shapes = overhead.TREES[tree]()
    sizes = [
        int(np.prod(shape))
        for shape in jax.tree.leaves(shapes, is_leaf=lambda x: isinstance(x, tuple))
    ]
    return {
        "question": question,
        "tree": tree,
        "leaves": len(sizes),
        "elements": sum(sizes),
        "optimizer": optimizer,
    }


def report(tree: str, optimizer: str, repeats: int, compiles: int) -> list[Row]:
    """Prints a line for each guard on one tree, and returns them as rows."""
    common = describe(tree, optimizer)
    found = compare(overhead.TREES[tree](), optimizer, repeats, compiles)
    rows = []
    for name, row in found.items():
        counts = [f"{row[key]:.2f}" if key in row else "-" for key in KINDS]
        print(
            f"{tree:8}{common['leaves']:7}  {name:18}{row['run_ms']:10.3f}"
            f"{row['run_ratio']:8.3f}{row['added_ms']:11.3f}{counts[0]:>7}"
            f"{counts[1]:>8}{row['temp']:7.2f}"
            f"{row['compile_s']:11.2f}{row['compile_ratio']:8.2f}",
            flush=True,
        )
        rows.append(
            common
            | {
                "contender": name,
                "rounds": repeats,
                "compiles": compiles,
                **{key: float(f"{value:.5g}") for key, value in row.items()},
            }
        )
    return rows


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--trees", nargs="+", choices=overhead.TREES, default=list(overhead.TREES))
    add("--optimizer", choices=OPTIMIZERS, default="momentum")
    add("--repeats", type=int, default=61, help="rounds per tree")
    add("--compiles", type=int, default=3, help="times to compile")
    add("--out", type=pathlib.Path, default=RESULTS)
    add("--quick", action="store_true", help="the small tree alone")
    args = parser.parse_args()
    if args.repeats < 1 or args.compiles < 1:
        parser.error("--repeats and --compiles must be at least 1")
    if args.quick:
        args.trees, args.repeats, args.compiles = ["lstm"], 11, 1
    return args


def main() -> None:
    args = parse_args()
    # A cache on disk would make the second compilation look free.
    jax.config.update("jax_enable_compilation_cache", False)
    machine = _timing.machine()
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(f"{args.optimizer}, {args.repeats} rounds, medians")
    columns = ("tree", "leaves", "guard", "run ms", "ratio", "added ms", *KINDS, "temp")
    print("{:8}{:>7}  {:18}{:>10}{:>8}{:>11}{:>7}{:>8}{:>7}".format(*columns), end="")
    print("{:>11}{:>8}".format("compile s", "ratio"))
    for tree in args.trees:
        rows = report(tree, args.optimizer, args.repeats, args.compiles)
        _timing.append_rows(args.out, [machine | row for row in rows])


if __name__ == "__main__":
    main()
