"""Which leaves a clip works on, and in which dtype it computes.

Only floating and complex leaves with at least one element count. Everything else an
update tree may hold (integers, booleans, float0, PRNG keys, None, ``optax.MaskedNode``)
passes through. Arithmetic is in float32, or in float64 where any leaf is.
"""

import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optaxclip._trees import paths as _paths


class Leaves(NamedTuple):
    """The leaves of a tree that count.

    Attributes:
      leaves: all leaves of the tree, counted or not.
      counted: positions of the counted ones.
      treedef: structure of the tree.
      dtype: float32 or float64, in which norms, thresholds and factors are computed.
    """

    leaves: list[Any]
    counted: list[int]
    treedef: Any
    dtype: Any

    def paths(self) -> list[str]:
        """Returns the paths of the counted leaves."""
        every = _paths.paths(self.treedef.unflatten(self.leaves))
        return [every[i] for i in self.counted]

    def measured(self) -> list[jax.Array]:
        """Returns the counted leaves in the dtype of the arithmetic."""
        return [widen(self.leaves[i], self.dtype) for i in self.counted]

    def abstract(self) -> list[jax.ShapeDtypeStruct]:
        """Returns the shapes and dtypes of the measured leaves."""
        counted = [self.leaves[i] for i in self.counted]
        return [
            jax.ShapeDtypeStruct(np.shape(x), _wide(x, self.dtype)) for x in counted
        ]

    def tree(self, counted: list[Any]) -> Any:
        """Returns the tree of ``counted`` leaves, with None in the other places."""
        holes: list[Any] = [None] * len(self.leaves)
        for i, leaf in zip(self.counted, counted, strict=True):
            holes[i] = leaf
        return self.treedef.unflatten(holes)

    def replaced(
        self, counted: list[Any], untouched: frozenset[int] = frozenset()
    ) -> Any:
        """Returns the whole tree with the counted leaves replaced, less the untouched.

        These are named by their places among the counted ones.
        """
        leaves = list(self.leaves)
        pairs = zip(self.counted, counted, strict=True)
        for place, (i, leaf) in enumerate(pairs):
            leaves[i] = jnp.asarray(leaves[i]) if place in untouched else leaf
        return self.treedef.unflatten(leaves)


def flatten(tree: Any, abstract: bool = False) -> Leaves:
    """Sorts the leaves of ``tree`` into counted and passed through.

    Args:
      tree: any pytree of arrays and numbers.
      abstract: accept ``jax.ShapeDtypeStruct``, as an ``init`` does, and of params that
        ``optax.lookahead`` keeps twice those that the gradients are of.

    Raises:
      TypeError: a leaf is neither a number nor an array of numbers, or is a sparse one
        in which an entry may be there twice.
    """
    if abstract and isinstance(tree, optax.LookaheadParams):
        tree = tree.fast
    leaves, treedef = jax.tree.flatten(tree)
    for position, leaf in enumerate(leaves):
        if not is_numeric(leaf) or (_is_abstract(leaf) and not abstract):
            raise TypeError(_unfit(leaf, _paths.paths(tree)[position]))
    for path, array in _sparse(tree):
        if not getattr(array, "unique_indices", False):
            raise TypeError(_repeated(array, path))
    counted = [i for i, leaf in enumerate(leaves) if _counts(leaf)]
    double = any(_dtype(leaves[i]) in (jnp.float64, jnp.complex128) for i in counted)
    return Leaves(leaves, counted, treedef, jnp.float64 if double else jnp.float32)


def check_dense(tree: Any, what: str) -> None:
    """Raises where a leaf is sparse, for what depends on the shape of the whole."""
    for path, array in _sparse(tree):
        raise TypeError(
            f"Expected dense arrays for {what}, got {type(array).__name__} at {path!r}."
            " Call `.todense()`."
        )


def is_numeric(leaf: Any) -> bool:
    """Returns whether it is a number or an array of numbers."""
    if isinstance(leaf, bool | int | float | complex):
        return True
    if not (_is_abstract(leaf) or hasattr(leaf, "__array__")):
        return False
    kind = getattr(leaf, "dtype", None)
    return hasattr(leaf, "shape") and kind is not None and _fits_in_jax(kind)


def widen(leaf: Any, dtype: Any) -> jax.Array:
    """Casts a leaf to ``dtype``, or to the complex dtype of that precision."""
    return jnp.asarray(leaf, _wide(leaf, dtype))


def narrow(leaf: jax.Array, like: Any) -> jax.Array:
    """Rounds a result, once, to the dtype of the leaf it came from."""
    return leaf.astype(_dtype(like))


def _wide(leaf: Any, dtype: Any) -> Any:
    if not jnp.issubdtype(_dtype(leaf), jnp.complexfloating):
        return dtype
    return jnp.complex128 if dtype == jnp.float64 else jnp.complex64


def _dtype(leaf: Any) -> Any:
    """Python numbers count as float32 and complex64, whatever their width in Python."""
    if isinstance(leaf, complex | float) and not isinstance(leaf, np.generic):
        return jnp.dtype(jnp.float32 if isinstance(leaf, float) else jnp.complex64)
    if isinstance(leaf, bool | int):
        return jnp.result_type(leaf)
    if isinstance(leaf.dtype, np.dtype):  # as JAX takes NumPy's float64 without x64
        return jax.dtypes.canonicalize_dtype(leaf.dtype)
    return leaf.dtype


def _counts(leaf: Any) -> bool:
    return bool(jnp.issubdtype(_dtype(leaf), jnp.inexact)) and np.size(leaf) > 0


def _is_abstract(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def _fits_in_jax(dtype: Any) -> bool:
    return not (isinstance(dtype, np.dtype) and dtype.kind in "OSUMm")


def _sparse(tree: Any) -> list[tuple[str, Any]]:
    """Returns the sparse arrays of a tree, which are nodes of it, with their paths."""
    module: Any = sys.modules.get("jax.experimental.sparse")
    if module is None:
        return []

    def is_sparse(x: Any) -> bool:
        return isinstance(x, module.JAXSparse)

    every = jax.tree.leaves(tree, is_leaf=is_sparse)
    if not any(map(is_sparse, every)):
        return []
    paths = _paths.paths(tree, is_leaf=is_sparse)
    return [pair for pair in zip(paths, every, strict=True) if is_sparse(pair[1])]


def _unfit(leaf: Any, path: str) -> str:
    if _is_abstract(leaf):
        return (
            f"Expected arrays in the updates, got {leaf} at {path!r}."
            " To get shapes without values, call `jax.eval_shape(clip.update, ...)`."
        )
    return (
        f"Expected arrays or numbers as leaves, got {leaf!r} of type"
        f" {type(leaf).__name__} at {path!r}. Filter the tree to its arrays first."
    )


def _repeated(array: Any, path: str) -> str:
    return (
        f"Expected arrays as leaves, got {type(array).__name__} at {path!r}, a sparse"
        " one that may hold an entry in several parts: their norm is another one. Call"
        " `.todense()`, or of a BCOO `.sum_duplicates(nse=...)`."
    )
