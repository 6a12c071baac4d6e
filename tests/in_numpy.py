"""The first step of every clip in NumPy, float64: the references of the table."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from helpers import paths_of


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
