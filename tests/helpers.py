"""The tables: every clip, every dtype, and what NumPy says about them in float64.

A new clip is one row of `TABLE`: how to build it, and its formula written a second
time in NumPy. Everything in `test_contract.py` then runs over it.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip
from optaxclip import factors, norms, thresholds

# Optax types a tree as a union that no index or attribute passes: here trees are Any.
oc: Any = optaxclip
Tree = Any
Clip = Any

DTYPES = ("float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "complex64")

# Two layers, one of two leaves: enough to tell a leaf, a layer and a tree apart.
SHAPES = {"dense": {"bias": (3,), "kernel": (4, 3)}, "head": {"kernel": (3, 2)}}

# --------------------------------------------------------------------------------------
# Trees
# --------------------------------------------------------------------------------------


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


# --------------------------------------------------------------------------------------
# Comparison
# --------------------------------------------------------------------------------------


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


# --------------------------------------------------------------------------------------
# The formulas in NumPy, float64
# --------------------------------------------------------------------------------------


def vector_norm(leaves: Sequence[np.ndarray], ord: float = 2) -> float:
    """The norm of all elements as one vector, scaled first so that no power fails."""
    values = np.concatenate([np.abs(x).ravel() for x in leaves] + [np.zeros(1)])
    largest = values.max()
    if not np.isfinite(largest) or largest == 0 or ord == np.inf:
        return float(largest)
    return float(largest * np.sum((values / largest) ** ord) ** (1 / ord))


def rms(leaves: Sequence[np.ndarray]) -> float:
    return vector_norm(leaves) / np.sqrt(sum(x.size for x in leaves))


def np_rescale(norm, max_norm):
    return np.where(norm > max_norm, max_norm / np.where(norm == 0, 1, norm), 1.0)


def np_normalize(norm, max_norm):
    return np.where(norm == 0, 0.0, max_norm / np.where(norm == 0, 1, norm))


def np_drop(norm, max_norm):
    return np.where(norm > max_norm, 0.0, 1.0)


def np_soften(norm, max_norm):
    return max_norm / (max_norm + norm)


def multiply(update, norm, max_norm, factor):
    """One scope: a non-finite norm makes it NaN, whatever the factor says."""
    with np.errstate(all="ignore"):
        scale = np.where(np.isfinite(norm), factor(norm, max_norm), np.nan)
        return update * scale


def by_label(
    label: Callable[[str], str],
    max_norm: Callable[..., float],
    *,
    factor=np_rescale,
    size: Callable[[Sequence[np.ndarray]], float] = vector_norm,
):
    """The leaves of one label form one scope. `max_norm(label, norm, params)`."""

    def reference(updates, params):
        names = paths_of(updates)
        leaves = jax.tree.leaves(updates)
        groups: dict[str, list] = {}
        param_groups: dict[str, list] = {}
        for name, leaf, param in zip(
            names, leaves, jax.tree.leaves(params), strict=True
        ):
            groups.setdefault(label(name), []).append(leaf)
            param_groups.setdefault(label(name), []).append(param)
        sizes = {key: size(group) for key, group in groups.items()}
        clipped = [
            multiply(
                leaf,
                sizes[label(name)],
                max_norm(label(name), sizes[label(name)], param_groups[label(name)]),
                factor,
            )
            for name, leaf in zip(names, leaves, strict=True)
        ]
        return jax.tree.unflatten(jax.tree.structure(updates), clipped)

    return reference


def every_leaf_together(path: str) -> str:
    return ""


def each_leaf(path: str) -> str:
    return path


def layer(path: str) -> str:
    return path.rpartition("/")[0]


def weights_or_rest(path: str) -> str:
    return "weights" if path.endswith("kernel") else "rest"


def constant(value: float):
    return lambda label, norm, params: value


def by_prefix(limits: Mapping[str, float], default: float):
    def max_norm(label, norm, params):
        return next((v for k, v in limits.items() if label.startswith(k)), default)

    return max_norm


def by_unit(max_norm: Callable[[np.ndarray], Any], *, axes=None, factor=np_rescale):
    """Units of a leaf by Optax's default axes: all of a vector, rows of a matrix."""

    def unit_norm(x):
        default = None if x.ndim <= 1 else 0
        axis = default if axes is None else axes
        largest = np.max(np.abs(x), initial=0.0)
        if not np.isfinite(largest) or largest == 0:
            largest = 1.0
        squares = np.abs(x / largest) ** 2
        return largest * np.sqrt(np.sum(squares, axis=axis, keepdims=True))

    def one(update, param):
        with np.errstate(all="ignore"):
            norm = unit_norm(update)
        return multiply(update, norm, max_norm(unit_norm(param)), factor)

    return lambda updates, params: jax.tree.map(one, updates, params)


def clamp(x, low: float, high: float):
    if not np.iscomplexobj(x):
        return np.clip(x, low, high)
    size = np.abs(x)
    with np.errstate(all="ignore"):
        return np.where(size > high, x / np.where(size == 0, 1, size) * high, x)


def by_element(limits: Callable[[str], tuple[float, float]]):
    def reference(updates, params):
        del params
        names = paths_of(updates)
        leaves = jax.tree.leaves(updates)
        clipped = [
            clamp(x, *limits(name)) for name, x in zip(names, leaves, strict=True)
        ]
        return jax.tree.unflatten(jax.tree.structure(updates), clipped)

    return reference


def unclipped(updates, params):
    """A history without a past allows everything; a NaN still spreads in its leaf."""
    return by_label(each_leaf, constant(np.inf))(updates, params)


def unclipped_together(updates, params):
    return by_label(every_leaf_together, constant(np.inf))(updates, params)


def params_norm_or_none(label, norm, params):
    return vector_norm(params) or np.inf


def clippy(updates, params):
    """The largest ratio of an update to its allowance as a norm of its leaf."""

    def one(u, w):
        ratios = np.abs(u) / (0.25 * np.abs(w) + 0.5)
        return multiply(u, np.max(ratios), 1.0, np_rescale)

    return jax.tree.map(one, updates, params)


def by_matrix(clipped: Callable[..., np.ndarray]):
    """A function of a matrix and its decomposition; a vector is a column."""

    def one(x):
        matrix = x if x.ndim > 1 else x.reshape(-1, 1)
        if not np.isfinite(matrix).all():
            return x * np.nan
        u, s, vh = np.linalg.svd(matrix, full_matrices=False)
        return clipped(matrix, u, s, vh).reshape(x.shape)

    return lambda updates, params: jax.tree.map(one, updates)


def adam_step(update):
    """The first step of StableAdamW, whose scope is the leaf: a NaN fills it."""
    with np.errstate(all="ignore"):
        step = -0.5 * update / (np.abs(update) + 1e-6)
    return step if np.isfinite(update).all() else np.full_like(update, np.nan)


def acclip_step(update):
    """The first step of ACClip: momentum and threshold are shares of the update."""
    with np.errstate(all="ignore"):
        momentum, threshold = 0.1 * update, 0.01 * np.abs(update)
        factor = np.minimum(threshold / (np.abs(momentum) + 1e-5), 1)
        return np.where(np.isfinite(update), momentum * factor, np.nan)


def each_by_itself(step):
    return lambda updates, params: jax.tree.map(step, updates)


# --------------------------------------------------------------------------------------
# The table of clips
# --------------------------------------------------------------------------------------


def agc_excluding_the_head(updates, params):
    rows = by_unit(lambda norm: 0.25 * np.maximum(norm, 1e-3), axes=1)
    whole = by_unit(lambda norm: 0.25 * np.maximum(norm, 1e-3))
    free = by_unit(lambda norm: np.inf, axes=1)

    def one(name, update, param):
        kind = rows if name.endswith("kernel") else whole
        return (free if name.startswith("head/") else kind)(update, param)

    names = jax.tree.unflatten(jax.tree.structure(updates), paths_of(updates))
    return jax.tree.map(one, names, updates, params)


def finite_leaves_together(updates, params):
    """AdaGC's first step: a bad leaf is NaN by itself and does not count for others."""
    leaves = jax.tree.leaves(updates)
    sizes = [vector_norm([x]) for x in leaves]
    total = np.sqrt(sum(n**2 for n in sizes if np.isfinite(n)))
    return by_label(each_leaf, lambda _, norm, params: norm * min(1, 1 / total))(
        updates, params
    )


class Row(NamedTuple):
    """How to build a clip with its thresholds times `t`, and its first step."""

    make: Callable[..., Clip]
    reference: Callable[[Tree, Tree], Tree]


def twice_the_leaf_norm(updates):
    """A norm as a user writes one: any tree of homogeneous sizes."""
    return jax.tree.map(lambda norm: 2 * norm, norms.leaf_norms(updates))


def labels_by_rank(updates):
    return jax.tree.map(lambda x: "weights" if jnp.ndim(x) > 1 else "rest", updates)


def ema_times(factor):
    """A rule made of Optax's own pieces: a multiple of the average norm."""
    return optax.chain(optax.ema(0.9), optax.scale(factor))


def ord_norm(norm, ord):
    return functools.partial(norm, ord=ord)


def mapping_max_value(path: str) -> tuple[float, float]:
    return (-0.25, 0.25) if path.startswith("dense/") else (-1.0, 1.0)


def asymmetric(path: str) -> tuple[float, float]:
    return (-0.25, 0.5)


def unlimited(path: str) -> tuple[float, float]:
    return (-np.inf, np.inf)


TABLE: dict[str, Row] = {
    "acclip": Row(lambda t=1.0: oc.acclip(), each_by_itself(acclip_step)),
    "value": Row(
        lambda t=1.0: oc.clip_by_value(0.5 * t),
        by_element(lambda _: (-0.5, 0.5)),
    ),
    "value_asymmetric": Row(
        lambda t=1.0: oc.clip_by_value((-0.25 * t, 0.5 * t)),
        by_element(asymmetric),
    ),
    "value_schedule": Row(
        lambda t=1.0: oc.clip_by_value(lambda count: 0.5 * t / (1 + count)),
        by_element(lambda _: (-0.5, 0.5)),
    ),
    "value_mapping": Row(
        lambda t=1.0: oc.clip_by_value({"dense": 0.25 * t, "**": 1.0 * t}),
        by_element(mapping_max_value),
    ),
    "global_norm": Row(
        lambda t=1.0: oc.clip_by_global_norm(1.0 * t),
        by_label(every_leaf_together, constant(1.0)),
    ),
    "global_norm_schedule": Row(
        lambda t=1.0: oc.clip_by_global_norm(lambda count: t / (1 + count)),
        by_label(every_leaf_together, constant(1.0)),
    ),
    "global_norm_array": Row(
        lambda t=1.0: oc.clip_by_global_norm(jnp.asarray(t, jnp.bfloat16)),
        by_label(every_leaf_together, constant(1.0)),
    ),
    "global_norm_ord_3": Row(
        lambda t=1.0: oc.clip_by(ord_norm(norms.global_norm, 3), 1.0 * t),
        by_label(
            every_leaf_together,
            constant(1.0),
            size=functools.partial(vector_norm, ord=3),
        ),
    ),
    "normalize": Row(
        lambda t=1.0: oc.clip_by(norms.global_norm, 1.0 * t, factor=factors.normalize),
        by_label(every_leaf_together, constant(1.0), factor=np_normalize),
    ),
    "drop": Row(
        lambda t=1.0: oc.clip_by(norms.leaf_norms, 2.0 * t, factor=factors.drop),
        by_label(each_leaf, constant(2.0), factor=np_drop),
    ),
    "soften": Row(
        lambda t=1.0: oc.clip_by(norms.global_norm, 1.0 * t, factor=factors.soften),
        by_label(every_leaf_together, constant(1.0), factor=np_soften),
    ),
    "leaf_norm": Row(
        lambda t=1.0: oc.clip_by_leaf_norm(1.0 * t),
        by_label(each_leaf, constant(1.0)),
    ),
    "leaf_norm_mapping": Row(
        lambda t=1.0: oc.clip_by_leaf_norm({"dense": 0.5 * t, "**": 2.0 * t}),
        by_label(each_leaf, by_prefix({"dense/": 0.5}, 2.0)),
    ),
    "leaf_norm_ord_inf": Row(
        lambda t=1.0: oc.clip_by(ord_norm(norms.leaf_norms, float("inf")), 0.5 * t),
        by_label(
            each_leaf, constant(0.5), size=functools.partial(vector_norm, ord=np.inf)
        ),
    ),
    "user_norm": Row(
        lambda t=1.0: oc.clip_by(twice_the_leaf_norm, 1.0 * t),
        by_label(each_leaf, constant(0.5)),
    ),
    "layer_norm": Row(
        lambda t=1.0: oc.clip_by_group_norm(1.0 * t),
        by_label(layer, constant(1.0)),
    ),
    "group_norm_mapping": Row(
        lambda t=1.0: oc.clip_by_group_norm(
            1.0 * t, {"kernel": "weights", "**": "rest"}
        ),
        by_label(weights_or_rest, constant(1.0)),
    ),
    "group_norm_callable": Row(
        lambda t=1.0: oc.clip_by_group_norm(1.0 * t, labels_by_rank),
        by_label(weights_or_rest, constant(1.0)),
    ),
    "block_rms": Row(
        lambda t=1.0: oc.clip_by_block_rms(0.5 * t),
        by_label(each_leaf, constant(0.5), size=rms),
    ),
    "unit_norm": Row(
        lambda t=1.0: oc.clip_by(norms.unit_norms, 1.0 * t),
        by_unit(lambda _: 1.0),
    ),
    "agc": Row(
        lambda t=1.0: oc.adaptive_grad_clip(0.25 * t),
        by_unit(lambda norm: 0.25 * np.maximum(norm, 1e-3)),
    ),
    "agc_excluding": Row(
        lambda t=1.0: oc.adaptive_grad_clip(
            0.25 * t, axis={"kernel": 1, "**": None}, exclude=("head",)
        ),
        agc_excluding_the_head,
    ),
    "normalize_by_update_norm": Row(
        lambda t=1.0: oc.normalize_by_update_norm(1.0 * t),
        by_label(
            every_leaf_together,
            constant(1.0),
            factor=lambda norm, max_norm: max_norm / (norm + 1e-6),
        ),
    ),
    "relative_to_params": Row(
        lambda t=1.0: oc.clip_by(
            norms.leaf_norms, thresholds.relative_to_params(0.25 * t, norms.leaf_norms)
        ),
        by_label(
            each_leaf,
            lambda _, norm, params: 0.25 * max(vector_norm(params), 1e-3),
        ),
    ),
    "relative_step": Row(
        lambda t=1.0: oc.clip_by_relative_step(0.25 * t),
        by_label(
            every_leaf_together,
            lambda _, norm, params: 0.25 * max(vector_norm(params), 1.0),
        ),
    ),
    "trust_ratio": Row(
        lambda t=1.0: oc.clip_by_trust_ratio(1.0, 1.0 * t),
        by_label(each_leaf, params_norm_or_none),
    ),
    "clippy": Row(lambda t=1.0: oc.clippy(0.25 * t, 0.5 * t), clippy),
    "singular_values": Row(
        lambda t=1.0: oc.clip_singular_values(1.0 * t),
        by_matrix(lambda x, u, s, vh: u * np.minimum(s, 1.0) @ vh),
    ),
    "spectral_norm": Row(
        lambda t=1.0: oc.clip_by_spectral_norm(1.0 * t, 1000),
        by_matrix(lambda x, u, s, vh: x * np_rescale(s[0], 1.0)),
    ),
    "bare_rule": Row(
        lambda t=1.0: oc.clip_by(norms.leaf_norms, optax.scale(0.5 * t)),
        by_label(each_leaf, lambda _, norm, params: 0.5 * norm),
    ),
    "lagged_global": Row(
        lambda t=1.0: oc.clip_by(
            norms.global_norm, thresholds.lagged(ema_times(0.5 * t))
        ),
        unclipped_together,
    ),
    "lagged_leaf": Row(
        lambda t=1.0: oc.clip_by(
            norms.leaf_norms, thresholds.lagged(ema_times(0.5 * t))
        ),
        unclipped,
    ),
    "clipped_history": Row(
        lambda t=1.0: oc.clip_by(
            norms.leaf_norms,
            thresholds.clipped_history(thresholds.lagged(ema_times(0.5 * t))),
        ),
        unclipped,
    ),
    "mean_plus_std": Row(
        lambda t=1.0: oc.clip_by(
            norms.group_norms(),
            thresholds.lagged(
                optax.chain(
                    thresholds.mean_plus_std(1.0, decay=0.9), optax.scale(0.5 * t)
                )
            ),
        ),
        by_label(layer, constant(np.inf)),
    ),
    "window_percentile": Row(
        lambda t=1.0: oc.clip_by(
            norms.leaf_norms,
            optax.chain(thresholds.window_percentile(50.0, 4), optax.scale(0.5 * t)),
        ),
        by_label(each_leaf, lambda _, norm, params: 0.5 * norm),
    ),
    "streaming_quantile": Row(
        lambda t=1.0: oc.clip_by(
            norms.global_norm, thresholds.streaming_quantile(0.5, 0.2, initial=1.0 * t)
        ),
        by_label(every_leaf_together, constant(1.0)),
    ),
    "autoclip": Row(lambda t=1.0: oc.autoclip(50.0, 4), unclipped_together),
    "zclip": Row(
        lambda t=1.0: oc.zclip(2.5, 0.97, 2, max_norm=1.0 * t),
        by_label(every_leaf_together, constant(1.0)),
    ),
    "adagc": Row(
        lambda t=1.0: oc.adagc(warmup_steps=1, max_norm=1.0 * t),
        finite_leaves_together,
    ),
    "k_sigma_clip": Row(
        lambda t=1.0: oc.k_sigma_clip(1.0, decay=0.9, warmup_steps=1),
        unclipped_together,
    ),
    "aggc": Row(lambda t=1.0: oc.aggc(1.0, 0.5), by_label(layer, constant(np.inf))),
    "stable_spam_clip": Row(
        lambda t=1.0: oc.stable_spam_clip(),
        by_label(each_leaf, constant(1.0), factor=np_normalize),
    ),
    "mapping_of_rules": Row(
        lambda t=1.0: oc.clip_by(
            norms.leaf_norms,
            {"dense": thresholds.lagged(ema_times(0.5 * t)), "**": 1.0 * t},
        ),
        by_label(each_leaf, by_prefix({"dense/": np.inf}, 1.0)),
    ),
    "spam": Row(
        lambda t=1.0: oc.spam_clip(0.25 * t, 0.9, warmup_steps=1, reset_every=3),
        by_element(unlimited),  # nothing is known of any element
    ),
    "stable_adamw": Row(
        lambda t=1.0: oc.stable_adamw(0.5 * t, weight_decay=0.0),
        each_by_itself(adam_step),
    ),
    "u_clip": Row(
        lambda t=1.0: oc.reset_momentum(
            oc.u_clip(oc.clip_by_global_norm(1.0 * t)), every=2, warmup_steps=1
        ),
        by_label(every_leaf_together, constant(1.0)),
    ),
}

clips: dict[str, Callable[..., Clip]] = {name: row.make for name, row in TABLE.items()}
references = {name: row.reference for name, row in TABLE.items()}

# Clips of single elements: their scope is the element, they carry no norm.
ELEMENTWISE = tuple(name for name in clips if name.startswith("value"))

# What keeps arrays like the params in its state, and no statistics of its own.
REMEMBERING = ("acclip", "spam", "stable_adamw", "u_clip")

# What Optax's `inject_hyperparams` can turn into state: the named clips by keyword.
named: dict[str, tuple[Callable[..., Clip], dict[str, Any]]] = {
    "clip_by_value": (oc.clip_by_value, {"limit": 0.5}),
    "clip_by_value_range": (oc.clip_by_value, {"limit": (-0.25, 0.5)}),
    "clip_by_value_mapping": (
        oc.clip_by_value,
        {"limit": {"dense": 0.25, "**": 1.0}},
    ),
    "clip": (oc.clip, {"max_delta": 0.5}),
    "clip_by_global_norm": (oc.clip_by_global_norm, {"max_norm": 1.0}),
    "clip_by_leaf_norm": (oc.clip_by_leaf_norm, {"max_norm": 1.0}),
    "clip_by_leaf_norm_mapping": (
        oc.clip_by_leaf_norm,
        {"max_norm": {"dense": 0.5, "**": 2.0}},
    ),
    "clip_by_group_norm": (oc.clip_by_group_norm, {"max_norm": 1.0}),
    "clip_by_group_norm_labels": (
        oc.clip_by_group_norm,
        {"max_norm": 1.0, "labels": {"kernel": "weights", "**": "rest"}},
    ),
    "clip_by_block_rms": (oc.clip_by_block_rms, {"threshold": 0.5}),
    "adaptive_grad_clip": (oc.adaptive_grad_clip, {"clipping": 0.25}),
    "adaptive_grad_clip_excluding": (
        oc.adaptive_grad_clip,
        {"clipping": 0.25, "exclude": ("head",)},
    ),
    "clip_by_relative_step": (oc.clip_by_relative_step, {"relative": 0.25}),
    "clip_by_trust_ratio": (oc.clip_by_trust_ratio, {"trust_coefficient": 0.25}),
    "clippy": (oc.clippy, {}),
    "clip_singular_values": (oc.clip_singular_values, {"max_value": 1.0}),
    "clip_by_spectral_norm": (oc.clip_by_spectral_norm, {"max_norm": 1.0}),
    "normalize_by_update_norm": (
        oc.normalize_by_update_norm,
        {"scale_factor": 1.0},
    ),
    "zclip": (oc.zclip, {"z_threshold": 2.5, "warmup_steps": 10, "max_norm": 1.0}),
    "adagc": (oc.adagc, {"relative": 1.05, "warmup_steps": 10, "max_norm": 1.0}),
    "k_sigma_clip": (oc.k_sigma_clip, {"num_std": 3.0, "decay": 0.9}),
    "aggc": (oc.aggc, {"high": 1.5, "low": 0.5, "decay": 0.9}),
    "stable_spam_clip": (oc.stable_spam_clip, {"mean_decay": 0.7, "max_decay": 0.9}),
    "acclip": (oc.acclip, {"b1": 0.5, "b2": 0.75, "eps": 0.5}),
    "spam_clip": (
        oc.spam_clip,
        {"threshold": 4.0, "decay": 0.5, "warmup_steps": 1, "reset_every": 3},
    ),
    "stable_adamw": (
        oc.stable_adamw,
        {"learning_rate": 0.5, "b1": 0.5, "b2": 0.75, "eps": 0.5, "weight_decay": 0.25},
    ),
}


def every_clip(exempt: Mapping[str, str] | None = None):
    """Parametrizes `name` over the table, less the named rows (name: reason)."""
    exempt = exempt or {}
    unknown = set(exempt) - set(clips)
    assert not unknown, f"exempt, but not in the table: {unknown}"
    return pytest.mark.parametrize("name", [n for n in clips if n not in exempt])


# Every compiled clip costs about half a second, so the tests share them.


def first_step(name: str, dtype: str = "float32") -> Callable[..., Any]:
    """Compiled `(updates, params, t) -> (updates, state)` from a fresh state."""
    # Always given: the cache takes an argument left to its default for another one.
    return _first_step(name, dtype)


@functools.cache
def _first_step(name: str, dtype: str) -> Callable[..., Any]:
    del dtype  # one compiled step per dtype anyway; named so that x64 can't share it

    @jax.jit
    def step(updates, params, t):
        clip = clips[name](t)
        return clip.update(updates, clip.init(params), params)

    # Always traced: an argument left to its default would be compiled a second time.
    return lambda updates, params, t=1.0: step(updates, params, t)


def three_steps() -> list[Tree]:
    return [random_tree(seed=s, scale=s + 1.0) for s in range(3)]


def run(clip: Clip, update: Callable[..., Any], steps, params) -> tuple[list, Any]:
    """The clip over several steps in a Python loop: all updates, the last state."""
    state, clipped = clip.init(params), []
    for updates in steps:
        out, state = update(updates, state, params)
        clipped.append(out)
    return clipped, state


@functools.cache
def jitted_run(name: str) -> tuple[Clip, list, Any, Tree]:
    """`run` over `three_steps`, compiled once: the clip, updates, the state, params."""
    clip, params = clips[name](), random_tree(seed=9)
    chex.clear_trace_counter()
    update = jax.jit(chex.assert_max_traces(clip.update, n=1))
    return clip, *run(clip, update, three_steps(), params), params
