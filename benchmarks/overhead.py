"""What does a clip add to a training step?

Run:  python benchmarks/overhead.py            # all clips on all trees, some minutes
      python benchmarks/overhead.py --quick    # does it run? less than a minute

The step is a clip, SGD with momentum and `optax.apply_updates`, compiled, with the
params and the optimizer's state donated. It is timed without a clip, with Optax's clip
and with ours, after both have been seen to give the same updates.

Without a clip the step passes over memory five times: it reads the gradients, the
momentum and the params, and writes the latter two. A norm has to see all gradients
before the first of them can be scaled: six passes. So 6/5 = 1.20 of the time is the
floor on trees much larger than the cache; on those that fit, a sixth pass costs less.
"""

import argparse
import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import _timing
import optaxclip

Tree = Any
Shapes = dict[str, Any]

RESULTS = pathlib.Path(__file__).parent / "results" / "overhead.jsonl"
NO_CLIP, OPTAX, OURS = "no clip", "optax", "optaxclip"
PASSES = 5  # over memory, without a clip
RTOL = 1e-5  # between Optax's float32 norms and ours


class Clip(NamedTuple):
    """Our clip, Optax's own of that name if it has one, and the passes over memory."""

    ours: optax.GradientTransformation
    optax: optax.GradientTransformation | None
    passes: int


# The thresholds are low enough that every one of these clips has something to do.
CLIPS = {
    "global_norm": Clip(
        optaxclip.clip_by_global_norm(0.1), optax.clip_by_global_norm(0.1), PASSES + 1
    ),
    "value": Clip(optaxclip.clip(0.01), optax.clip(0.01), PASSES),
    "leaf_norm": Clip(optaxclip.clip_by_leaf_norm(0.1), None, PASSES + 1),
    "group_norm": Clip(optaxclip.clip_by_group_norm(0.1), None, PASSES + 1),
    "block_rms": Clip(
        optaxclip.clip_by_block_rms(0.01), optax.clip_by_block_rms(0.01), PASSES + 1
    ),
    "adaptive": Clip(  # reads the params, too
        optaxclip.adaptive_grad_clip(0.01), optax.adaptive_grad_clip(0.01), PASSES + 2
    ),
}


def lstm() -> Shapes:
    """A small LSTM: one cell of 64 units on 32 inputs, and three dense layers."""
    gates = {f"i{g}": {"kernel": (32, 64)} for g in "ifgo"}
    gates |= {f"h{g}": {"kernel": (64, 64), "bias": (64,)} for g in "ifgo"}
    dense = {f"dense_{i}": {"kernel": (64, 64), "bias": (64,)} for i in range(3)}
    return {"lstm": gates, **dense}


def layers() -> Shapes:
    """50 layers of one 256 x 256 matrix and four vectors each."""
    vectors = dict.fromkeys(("bias", "gain", "norm_bias", "norm_scale"), (256,))
    return {f"layer_{i:02}": {"kernel": (256, 256), **vectors} for i in range(50)}


def leaves() -> Shapes:
    """1000 leaves of 1000 elements, ten to a layer."""
    return {f"layer_{i:02}": {f"w{j}": (1000,) for j in range(10)} for i in range(100)}


def gpt2() -> Shapes:
    """GPT-2 small: 124 million parameters in 148 leaves."""

    def dense(inputs: int, outputs: int) -> Shapes:
        return {"kernel": (inputs, outputs), "bias": (outputs,)}

    norm = {"scale": (768,), "bias": (768,)}
    block = {
        "ln_1": norm,
        "attention": {"qkv": dense(768, 2304), "out": dense(768, 768)},
        "ln_2": norm,
        "mlp": {"in": dense(768, 3072), "out": dense(3072, 768)},
    }
    embeddings = {"tokens": (50257, 768), "positions": (1024, 768)}
    return {**embeddings, **{f"block_{i:02}": block for i in range(12)}, "ln_f": norm}


TREES: dict[str, Callable[[], Shapes]] = {
    "lstm": lstm,
    "layers": layers,
    "leaves": leaves,
    "gpt2": gpt2,
}


def random_tree(shapes: Shapes, seed: int) -> Tree:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jax.device_put(rng.standard_normal(shape, np.float32)),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def make_step(optimizer: optax.GradientTransformation) -> jax.stages.Wrapped:
    def step(params, opt_state, grads):
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return jax.jit(step, donate_argnums=(0, 1))


def make_runner(
    step: jax.stages.Compiled, carry: tuple[Tree, Tree], grads: Tree
) -> Callable[[int], None]:
    """Returns a function that takes so many steps; it goes on where it stopped."""

    def run(calls: int) -> None:
        nonlocal carry
        for _ in range(calls):
            carry = step(*carry, grads)
        jax.block_until_ready(carry)

    return run


def compare(clip: Clip, shapes: Shapes, repeats: int, compiles: int) -> dict[str, Any]:
    """Returns the times of the step without a clip, with Optax's, and with ours."""
    clips = {NO_CLIP: optax.identity(), OPTAX: clip.optax, OURS: clip.ours}
    optimizers = {
        name: optax.chain(transformation, optax.sgd(0.01, momentum=0.9))
        for name, transformation in clips.items()
        if transformation is not None
    }
    grads, params = random_tree(shapes, seed=0), random_tree(shapes, seed=1)
    carries = {
        name: (jax.tree.map(jnp.copy, params), optimizer.init(params))
        for name, optimizer in optimizers.items()
    }
    del params
    compiled, compile_times = _timing.compile_apart(
        {
            name: functools.partial(make_step(optimizer).lower, *carries[name], grads)
            for name, optimizer in optimizers.items()
        },
        compiles,
    )
    runners, clipped = {}, {}
    for name, carry in carries.items():
        carry = compiled[name](*carry, grads)
        # After its first step the momentum is what came out of the clip.
        if name != NO_CLIP:
            clipped[name] = jax.tree.map(np.array, optax.tree.get(carry[1], "trace"))
        runners[name] = make_runner(compiled[name], carry, grads)
    _timing.assert_equal_answers(clipped, RTOL)
    run = _timing.summarize(_timing.interleave(runners, repeats), NO_CLIP)
    compiling = _timing.summarize(compile_times, NO_CLIP)
    return {
        name: {
            "run_ms": 1e3 * run[name].seconds,
            "run_ratio": run[name].ratio,
            "added_ms": 1e3 * run[name].added,
            "compile_s": compiling[name].seconds,
            "compile_ratio": compiling[name].ratio,
        }
        for name in runners
    }


def report(clip: str, names: list[str], repeats: int, compiles: int) -> list[dict]:
    """Prints one table, clip against clip on each tree, and returns its rows."""
    floor = CLIPS[clip].passes / PASSES
    print(f"\n{clip}: {PASSES} passes over memory become {CLIPS[clip].passes}")
    print(f"floor x{floor:.2f}, {repeats} rounds, medians")
    columns = ("tree", "leaves", "clip", "run ms", "ratio", "added ms", "compile s")
    print("{:8}{:>7}  {:10}{:>10}{:>8}{:>11}{:>11}{:>8}".format(*columns, "ratio"))
    rows = []
    for tree in names:
        shapes = TREES[tree]()
        sizes = [
            int(np.prod(shape))
            for shape in jax.tree.leaves(shapes, is_leaf=lambda x: isinstance(x, tuple))
        ]
        for name, row in compare(CLIPS[clip], shapes, repeats, compiles).items():
            print(
                f"{tree:8}{len(sizes):7}  {name:10}{row['run_ms']:10.3f}"
                f"{row['run_ratio']:8.2f}{row['added_ms']:11.3f}"
                f"{row['compile_s']:11.2f}{row['compile_ratio']:8.2f}",
                flush=True,
            )
            rows.append(
                {
                    "question": "overhead",
                    "clip": clip,
                    "tree": tree,
                    "leaves": len(sizes),
                    "elements": sum(sizes),
                    "contender": name,
                    "floor_ratio": floor,
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
    parser.add_argument("--trees", nargs="+", choices=TREES, default=list(TREES))
    parser.add_argument("--clips", nargs="+", choices=CLIPS, default=list(CLIPS))
    parser.add_argument("--repeats", type=int, default=31, help="rounds per tree")
    parser.add_argument("--compiles", type=int, default=3, help="times to compile")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="the small tree alone")
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
    for clip in args.clips:
        rows = report(clip, args.trees, args.repeats, args.compiles)
        _timing.append_rows(args.out, [machine | row for row in rows])


if __name__ == "__main__":
    main()
