"""Trees of updates, their bits, types and tolerances, and a browser to look with."""

import itertools
import shutil
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optaxclip

# Optax types a tree as a union that no index or attribute passes: here trees are Any.
oc: Any = optaxclip
Tree = Any
Clip = Any

DTYPES = ("float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "complex64")

# Two layers, one of two leaves: enough to tell a leaf, a layer and a tree apart.
SHAPES = {"dense": {"bias": (3,), "kernel": (4, 3)}, "head": {"kernel": (3, 2)}}


def in_turn(*columns: Sequence[Any]) -> list[Any]:
    """All combinations; those beyond the longest column, in turn, are thorough."""
    length = max(map(len, columns))
    rows = range(length)
    first = {tuple(x[(i + i // len(x)) % len(x)] for x in columns) for i in rows}
    every = itertools.product(*columns)
    return [row if row in first else thorough(*row) for row in every]


def all_but(values: Iterable[Any], chosen: Collection[Any]) -> list[Any]:
    """The values, of which all but the chosen are thorough."""
    return [value if value in chosen else thorough(value) for value in values]


def thorough(*values: Any) -> Any:
    """Parameters that are one more of a kind, see `table.KINDS`."""
    return pytest.param(*values, marks=pytest.mark.thorough)


def is_shape(x) -> bool:
    return isinstance(x, tuple)


def random_leaf(rng: np.random.Generator, shape, dtype, scale=1.0) -> np.ndarray:
    dtype = jnp.dtype(dtype)
    values = rng.normal(size=shape) * scale
    if jnp.issubdtype(dtype, jnp.complexfloating):
        values = values + 1j * rng.normal(size=shape) * scale
    return np.asarray(values).astype(dtype)


def random_tree(dtype="float32", *, seed=0, scale=1.0, shapes: Tree = SHAPES) -> Tree:
    """Normal leaves of the given shapes, rounded once to `dtype`."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(random_leaf(rng, shape, dtype, scale)),
        shapes,
        is_leaf=is_shape,
    )


def updates_and_params(dtype="float32", *, scale=2.0) -> tuple[Tree, Tree]:
    return random_tree(dtype, seed=1, scale=scale), random_tree(dtype, seed=2)


def truth(tree: Tree) -> Tree:
    """The same tree in NumPy's float64 or complex128."""

    def widen(x):
        x = np.asarray(x)
        return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)

    return jax.tree.map(widen, tree)


def paths_of(tree: Tree) -> list[str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in leaves]


def vary(tree: Tree, path: str, value) -> Tree:
    """The tree with the first element of one leaf replaced."""

    def change(key_path, leaf):
        if jax.tree_util.keystr(key_path, simple=True, separator="/") != path:
            return leaf
        flat = np.array(leaf).reshape(-1)
        flat[0] = value
        return jnp.asarray(flat.reshape(np.shape(leaf)))

    return jax.tree_util.tree_map_with_path(change, tree)


def bits(tree: Tree) -> list[tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of every leaf: tells -0.0 from 0.0."""
    leaves = [np.asarray(x) for x in jax.tree.leaves(tree)]
    return [(str(x.dtype), x.shape, x.tobytes()) for x in leaves]


def shown(thresholds: Any) -> np.ndarray:
    """Thresholds, infinite where a state has the number that stands for none."""
    values = np.asarray(thresholds)
    none = float(jnp.finfo(values.dtype).max) * (1 - 1e-6)
    return np.where(values >= none, np.inf, values)


def types(tree: Tree) -> Tree:
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)


def tolerance(dtype) -> tuple[float, float]:
    """(relative, absolute): one rounding of the result, after exact arithmetic."""
    dtype = jnp.dtype(dtype)
    info = jnp.finfo(dtype)
    eps = float(info.eps)
    if dtype in (jnp.float32, jnp.complex64, jnp.float64):
        eps *= 8  # the arithmetic is in the same precision: a few roundings
    return eps, float(info.smallest_subnormal)


# Clips whose result is a product of matrices. An element of it is a sum, and a small
# one has the rounding of the largest.
PRODUCTS = ("singular_values",)


def assert_close(
    actual: Tree, expected: Tree, *, rtol: float | None = None, of: str = ""
) -> None:
    """Leaf by leaf in float64, to one rounding of each leaf's own dtype.

    Args:
      actual: what came.
      expected: what is right.
      rtol: another relative tolerance.
      of: name of the clip, of which some round differently.
    """
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    names = paths_of(actual)
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    for name, (ours, right) in zip(names, pairs, strict=True):
        relative, absolute = tolerance(jnp.asarray(ours).dtype)
        if of in PRODUCTS and np.size(right):
            absolute += relative * np.max(np.nan_to_num(np.abs(truth(right))))
        np.testing.assert_allclose(
            truth(ours),
            truth(right),
            rtol=relative if rtol is None else rtol,
            atol=absolute,
            err_msg=name,
        )


def is_close(actual: Tree, expected: Tree, rtol: float) -> bool:
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    return all(
        np.allclose(truth(a), truth(b), rtol=rtol, atol=0, equal_nan=True)
        for a, b in pairs
    )


def three_steps() -> list[Tree]:
    return [random_tree(seed=s, scale=s + 1.0) for s in range(3)]


def run(clip: Clip, update: Callable[..., Any], steps, params) -> tuple[list, Any]:
    """The clip over several steps in a Python loop: all updates, the last state."""
    state, clipped = clip.init(params), []
    for updates in steps:
        out, state = update(updates, state, params)
        clipped.append(out)
    return clipped, state


def steps(jaxpr):
    """Returns every step of a traced program, and of those inside its steps."""
    for step in jaxpr.eqns:
        yield step
        for some in jax.tree.leaves(list(step.params.values())):
            inner = getattr(some, "jaxpr", some)
            yield from steps(inner) if hasattr(inner, "eqns") else ()


def which_browser() -> str:
    """Returns the path of a browser to look at pages with."""
    for name in "chromium", "chromium-browser", "google-chrome", "chrome":
        if found := shutil.which(name):
            return found
    raise AssertionError(
        "Expected a browser, to look at pages: `apt-get install chromium`, or put"
        " a `chromium` or `google-chrome` on the path."
    )
