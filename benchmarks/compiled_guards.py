"""What does a guard add to a step, as compiled for a machine that is not there?

Run:  python benchmarks/compiled_guards.py            # every compiler that is installed
      python benchmarks/compiled_guards.py --quick    # the small tree alone

The steps are those of `guards.py`, for one device of each kind. The figures are what
the compilers say, and have no noise:

  * kernels, and what they read. Those of a TPU's compiler count copies to and from its
    faster memory as well, which overlap with work.
  * copied: bytes that are copied in every step, over those of the gradients.
  * branches: on a GPU each of them is a wait for the host.
  * est. us and kcycles: how long a TPU would take.
"""

import argparse
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

import _compiled
import _timing
import guards
import overhead

Row = dict[str, Any]

RESULTS = pathlib.Path(__file__).parent / "results" / "compiled_guards.jsonl"
TARGETS = ("tpu-8", "h200-8", "cpu-8")
COLUMNS = ("tree", "optimizer", "guard", "kernels", "read MB", "copied", "branches")
COLUMNS += ("est. us", "kcycles")


def compile_all(name: str, tree: str, optimizer: str) -> dict[str, Row]:
    """Returns the figures of the step with the clip alone and within each guard."""
    target = _compiled.TARGETS[name]
    sharding = jax.sharding.SingleDeviceSharding(target.devices()[0])
    shapes = overhead.TREES[tree]()

    def abstract(function: Any, *args: Any) -> Any:
        return jax.tree.map(
            lambda x: x.update(sharding=sharding), jax.eval_shape(function, *args)
        )

    def zeros() -> Any:
        return jax.tree.map(jnp.zeros, shapes, is_leaf=lambda x: isinstance(x, tuple))

    grads, rows = abstract(zeros), {}
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(grads))
    for guard, tx in guards.guarded(optimizer).items():
        lower = functools.partial(
            overhead.make_step(tx).lower, grads, abstract(tx.init, grads), grads
        )
        compiled = _compiled.compile_for(target, lower)
        rows[guard] = figures(target, compiled)
        rows[guard]["copies"] = guards.bytes_of("copy", compiled) / size
    return rows


def figures(target: _compiled.Target, compiled: jax.stages.Compiled) -> Row:
    cost = _compiled.cost(target, compiled)
    program = _compiled.read(compiled.as_text() or "")
    kernels = [x for x in program if x.in_entry and x.kind not in _compiled.NO_KERNELS]
    return {
        "kernels": len(kernels),
        "bytes_read": sum(x.bytes for x in kernels),
        "conditionals": sum(x.kind == "conditional" for x in program),
        **{key: cost[key] for key in ("bytes_accessed", "estimate_us", "cycles")},
    }


def report(name: str, tree: str, optimizer: str) -> list[Row]:
    """Prints a line for each guard on one tree, and returns them as rows."""
    target, rows = _compiled.TARGETS[name], []
    common = guards.describe(tree, optimizer, "compiled_guards") | {
        "target": name,
        "target_device": target.device,
        "compiler": f"{target.compiler} {target.version()}",
    }
    for guard, row in compile_all(name, tree, optimizer).items():
        show(
            *(tree, optimizer, guard, row["kernels"]),
            round(row["bytes_read"] / 1e6, 2),
            round(row["copies"], 2),
            row["conditionals"],
            row["estimate_us"],
            row["cycles"] and round(row["cycles"] / 1e3),
        )
        rows.append(common | {"contender": guard} | row)
    return rows


def show(*cells: Any) -> None:
    form = "{:8}{:10}{:18}{:>8}{:>10}{:>8}{:>9}{:>8}{:>8}"
    print(form.format(*("-" if x is None else x for x in cells)), flush=True)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--platforms", nargs="+", choices=TARGETS, help="default: those installed")
    add("--trees", nargs="+", choices=overhead.TREES, default=list(overhead.TREES))
    add("--out", type=pathlib.Path, default=RESULTS)
    add("--quick", action="store_true", help="the small tree alone")
    args = parser.parse_args()
    args.platforms = _compiled.installed(args.platforms or TARGETS)
    if not args.platforms:
        parser.error("no compiler for any of these platforms")
    if args.quick:
        args.trees = ["lstm"]
    return args


def main() -> None:
    args = parse_args()
    _compiled.set_up(devices=1)
    machine = _timing.machine()
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    for name in args.platforms:
        print(f"\n{name}: one device")
        show(*COLUMNS)
        for tree in args.trees:
            for optimizer in guards.OPTIMIZERS:
                rows = report(name, tree, optimizer)
                _timing.append_rows(args.out, [machine | row for row in rows])


if __name__ == "__main__":
    main()
