"""What does a clip cost in a step, as compiled for a machine that is not there?

Run:  python benchmarks/compiled.py            # every compiler that is installed, hours
      python benchmarks/compiled.py --quick    # two clips on the small tree
      python benchmarks/compiled.py --platforms h200-8 --clips global_norm --trees lstm

The step is a clip, SGD with momentum and `optax.apply_updates` on one device, with the
params and the optimizer's state donated; guards and records are around the clip by the
global norm and the optimizer. It is compiled and read, not run: the figures are what
the compilers say, and have no noise. Each compiler comes in packages of its own: run
this once per environment, the rows add up.

  * kernels: what the step starts. Without a clip one for each leaf is the floor, and a
    norm takes one for each large leaf more, and few for all the small ones.
  * traffic: bytes that kernels read and write, over those of the gradients. Without a
    clip it is 5: gradients, momentum and params are read, the latter two written. A
    norm has to see all gradients before the first is scaled, so the floor is 6, and 7
    if it looks at the params as well; that of each clip is printed beside it. A TPU can
    be below: it keeps small trees on the chip.
  * temp: memory for what is neither argument nor result, likewise. 0 is the floor.
  * branches: on a GPU each of them is a wait for the host. What is in them is not
    counted: rescues are hardly ever taken. (On a CPU Optax's guard has its clip there.)
  * est. us and kcycles: how long a TPU would take.
"""

import argparse
import functools
import itertools
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

import _clips
import _compiled
import _results
import _steps
import _targets
import _trees
from _steps import OURS

Row = dict[str, Any]

SETTINGS = ("target", "tree", "dtype", "clip", "contender")
TARGETS = ("tpu-8", "h200-8", "cpu-8")
DTYPES = ("float32", "bfloat16")
COLUMNS = ("tree", "dtype", "clip", "contender", "kernels", "traffic", "floor", "temp")
COLUMNS += ("branches", "est. us", "kcycles", "compile s")
FORM = "{:8}{:10}{:23}{:11}{:>7}{:>9}{:>7}{:>7}{:>9}{:>9}{:>9}{:>11}"


@functools.cache
def figures(
    name: str, tree: str, dtype: str, optimizer: optax.GradientTransformation
) -> Row:
    """Returns the figures of one step."""
    start = time.perf_counter()
    found = on_one_device(name, _trees.TREES[tree](), dtype, optimizer)
    return found | {"compile_s": round(time.perf_counter() - start, 2)}


def on_one_device(
    name: str, shapes: Any, dtype: str, optimizer: optax.GradientTransformation
) -> Row:
    """Compiles a step of leaves of some shapes, and returns its figures."""
    target = _targets.TARGETS[name]
    sharding = jax.sharding.SingleDeviceSharding(target.devices()[0])

    def abstract(function: Any, *args: Any) -> Any:
        return jax.tree.map(
            lambda x: x.update(sharding=sharding), jax.eval_shape(function, *args)
        )

    zeros = functools.partial(jnp.zeros, dtype=dtype)
    grads = abstract(lambda: _trees.of_shapes(zeros, shapes))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(grads))
    state = abstract(optimizer.init, grads)
    compiled = _targets.compile_for(
        target, functools.partial(_steps.jit_step(optimizer).lower, grads, state, grads)
    )
    return _results.rounded(_compiled.cost(compiled, size))


def report(name: str, tree: str, dtype: str, clip: str) -> list[Row]:
    """Prints a line for each contender, and returns them as rows."""
    common = _targets.describe("compiled", name) | _trees.describe(tree)
    rows = []
    case = _clips.cases()[clip]
    for contender, optimizer in case.contenders().items():
        row = figures(name, tree, dtype, optimizer)
        _targets.show(
            *(FORM, tree, dtype, clip, contender, row["kernels"]),
            f"{row['traffic']:.2f}",
            case.passes if contender == OURS else None,
            f"{row['temporary']:.2f}",
            row["conditionals"],
            row["estimate_us"],
            row["cycles"] and round(row["cycles"] / 1e3),
            row["compile_s"],
        )
        own = {"dtype": dtype, "clip": clip, "contender": contender}
        rows.append(common | own | {"floor_traffic": case.passes} | row)
    return rows


def parse() -> argparse.Namespace:
    parser = _results.make_parser(__doc__, "two clips on the small tree")
    trees, clips = list(_trees.TREES), list(_clips.cases())
    parser.add_argument("--trees", nargs="+", choices=trees, default=trees)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--clips", nargs="+", choices=clips, help="default: all")
    args = _targets.parse(parser, TARGETS)
    if args.quick:
        args.trees, args.clips = ["lstm"], ["global_norm", "skip_if_nonfinite"]
    return args


def main() -> None:
    _targets.set_up(devices=1)
    args = parse()
    _results.print_machine()
    for name in args.platforms:
        print(f"\n{name}: one device")
        _targets.show(FORM, *COLUMNS)
        for tree, dtype in itertools.product(args.trees, args.dtypes):
            default = _clips.cases() if dtype == "float32" else _clips.MAIN
            for clip in args.clips or default:
                rows = report(name, tree, dtype, clip)
                _results.store(rows, SETTINGS, args.out)


if __name__ == "__main__":
    main()
