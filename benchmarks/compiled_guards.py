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

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import _compiled
import _results
import _steps
import _targets
import _trees

Row = dict[str, Any]

SETTINGS = ("target", "tree", "optimizer", "contender")
TARGETS = ("tpu-8", "h200-8", "cpu-8")
COLUMNS = ("tree", "optimizer", "guard", "kernels", "read MB", "copied", "branches")
COLUMNS += ("est. us", "kcycles")
FORM = "{:8}{:10}{:18}{:>8}{:>10}{:>8}{:>9}{:>8}{:>8}"


def compile_all(name: str, tree: str, optimizers: Mapping[str, Any]) -> dict[str, Row]:
    """Returns the figures of the step with each of some optimizers."""
    target = _targets.TARGETS[name]
    sharding = jax.sharding.SingleDeviceSharding(target.devices()[0])
    shapes = _trees.TREES[tree]()

    def abstract(function: Any, *args: Any) -> Any:
        return jax.tree.map(
            lambda x: x.update(sharding=sharding), jax.eval_shape(function, *args)
        )

    grads, rows = abstract(lambda: _trees.of_shapes(jnp.zeros, shapes)), {}
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(grads))
    for contender, tx in optimizers.items():
        lower = functools.partial(
            _steps.jit_step(tx).lower, grads, abstract(tx.init, grads), grads
        )
        compiled = _targets.compile_for(target, lower)
        rows[contender] = figures(target, compiled)
        rows[contender]["copies"] = _compiled.bytes_of("copy", compiled) / size
    return rows


def figures(target: _targets.Target, compiled: jax.stages.Compiled) -> Row:
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
    common = _targets.describe("compiled_guards", name)
    common |= _trees.describe(tree) | {"optimizer": optimizer}
    rows = []
    for guard, row in compile_all(name, tree, _steps.guarded(optimizer)).items():
        _targets.show(
            *(FORM, tree, optimizer, guard, row["kernels"]),
            round(row["bytes_read"] / 1e6, 2),
            round(row["copies"], 2),
            row["conditionals"],
            row["estimate_us"],
            row["cycles"] and round(row["cycles"] / 1e3),
        )
        rows.append(common | {"contender": guard} | row)
    return rows


def run(
    doc: str | None,
    head: Sequence[str],
    cases: Iterable[str],
    report: Callable[[str, str, str], list[Row]],
    settings: Sequence[str],
) -> None:
    """Reports every case on every tree, for each target that can be compiled for.

    Args:
      doc: docstring of the benchmark.
      head: form and columns of its table.
      cases: such as optimizers.
      report: function from target, tree and case to rows, which prints them.
      settings: columns that tell rows apart.
    """
    parser = _results.make_parser(doc, "the small tree alone")
    trees = list(_trees.TREES)
    parser.add_argument("--trees", nargs="+", choices=trees, default=trees)
    args = _targets.parse(parser, TARGETS)
    if args.quick:
        args.trees = ["lstm"]
    _targets.set_up(devices=1)
    _results.print_machine()
    for name in args.platforms:
        print(f"\n{name}: one device")
        _targets.show(*head)
        for tree, case in itertools.product(args.trees, cases):
            _results.store(report(name, tree, case), settings, args.out)


if __name__ == "__main__":
    run(__doc__, (FORM, *COLUMNS), _steps.OPTIMIZERS, report, SETTINGS)
