"""How does the cost of a clip grow with elements, with leaves, and with devices?

Run:  python benchmarks/scaling.py            # every compiler that is installed
      python benchmarks/scaling.py --quick    # one clip, few sizes

The steps are those of `compiled.py` and `compiled_collectives.py`, compiled and read,
not run: the figures have no noise. First all points are printed, then how much they
grow, by a straight line through them:

  * by leaf, of 1000 elements each on one device: kernels. Without a clip it is 1; where
    small leaves are joined for their norm, a clip adds one for dozens of them.
  * by element, of ten equal leaves on one device: bytes that kernels read and write,
    in float32. Without a clip that is 20, and the floor of a clip is 24, or 28 if it
    looks at the params as well.
  * by device, up to 256, of one layer of GPT-2 under `jit`: all-reduces and bytes that
    they take. Both should be 0: each device adds up what it has, and norms are few.
"""

import functools
import itertools
import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.extend.backend
import optax

import _compiled
import _results
import _steps
import _targets
import compiled
import compiled_collectives as _collectives
from _steps import NO_CLIP, OPTAX, OURS
from _targets import TARGETS, Target

Row = dict[str, Any]

SETTINGS = ("target", "along", "at", "clip", "contender")
LEAVES, ELEMENTS, DEVICES = "leaves", "elements", "devices"
SIZES = {
    LEAVES: (10, 100, 500),
    ELEMENTS: (10**5, 10**6, 10**7),
    DEVICES: (8, 64, 256),
}
QUICK = {LEAVES: (5, 10), ELEMENTS: (10**4, 10**5), DEVICES: (4, 8)}
CLIPS = ("global_norm", "leaf_norm", "adaptive")
MESHES = {4: (2, 2), 8: (4, 2), 64: (16, 4), 256: (64, 4)}  # fsdp, tensor
# By target, how so many devices are arranged.
SHAPES = {
    "tpu-8": {4: "v5e:2x2", 8: "v5e:2x4", 64: "v5e:8x8", 256: "v5e:16x16"},
    "h200-8": {4: "1x1x4", 8: "1x1x8", 64: "1x8x8", 256: "1x32x8"},
    "cpu-8": {4: "", 8: ""},
}
# The figures that should grow by a known amount with each.
GROWS = {
    LEAVES: ("kernels",),
    ELEMENTS: ("bytes_moved",),
    DEVICES: ("all_reduce", "collective_bytes"),
}
FORM = "{:>9}  {:13}{:11}{:>9}{:>13}{:>9}{:>12}{:>9}"
COLUMNS = ("kernels", "bytes", "traffic", "all-reduces", "of bytes")
FIGURES = ("kernels", "bytes_moved", "traffic", "all_reduce", "collective_bytes")
SLOPES = "{:9}{:13}{:11}{:>16}{:>17}{:>22}{:>10}"


def with_devices(name: str, count: int) -> Target:
    """Returns a target of so many devices."""
    shape = SHAPES[name][count]
    devices = {
        "tpu-8": lambda: _targets.tpu(shape),
        "h200-8": lambda: _targets.h200(shape),
        "cpu-8": lambda: jax.devices()[:count],
    }
    return TARGETS[name]._replace(mesh=MESHES[count], devices=devices[name])


def figures(name: str, along: str, at: int, clip: optax.GradientTransformation) -> Row:
    """Returns those of one point."""
    if along != DEVICES:
        leaves, size = (at, 1000) if along == LEAVES else (10, at // 10)
        shapes = {f"leaf_{i:03}": (size,) for i in range(leaves)}
        optimizer = _steps.with_momentum(clip)
        return compiled.on_one_device(name, shapes, "float32", optimizer)
    target, params = with_devices(name, at), _collectives.gpt2(1)
    step = _targets.compile_for(
        target,
        functools.partial(_collectives.lower, target, _collectives.JIT, clip, params),
    )
    return _compiled.cost(step, _collectives.on_each(target, params))


def points(
    name: str, along: str, sizes: Sequence[int], clips: Sequence[str]
) -> Iterator[Row]:
    """Yields a row for each size, clip and contender, and prints it."""
    common = _targets.describe("scaling", name) | {"along": along}
    for clip, at in itertools.product(clips, sizes):
        found = _steps.CLIPS[clip]
        contenders = {NO_CLIP: optax.identity(), OPTAX: found.optax, OURS: found.ours}
        for contender, own in contenders.items():
            if own is not None:
                row = common | {"at": at, "clip": clip, "contender": contender}
                row |= _results.rounded(figures(name, along, at, own))
                _targets.show(*(FORM, at, clip, contender), *(row[x] for x in FIGURES))
                yield row


def slopes(rows: Iterable[Row]) -> list[Row]:
    """Returns by how much figures grow with each leaf, element or device."""
    lines: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        names = (row[key] for key in ("target", "clip", "contender", "along"))
        lines.setdefault(tuple(names), []).append(row)
    found: dict[tuple[str, ...], Row] = {}
    for (*names, along), own in lines.items():
        for figure in GROWS[along]:
            line = [row["at"] for row in own], [row[figure] for row in own]
            slope = statistics.linear_regression(*line).slope
            found.setdefault(tuple(names), {})[figure] = slope
    names = ("target", "clip", "contender")
    return [dict(zip(names, own, strict=True)) | row for own, row in found.items()]


def show_slopes(rows: Iterable[Row]) -> None:
    print()
    names = ("kernels / leaf", "bytes / element", "all-reduces / device", "of bytes")
    _targets.show(SLOPES, "target", "clip", "contender", *names)
    for row in slopes(rows):
        grown = (x for figures in GROWS.values() for x in figures)
        cells = (f"{row[x]:.4g}" if x in row else None for x in grown)
        _targets.show(SLOPES, row["target"], row["clip"], row["contender"], *cells)


def main() -> None:
    parser = _results.make_parser(__doc__, "one clip, few sizes")
    parser.add_argument("--along", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--clips", nargs="+", choices=_steps.CLIPS, default=CLIPS)
    args = _targets.parse(parser, SHAPES)
    sizes, clips = (QUICK, CLIPS[:1]) if args.quick else (SIZES, args.clips)
    rows: list[Row] = []
    for along in args.along:
        jax.extend.backend.clear_backends()
        _targets.set_up(devices=8 if along == DEVICES else 1)
        _results.print_machine()
        for name in args.platforms:
            print(f"\n{name}")
            _targets.show(FORM, along, "clip", "contender", *COLUMNS)
            rows += points(name, along, sizes[along], clips)
            _results.store(rows, SETTINGS, args.out)
    show_slopes(rows)


if __name__ == "__main__":
    main()
