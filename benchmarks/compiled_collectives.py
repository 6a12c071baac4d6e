"""What does a clip add to a sharded training step: collectives, bytes, time?

Run:  python benchmarks/compiled_collectives.py           # with all compilers installed
      python benchmarks/compiled_collectives.py --quick   # does it run? one layer only

GPT-2 small on a mesh (fsdp, tensor), compiled for machines that are not there and read,
not run: the compilers for TPU and GPU work on a CPU, and their figures have no noise.
Each comes in packages of its own: run this once per environment, the rows add up.

The step is a clip, SGD with momentum and `optax.apply_updates`; params, gradients and
momentum are split alike and come from outside, so every collective is the clip's. Four
forms: under `jit`, where the compiler inserts the collectives; the same on explicit
mesh axes, and with the specs given to `over_axes`, where the clip does that itself; and
inside `shard_map`, where it does so always. Optax has rows in the first alone: in the
last its answers are wrong, each device takes the norm of its own pieces.

A clip may add all-reduces only: under `jit` one for each set of mesh axes that norms
are summed over, in the other forms one in all, however many leaves there are. (Two
orders of the same axes are two sets to the compiler for TPU, Optax's clips included. A
rescue on CPU has two more in branches that are hardly ever taken.) A clip of units adds
some rounds: it measures the params as well, and its state keeps the unit of each leaf
that was clipped hardest, for which devices have to agree on which that is. A clip of
elements has two kinds, of many devices: its state keeps the largest and counts those
that it clipped. Rows of ours that break this say so, and then the exit status is 1.
"""

import functools
import math
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import _compiled
import _results
import _steps
import _targets
import _trees
import optaxclip
from _steps import NO_CLIP, OPTAX, OURS
from _targets import TARGETS, Target

Tree = Any
Row = dict[str, Any]

SETTINGS = ("target", "leaves", "form", "clip", "contender")
FORM = "{:10}{:12}{:10}{:>10}{:>7}{:>9}{:>9}{:>8}{:>8}{:>8}{:>8}{:>7}{:>10}"
COSTS = ("est. us", "kcycles", "kernels", "traffic", "temp")
JIT, EXPLICIT, OVER_AXES, SHARD_MAP = "jit", "explicit", "over_axes", "shard_map"
LAYERS = 12
RESCUES = 2  # on CPU: of norms too large, of norms too small
FIND_HARDEST = 3  # rounds: the smallest factor, the first unit with it, its figures


def gpt2(layers: int) -> Tree:
    """GPT-2 small, its vocabulary padded to be divisible, as is usual."""
    shapes = _trees.gpt2() | {"tokens": (50304, 768)}
    kept = {f"block_{i:02}" for i in range(layers)}
    return _trees.of_shapes(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        {k: v for k, v in shapes.items() if k in kept or "block" not in k},
    )


def partition(params: Tree) -> Tree:
    """Returns how every leaf is split: in all ways that there are on such a mesh.

    Kernels that widen have their outputs split over `tensor` and their inputs over
    `fsdp`, the others and the embeddings the reverse. Biases are split like the outputs
    of their kernels; the scales and biases of norms are whole on every device.
    """

    def spec(path: Any, leaf: jax.ShapeDtypeStruct) -> P:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        axes = ("tensor", "fsdp")
        if re.search("/(qkv|in)/", name):
            axes = ("fsdp", "tensor")
        return P() if "ln_" in name else P(*axes[-leaf.ndim :])

    return jax.tree_util.tree_map_with_path(spec, params)


def on_each(target: Target, params: Tree) -> int:
    """Returns the bytes of the gradients on each device."""
    sizes = dict(zip(("fsdp", "tensor"), target.mesh, strict=True))

    def of_leaf(leaf: jax.ShapeDtypeStruct, spec: P) -> int:
        parts = math.prod(sizes[axis] for axis in spec)
        return leaf.size * leaf.dtype.itemsize // parts

    return sum(jax.tree.leaves(jax.tree.map(of_leaf, params, partition(params))))


def allowed(form: str, clip: str, params: Tree) -> int:
    """Returns how many all-reduces a clip may add."""
    specs = [tuple(spec) for spec in jax.tree.leaves(partition(params))]
    if clip == NO_CLIP:
        return 0
    sets = len(set(specs) - {()})
    if clip == "value":  # a sum and a maximum, where devices are few in one
        return 2 * sets if form == JIT else 2
    if clip != "adaptive":
        return sets if form == JIT else 1
    if form != JIT:  # norms; which unit was clipped hardest; on CPU, any rescue
        return 3
    # A unit is a column, a sum over its rows; all of a vector.
    rows = len({spec[:1] for spec in specs} - {()})
    columns = len({spec[1:] for spec in specs} - {()})
    return rows + (FIND_HARDEST + 1) * columns


def lower(
    target: Target,
    form: str,
    clip: optax.GradientTransformation,
    params: Tree,
) -> jax.stages.Lowered:
    """Traces the step and lowers it for the target."""
    kind = AxisType.Explicit if form == EXPLICIT else AxisType.Auto
    names, kinds = ("fsdp", "tensor"), (kind,) * 2
    mesh = jax.make_mesh(target.mesh, names, kinds, devices=target.devices())
    optimizer = _steps.with_momentum(clip)
    state = jax.eval_shape(optimizer.init, params)
    specs = partition(params)
    state_specs = optax.tree.map_params(
        optimizer, lambda _, x: x, state, specs, transform_non_params=lambda _: P()
    )
    out_specs = specs, state_specs
    step = _steps.make_step(optimizer)
    if form == SHARD_MAP:
        step = jax.shard_map(
            step, mesh=mesh, in_specs=(*out_specs, specs), out_specs=out_specs
        )
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), out_specs)
    carry = jax.tree.map(
        lambda x, sharding: x.update(sharding=sharding), (params, state), shardings
    )
    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=shardings)
    with jax.set_mesh(mesh):
        return jitted.lower(*carry, carry[0])


def breaks(row: Row) -> list[str]:
    """Returns what a clip of ours adds and may not."""
    if row["contender"] == OPTAX:
        return []
    most = row["all_reduces_allowed"]
    others = row["others_in_branches"] + sum(row[kind] for kind in _compiled.OTHERS)
    checks = (
        (others, 0, "gathers and the like"),
        (row["all_reduce"], most, "all-reduces"),
        (row["in_branches"], RESCUES * most, "collectives in branches"),
    )
    return [
        f"{count} {what}, expected at most {limit}"
        for count, limit, what in checks
        if count > limit
    ]


def cases(params: Tree) -> Iterator[tuple[str, str, str, Any]]:
    """Yields form, clip, contender and transformation."""
    for form in (JIT, EXPLICIT, OVER_AXES, SHARD_MAP):
        yield form, NO_CLIP, NO_CLIP, optax.identity()
        for name, clip in _steps.CLIPS.items():
            if form == JIT and clip.optax is not None:
                yield form, name, OPTAX, clip.optax
            ours = clip.ours
            is_blind = (
                form == SHARD_MAP and name == "adaptive"
            )  # no type tells its units
            if is_blind or form == OVER_AXES:
                ours = optaxclip.over_axes(ours, partition(params))
            yield form, name, OURS, ours


def describe(name: str, params: Tree) -> Row:
    """Returns what all rows of one target have in common."""
    fsdp, tensor = TARGETS[name].mesh
    sizes = [leaf.size for leaf in jax.tree.leaves(params)]
    return {
        **_targets.describe("compiled_collectives", name),
        "fsdp": fsdp,
        "tensor": tensor,
        "leaves": len(sizes),
        "elements": sum(sizes),
    }


def report(name: str, layers: int) -> list[Row]:
    """Prints the table of one target, and returns its rows."""
    target, params = TARGETS[name], gpt2(layers)
    common = describe(name, params)
    machine = f"{common['fsdp']} x {common['tensor']} {target.device}"
    print(f"\n{name}: {common['leaves']} leaves on {machine}, by {common['compiler']}")
    columns = ("form", "clip", "contender", "all-reduce", "others", "branches", "bytes")
    _targets.show(FORM, *columns, *COSTS, "compile s")
    rows = []
    for form, clip, contender, transformation in cases(params):
        start = time.perf_counter()
        compiled = _targets.compile_for(
            target, functools.partial(lower, target, form, transformation, params)
        )
        row = common | {"form": form, "clip": clip, "contender": contender}
        row["compile_s"] = round(time.perf_counter() - start, 2)
        row["all_reduces_allowed"] = allowed(form, clip, params)
        row |= _results.rounded(_compiled.cost(compiled, on_each(target, params)))
        row["breaks"] = breaks(row)
        show_row(row)
        rows.append(row)
    return rows


def show_row(row: Row) -> None:
    others = sum(row[kind] for kind in _compiled.OTHERS)
    counts = row["all_reduce"], others, row["in_branches"], row["collective_bytes"]
    cycles = row["cycles"] and round(row["cycles"] / 1e3)
    passes = (f"{row[key]:.2f}" for key in ("traffic", "temporary"))
    costs = row["estimate_us"], cycles, row["kernels"], *passes, row["compile_s"]
    names = row["form"], row["clip"], row["contender"]
    _targets.show(FORM, *names, *counts, *costs)
    for fault in row["breaks"]:
        print(f"  FAILS: {fault}", flush=True)


def main() -> None:
    args = _targets.parse(_results.make_parser(__doc__, "one layer"))
    _targets.set_up(devices=8)
    _results.print_machine()
    failed = 0
    for name in args.platforms:
        rows = report(name, 1 if args.quick else LAYERS)
        _results.store(rows, SETTINGS, args.out)
        failed += sum(bool(row["breaks"]) for row in rows)
    if failed:
        sys.exit(f"\n{failed} rows add collectives that a clip should not.")


if __name__ == "__main__":
    main()
