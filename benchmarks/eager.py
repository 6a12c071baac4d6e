"""What does a call of a clip cost where no `jit` is around it?

Run:  python benchmarks/eager.py            # some minutes
      python benchmarks/eager.py --quick    # does it run?

As in a notebook, a test or a debugger: `clip.update(updates, state, params)`, by Optax
and by us, with a state and, where a clip needs none, with None in its place. Both have
been seen to give the same updates before.

Optax runs a small program for each operation on each leaf. Ours is one program for all:
a fraction of Optax's time is to be expected, more of it for `clip`, which is one
operation a leaf. The floor is a program that negates every leaf: on small ones it is
all that a call costs. The first call compiles, which takes longer for one large program
than for a few small ones that leaves of one shape share: it is timed by itself.
"""

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import _results
import _timing
import _trees
import optaxclip

Tree = Any
Row = dict[str, Any]

SETTINGS = ("clip", "tree", "contender")
RTOL = 1e-5  # between Optax's float32 norms and ours
OPTAX, STATE, NONE, FLOOR = "optax", "optaxclip", "optaxclip, None", "one program"


def square(leaves: int) -> _trees.Shapes:
    return {f"w{i:03d}": (64, 64) for i in range(leaves)}


TREES: dict[str, Callable[[], _trees.Shapes]] = {
    "3": functools.partial(square, 3),
    "16": functools.partial(square, 16),
    "lstm": _trees.lstm,
    "148": functools.partial(square, 148),
}
# By our name: Optax's, and the arguments.
CLIPS: dict[str, tuple[str, tuple[float, ...]]] = {
    "clip": ("clip", (0.01,)),
    "clip_by_global_norm": ("clip_by_global_norm", (0.1,)),
    "clip_by_block_rms": ("clip_by_block_rms", (0.01,)),
    "adaptive_grad_clip": ("adaptive_grad_clip", (0.01,)),
    "normalize_by_update_norm": ("normalize_by_update_norm", (2.0,)),
    "zero_nonfinite": ("zero_nans", ()),
}
NORM = "global_norm"  # no clip, but the function


def calls(clip: str, updates: Tree, params: Tree) -> dict[str, Callable[[], Any]]:
    """Returns the calls that are timed; the first of what each returns is compared."""
    if clip == NORM:
        return {
            OPTAX: lambda: [optax.tree.norm(updates)],
            STATE: lambda: [optaxclip.global_norm(updates)],
        }
    name, arguments = CLIPS[clip]
    theirs = getattr(optax, name)(*arguments)
    ours = getattr(optaxclip, clip)(*arguments)
    found = {
        OPTAX: functools.partial(theirs.update, updates, theirs.init(params), params),
        STATE: functools.partial(ours.update, updates, ours.init(params), params),
    }
    if arguments:
        found[NONE] = functools.partial(ours.update, updates, None, params)
    return found


def first_seconds(call: Callable[[], Any]) -> float:
    """Returns how long a call takes that has to compile everything."""
    jax.clear_caches()
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def runner(call: Callable[[], Any]) -> Callable[[int], None]:
    """Returns a function that calls so many times, and waits for each."""

    def run(count: int) -> None:
        for _ in range(count):
            jax.block_until_ready(call())

    return run


def compare(clip: str, tree: str, rounds: int) -> dict[str, Row]:
    """Returns the times of a call, by contender."""
    shapes = TREES[tree]()
    updates = _trees.random_tree(shapes, seed=0)
    compared = calls(clip, updates, _trees.random_tree(shapes, seed=1))
    first = {name: first_seconds(call) for name, call in compared.items()}
    clipped = {name: call()[0] for name, call in compared.items()}
    _timing.assert_equal_answers(clipped, RTOL)
    negate = jax.jit(functools.partial(jax.tree.map, jnp.negative))
    compared[FLOOR] = functools.partial(negate, updates)
    first[FLOOR] = first_seconds(compared[FLOOR])
    runners = {name: runner(call) for name, call in compared.items()}
    for run in runners.values():
        run(2)  # the last to be compiled has forgotten all others
    times = _timing.summarize(_timing.interleave(runners, rounds), OPTAX)
    return {
        name: {
            "call_ms": 1e3 * x.seconds,
            "call_ratio": x.ratio,
            "first_s": first[name],
        }
        for name, x in times.items()
    }


def report(clip: str, args: argparse.Namespace) -> list[Row]:
    """Prints the table of a clip and returns its rows."""
    columns = ("tree", "leaves", "contender", "call ms", "ratio", "first call s")
    print("\n{}\n{:8}{:>7}  {:18}{:>9}{:>8}{:>14}".format(clip, *columns))
    rows = []
    for tree in args.trees:
        leaves = len(jax.tree.leaves(_trees.random_tree(TREES[tree](), 0)))
        common = {"question": "eager", "clip": clip, "tree": tree, "leaves": leaves}
        for name, row in compare(clip, tree, args.rounds).items():
            print(
                f"{tree:8}{leaves:7}  {name:18}{row['call_ms']:9.3f}"
                f"{row['call_ratio']:8.2f}{row['first_s']:14.2f}",
                flush=True,
            )
            rows.append(common | {"contender": name, "rounds": args.rounds} | row)
    return rows


def main() -> None:
    every = [*CLIPS, NORM]
    parser = _results.make_parser(__doc__, "two clips of three leaves alone")
    parser.add_argument("--clips", nargs="+", choices=every, default=every)
    parser.add_argument("--trees", nargs="+", choices=TREES, default=list(TREES))
    parser.add_argument("--rounds", type=int, default=31)
    args = _results.parse(parser)
    if args.quick:
        args.clips, args.trees, args.rounds = every[:2], ["3"], 5
    machine = _results.print_machine()
    for clip in args.clips:
        rows = [machine | _results.rounded(row) for row in report(clip, args)]
        _results.store(rows, SETTINGS, args.out)


if __name__ == "__main__":
    main()
