"""How far is a clipped update on a mesh from the one on a single device?

Run:  python benchmarks/sharded_accuracy.py           # all clips, three minutes
      python benchmarks/sharded_accuracy.py --quick   # does it run? a few clips

Eight virtual devices of the CPU, a mesh (data 4, model 2), float32. Every clip runs
under `jit` with axes of either type, inside `shard_map` with and without types, and in
`pmap`; on leaves that are whole everywhere, split over one axis, over two, and a mix of
these; on updates of size 1, 1e25 and 1e-25 with thresholds to match.

What a clip returns is compared with what the same clip returns on one device, and with
the truth: the clip in float64 (Optax's where it has it) at size 1, times the size. A
deviation is that of any element, relative to the largest of its leaf; that of the norm
in the state is relative to it. Copies are equal if all devices with the same piece of
the update, or the state, have the same bits. If one of ours is off by more than 1e-6,
or copies differ, the exit status is 1.

Optax's clips are measured beside: at size 1 against themselves on one device; at 1e25
and 1e-25, where float32 squares overflow and underflow wherever they are, against the
truth. In `shard_map` and `pmap` they see one device's pieces, and nothing tells them of
the others. Where types refuse their result, or JAX an operation, there is no deviation:
the last column counts such layouts. A line is the worst over layouts and sizes; kept is
the worst over layouts, size by size.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import _results
import _spread
import optaxclip
from _sharded_clips import CLIPS, Clip, Make
from _spread import NO_TYPES, PMAP, SETTINGS, SHAPES, TYPES, Run, Step
from _steps import OPTAX, OURS
from _trees import random_tree

Tree = Any
Row = dict[str, Any]

SETTINGS_OF_ROWS = ("clip", "setting", "contender", "size")
SIZES = (1.0, 1e25, 1e-25)  # of updates and thresholds; params are of size 1
MOST = 1e-6  # deviation of ours: a few roundings of float32
FIGURES = ("from_one_device", "norm_from_one_device", "from_truth")
QUICK = ("global_norm", "group_norm", "adaptive")


def make_step(make: Make, steps: int, specs: Tree = None) -> Step:
    """Returns the last of some steps, each on twice the updates of the one before."""

    def step(updates, params, t):
        clip = make(t) if specs is None else optaxclip.over_axes(make(t), specs)
        state = clip.init(params)
        for _ in range(steps - 1):
            _, state = clip.update(updates, state, params)
            updates = jax.tree.map(lambda x: 2 * x, updates)
        return clip.update(updates, state, params)

    return step


class Reference(NamedTuple):
    """What the runs at one size are compared with."""

    size: float
    args: tuple[Tree, Tree, Any]  # updates, params, what thresholds are multiplied by
    alone: dict[str, tuple[Tree, Any]]  # updates and state on one device
    truth: Tree


def references(clip: Clip) -> list[Reference]:
    """Runs one clip on one device, at all sizes."""
    drawn, params = random_tree(SHAPES, seed=0), random_tree(SHAPES, seed=1)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), (drawn, params, 1.0))
        step = jax.jit(make_step(clip.optax or clip.ours, clip.steps))
        exact, _ = jax.device_get(step(*wide))
    contenders = clip.contenders().items()
    steps = {name: jax.jit(make_step(make, clip.steps)) for name, make in contenders}
    found = []
    for size in SIZES:
        args = optax.tree.scale(jnp.float32(size), drawn), params, jnp.float32(size)
        alone = {name: jax.device_get(step(*args)) for name, step in steps.items()}
        found.append(Reference(size, args, alone, optax.tree.scale(size, exact)))
    return found


def deviation(got: Tree, want: Tree) -> float:
    """Returns the largest of any element, relative to the largest of its leaf."""

    def of_leaf(got, want):
        want = np.asarray(want, np.float64)
        return np.abs(np.asarray(got) - want).max() / np.abs(want).max()

    return float(np.max(jax.tree.leaves(jax.tree.map(of_leaf, got, want))))


def compare(run: Run, contender: str, reference: Reference) -> Row:
    """Returns the figures of one row."""
    try:
        clipped, state, same = run(*reference.args)
    except Exception as error:
        if contender == OURS:
            raise
        return {"refused": type(error).__name__}
    expected, expected_state = reference.alone[contender]
    figures = {"from_truth": deviation(clipped, reference.truth)}
    if contender == OURS or reference.size == 1:
        figures["from_one_device"] = deviation(clipped, expected)
    if hasattr(state, "norms"):
        figures["norm_from_one_device"] = deviation(state.norms, expected_state.norms)
    return {k: float(f"{v:.3g}") for k, v in figures.items()} | {"copies_equal": same}


def measure(
    name: str, setting: str, layouts: Sequence[str], refs: Any
) -> Iterator[Row]:
    """Yields the rows of one clip in one setting."""
    clip, every = CLIPS[name], _spread.layouts(setting)
    untold = setting in (NO_TYPES, PMAP) or (setting == TYPES and clip.needs_specs)
    for layout in [x for x in layouts if x in every]:
        for contender, make in clip.contenders().items():
            told = every[layout] if untold and contender == OURS else None
            step = make_step(make, clip.steps, told)
            run = _spread.spread(step, setting, every[layout])
            row = {"clip": name, "setting": setting, "layout": layout}
            row["contender"] = contender
            for reference in refs:
                yield (
                    row | {"size": reference.size} | compare(run, contender, reference)
                )


def fails(row: Row) -> bool:
    if row["contender"] == OPTAX:
        return False
    close = all(row.get(figure, 0.0) <= MOST for figure in FIGURES)
    return not (close and row["copies_equal"])


def worst(rows: list[Row], figure: str, size: float | None = None) -> str:
    rows = [row for row in rows if size in (None, row["size"])]
    found = [row[figure] for row in rows if figure in row]
    return f"{np.max(found):.1g}" if found else "-"


def copies(rows: list[Row]) -> str:
    """Says whether they are equal, and how many layouts were refused."""
    same = [row["copies_equal"] for row in rows if "refused" not in row]
    refused = {row["layout"] for row in rows if "refused" in row}
    words = ["yes" if all(same) else "NO"] if same else []
    return ", ".join(words + ([f"{len(refused)} refused"] if refused else [])) or "-"


def show(*cells: str) -> None:
    form = "{:12}{:20}{:>7}{:>7}{:>7}  {:8}{:>7}{:>7}{:>7}  {}"
    print(form.format(*cells), flush=True)


def show_worst(name: str, setting: str, rows: list[Row]) -> None:
    ours = [row for row in rows if row["contender"] == OURS]
    theirs = [row for row in rows if row["contender"] == OPTAX]
    cells = [worst(ours, figure) for figure in FIGURES] + [copies(ours)]
    cells.append(worst(theirs, "from_one_device"))
    cells += [worst(theirs, "from_truth", size) for size in SIZES[1:]]
    show(name, setting, *cells, copies(theirs))


def summarize(rows: list[Row]) -> Iterator[Row]:
    """Yields what is kept of one clip and setting: the worst over layouts."""
    names = SETTINGS_OF_ROWS[2:]
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    for own in groups.values():
        done = [row for row in own if "refused" not in row]
        found = {x: [row[x] for row in done if x in row] for x in FIGURES}
        yield {
            "question": "sharded_accuracy",
            **{name: own[0][name] for name in SETTINGS_OF_ROWS},
            "layouts": [row["layout"] for row in own],
            "refused": {x["layout"]: x["refused"] for x in own if "refused" in x},
            **{figure: float(np.max(all_)) for figure, all_ in found.items() if all_},
            "copies_equal": all(row["copies_equal"] for row in done) if done else None,
        }


def parse_args() -> argparse.Namespace:
    parser = _results.make_parser(__doc__, "few clips, mixed leaves")
    parser.add_argument("--clips", nargs="+", choices=CLIPS, default=list(CLIPS))
    args = _results.parse(parser)
    args.layouts = ["mixed"] if args.quick else list(_spread.LAYOUTS)
    args.clips = QUICK if args.quick else args.clips
    return args


def main() -> None:
    args = parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", _spread.DEVICES)
    machine, start, failed = _results.print_machine(), time.perf_counter(), 0
    print()
    show("clip", "setting", "update", "norm", "truth", "copies", *("optax",) * 3, "")
    show("", "", "", "", "", "equal", *(f"{size:g}" for size in SIZES), "equal")
    for name in args.clips:
        refs = references(CLIPS[name])
        for setting in SETTINGS:
            rows = list(measure(name, setting, args.layouts, refs))
            show_worst(name, setting, rows)
            kept = [machine | row for row in summarize(rows)]
            _results.store(kept, SETTINGS_OF_ROWS, args.out)
            for row in filter(fails, rows):
                print(f"  FAILS: {row}", flush=True)
                failed += 1
    print(f"{time.perf_counter() - start:.0f} s")
    if failed:
        sys.exit(f"{failed} rows of ours are off, or their copies differ.")


if __name__ == "__main__":
    main()
