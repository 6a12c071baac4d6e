"""How long do a clip and a step with it take in PyTorch, and how long here?

Run:  python benchmarks/against_torch.py            # all clips on all trees, minutes
      python benchmarks/against_torch.py --quick    # does it run? less than a minute

The same gradients of the same trees, on as many threads of the CPU, in turn, after both
have been compared with a clip in float64: `error` is the largest difference, over the
largest element of its leaf. Timed are the clip alone, and a clip,
SGD with momentum and its update of the params:

  * PyTorch: `clip_grad_norm_` and `clip_grad_value_` with `foreach=True`, which clip in
    place; SGD with `foreach=True`, and with `fused=True`.
  * Ours: the clip alone is compiled with the gradients donated, the step with the
    params and the optimizer's state.

The floor counts passes over memory. A clip of elements reads and writes each gradient
once: two passes; a norm needs one more before the first can be scaled: three. A step
reads gradients, momentum and params and writes the latter two, and clips in passing:
five, and six with a norm. The column GB/s is that floor over the time, so more is
better, and what the memory can do is the end of it; trees that fit into the cache are
beyond that. PyTorch runs its operations one after the other, each over all leaves. To
expect is less time than it takes on large leaves, and more on a thousand small ones,
which JAX takes longer to hand over. Its norm of GPT-2 is 8.5e-4 too small: it adds up
the squares of a leaf in float32, one after the other.

Where other work keeps the machine busy, take one thread, and the seconds of the
processor: several threads wait for the last of them, which may not be running.

PyTorch is in a package of its own. Without it, ours alone is timed.
"""

import argparse
import importlib
import importlib.util
import itertools
import math
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import _results
import _steps
import _timing
import _trees
from _steps import CLIPS, OURS, PASSES

Row = dict[str, Any]
Tree = Any
Runner = Callable[[int], None]

SETTINGS = ("clip", "tree", "work", "threads", "contender")
COLUMNS = ("clip", "tree", "leaves", "what", "")
COLUMNS += ("ms", "ratio", "GB/s", "cpu ms", "ratio", "error")
VERSION = "2.13.0"
FOREACH, FUSED = "torch foreach", "torch fused"
ALONE, STEP = "clip alone", "step"
MAX_NORM, MAX_VALUE = 0.1, 0.01  # those of `_steps.CLIPS`
RATE, MOMENTUM = 0.01, 0.9
RTOL = 1e-6  # of ours to a float64 norm
TORCH_RTOL = 2e-3  # of PyTorch's, which adds up a large leaf in float32 as it comes
REST = 0.005  # seconds after which the threads of one library no longer wait for work


class Case(NamedTuple):
    """A clip, and the passes over memory that it needs alone and within a step."""

    ours: optax.GradientTransformation
    alone: int
    step: int


CASES = {
    "none": Case(optax.identity(), 0, PASSES),
    "global_norm": Case(CLIPS["global_norm"].ours, 3, PASSES + 1),
    "value": Case(CLIPS["value"].ours, 2, PASSES),
}


def find_torch() -> Any:
    """Returns PyTorch, or None where there is none, and says how to get it."""
    if importlib.util.find_spec("torch"):
        return importlib.import_module("torch")
    print("PyTorch is left out, and no row kept: it is not there. To get it,")
    print(f"in an environment of its own:  pip install torch=={VERSION}")
    return None


def ours(name: str, work: str, params: Tree, grads: Tree) -> tuple[Runner, Tree]:
    """Returns a runner of our clip or step, and what came out of its first clip."""
    clip = CASES[name].ours
    if work == ALONE:
        step = jax.jit(lambda *carry: clip.update(*carry[:2]), donate_argnums=(0, 1))
        carry = jax.tree.map(jnp.copy, grads), clip.init(params)
    else:
        optimizer = optax.chain(clip, optax.sgd(RATE, MOMENTUM))
        step = _steps.jit_step(optimizer)
        carry = jax.tree.map(jnp.copy, params), optimizer.init(params)
    compiled = step.lower(*carry, grads).compile()
    carry = compiled(*carry, grads)
    # After its first step the momentum is what came out of the clip.
    clipped = carry[0] if work == ALONE else optax.tree.get(carry[1], "trace")
    clipped = jax.tree.map(np.array, clipped)
    return _steps.make_runner(compiled, carry, grads), clipped


def theirs(
    torch: Any, name: str, work: str, params: Tree, grads: Tree, **form: bool
) -> tuple[Runner, Tree]:
    """Returns a runner of PyTorch's clip or step, and what came out of its first clip.

    Args:
      torch: the package.
      name: of the clip.
      work: what is timed.
      params: tree of arrays.
      grads: tree of arrays.
      **form: which form of SGD.
    """
    leaves = [torch.from_numpy(np.array(leaf)) for leaf in jax.tree.leaves(params)]
    for leaf, grad in zip(leaves, jax.tree.leaves(grads), strict=True):
        leaf.requires_grad_().grad = torch.from_numpy(np.array(grad))
    utils, optimizer = torch.nn.utils, torch.optim.SGD(leaves, RATE, MOMENTUM, **form)

    def clip() -> None:
        if name == "global_norm":
            utils.clip_grad_norm_(leaves, MAX_NORM, foreach=True)
        elif name == "value":
            utils.clip_grad_value_(leaves, MAX_VALUE, foreach=True)

    def run(calls: int) -> None:
        for _ in range(calls):
            clip()
            if work == STEP:
                optimizer.step()

    run(1)
    if work == ALONE:
        clipped = [leaf.grad for leaf in leaves]
    else:
        clipped = [optimizer.state[leaf]["momentum_buffer"] for leaf in leaves]
    clipped = [leaf.numpy(force=True).copy() for leaf in clipped]
    return run, jax.tree.unflatten(jax.tree.structure(params), clipped)


def in_float64(name: str, grads: Tree) -> Tree:
    """Returns what a clip should give, by NumPy."""
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), grads)
    if name == "value":
        return jax.tree.map(lambda leaf: leaf.clip(-MAX_VALUE, MAX_VALUE), exact)
    norm = math.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(exact)))
    factor = min(1.0, MAX_NORM / norm) if name == "global_norm" else 1.0
    return jax.tree.map(lambda leaf: factor * leaf, exact)


def compare(
    torch: Any, name: str, work: str, tree: str, repeats: int
) -> dict[str, Row]:
    """Returns the times and errors of ours and, if it is there, of PyTorch's."""
    shapes = _trees.TREES[tree]()
    params, grads = (_trees.random_tree(shapes, seed) for seed in (1, 0))
    found = {OURS: ours(name, work, params, grads)}
    if torch:
        forms = {FOREACH: "foreach"} | ({FUSED: "fused"} if work == STEP else {})
        for contender, form in forms.items():
            found[contender] = theirs(torch, name, work, params, grads, **{form: True})
    exact, errors = in_float64(name, grads), {}
    for contender, (_, clipped) in found.items():
        pair = {"float64": exact, contender: clipped}
        rtol = RTOL if contender == OURS else TORCH_RTOL
        errors[contender] = _timing.assert_equal_answers(pair, rtol)
    runners = {contender: run for contender, (run, _) in found.items()}
    del found, params, grads, exact
    passes = CASES[name].alone if work == ALONE else CASES[name].step
    floor = passes * 4 * _trees.describe(tree)["elements"]  # bytes
    rows = {name: {"floor_bytes": floor, "error": x} for name, x in errors.items()}
    clocks = {"run": time.perf_counter, "cpu": time.process_time}
    times = _timing.interleave_on(runners, repeats, list(clocks.values()), REST)
    for clock, own in zip(clocks, times, strict=True):
        for contender, summary in _timing.summarize(own, OURS).items():
            rows[contender][f"{clock}_ms"] = 1e3 * summary.seconds
            rows[contender][f"{clock}_ratio"] = summary.ratio
    return rows


def use_threads(torch: Any, threads: int) -> None:
    """Lets both libraries use so many; to be called before JAX looks for devices."""
    if threads < (os.cpu_count() or 1):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    if torch:
        torch.set_num_threads(threads)


def report(torch: Any, name: str, args: argparse.Namespace) -> list[Row]:
    """Prints the lines of one clip, and returns them as rows."""
    rows: list[Row] = []
    works = [work for work in (ALONE, STEP) if work == STEP or CASES[name].alone]
    for tree, work in itertools.product(args.trees, works):
        common = {"question": "against_torch", "clip": name, **_trees.describe(tree)}
        common |= {"work": work, "threads": args.threads, "rounds": args.repeats}
        common |= {"torch": torch.__version__} if torch else {}
        for contender, row in compare(torch, name, work, tree, args.repeats).items():
            row["gb_per_s"] = row["floor_bytes"] / row["run_ms"] / 1e6
            print(
                f"{name:12}{tree:8}{common['leaves']:7}  {work:12}{contender:14}"
                f"{row['run_ms']:10.3f}{row['run_ratio']:8.2f}{row['gb_per_s']:8.1f}"
                f"{row['cpu_ms']:10.3f}{row['cpu_ratio']:8.2f}{row['error']:10.1e}",
                flush=True,
            )
            rows.append(common | {"contender": contender} | row)
    return rows


def main() -> None:
    clips = {"nargs": "+", "choices": CASES, "default": list(CASES)}
    threads = {"type": int, "default": os.cpu_count(), "help": "of each library"}
    args = _timing.parse_args(__doc__, 31, ("--clips", clips), ("--threads", threads))
    torch = find_torch()
    use_threads(torch, args.threads)
    jax.config.update("jax_platforms", "cpu")
    machine = _results.print_machine()
    if torch:
        print(f"torch {torch.__version__}, {args.threads} threads")
    else:
        args.out = None  # a row says what it was compared with
    print(f"{args.repeats} rounds, medians; ratio to ours; GB/s of the floor")
    print("{:12}{:8}{:>7}  {:12}{:14}".format(*COLUMNS[:5]), end="")
    print("{:>10}{:>8}{:>8}{:>10}{:>8}{:>10}".format(*COLUMNS[5:]))
    for name in args.clips:
        rows = [machine | _results.rounded(row) for row in report(torch, name, args)]
        _results.store(rows, SETTINGS, args.out)


if __name__ == "__main__":
    main()
