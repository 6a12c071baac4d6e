"""Of which trees do the benchmarks take steps? Six, from small to large."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

Tree = Any
Shapes = dict[str, Any]


def lstm(inputs: int = 32, units: int = 64) -> Shapes:
    """A small LSTM: one cell of 64 units on 32 inputs, and three dense layers."""
    square = {"kernel": (units, units), "bias": (units,)}
    gates: Shapes = {f"i{g}": {"kernel": (inputs, units)} for g in "ifgo"}
    gates |= {f"h{g}": square for g in "ifgo"}
    return {"lstm": gates, **{f"dense_{i}": square for i in range(3)}}


def lstm128() -> Shapes:
    """The same of 128 units on 128 inputs: nearly all leaves have 16 384 elements."""
    return lstm(128, 128)


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


def mixed() -> Shapes:
    """Leaves of all kinds: small, large, square, long, thin, empty of axes."""
    vectors = {"a": (), "b": (64,), "c": (16_384,), "d": (70_000,)}
    matrices = {"a": (33, 1), "b": (128, 128), "c": (512, 512), "d": (2048, 2048)}
    uneven = {"a": (1000, 300), "b": (4096, 8)}
    deep = {"a": (2, 2, 2), "b": (50, 16, 7), "c": (3, 3, 64, 128), "d": (128,)}
    return {"vectors": vectors, "matrices": matrices, "uneven": uneven, "deep": deep}


TREES: dict[str, Callable[[], Shapes]] = {
    "lstm": lstm,
    "lstm128": lstm128,
    "layers": layers,
    "leaves": leaves,
    "gpt2": gpt2,
    "mixed": mixed,
}


def of_shapes(function: Callable[[tuple[int, ...]], Any], shapes: Shapes) -> Tree:
    """Returns the tree of what the function makes of each shape, in their order."""
    return jax.tree.map(function, shapes, is_leaf=lambda x: isinstance(x, tuple))


def random_tree(shapes: Shapes, seed: int) -> Tree:
    rng = np.random.default_rng(seed)
    return of_shapes(
        lambda shape: jax.device_put(rng.standard_normal(shape, np.float32)), shapes
    )


def describe(name: str) -> dict[str, Any]:
    """Returns how large one of the trees is."""
    sizes = jax.tree.leaves(of_shapes(lambda shape: int(np.prod(shape)), TREES[name]()))
    return {"tree": name, "leaves": len(sizes), "elements": sum(sizes)}
