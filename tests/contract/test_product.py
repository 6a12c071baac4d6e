"""Every norm with every threshold and every factor: none of them knows of the others.

Not compiled, which would take half a second each: the steps run eagerly, and `scan` is
only traced.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import helpers
import in_numpy
from helpers import Tree, oc
from in_numpy import vector_norm
from optaxclip import factors, norms, thresholds
from table import ema_times

pytestmark = pytest.mark.usefixtures("strict_shapes")

# --------------------------------------------------------------------------------------
# Norms
# --------------------------------------------------------------------------------------


def doubled_sum(updates):
    """A norm as a user writes one."""
    return jax.tree.map(lambda x: 2 * jnp.sum(jnp.abs(x)), updates)


LABELS = {"kernel": "weights", "**": "rest"}

NORMS: dict[str, Callable[[Tree], Any]] = {
    "global": norms.global_norm,
    "global_1": functools.partial(norms.global_norm, ord=1),
    "global_3": functools.partial(norms.global_norm, ord=3),
    "global_inf": functools.partial(norms.global_norm, ord=jnp.inf),
    "leaf": norms.leaf_norms,
    "leaf_rms": norms.leaf_rms,
    "unit": norms.unit_norms,
    "layer": norms.group_norms(),
    "group": norms.group_norms(LABELS),
    "excluding": norms.excluding(norms.group_norms(), "dense/bias"),
    "own": doubled_sum,
}


class Scopes(NamedTuple):
    """The norms of a tree in NumPy, and for each leaf which of them is its own."""

    sizes: Callable[[list[np.ndarray]], list[float]]
    of_leaf: tuple[int, ...]


def together(ord: float) -> Scopes:
    return Scopes(lambda leaves: [vector_norm(leaves, ord)], (0, 0, 0))


def apart(size: Callable[[list[np.ndarray]], float]) -> Scopes:
    return Scopes(lambda leaves: [size([x]) for x in leaves], (0, 1, 2))


# Of the leaves dense/bias, dense/kernel and head/kernel.
SCOPES: dict[str, Scopes] = {
    "global": together(2),
    "global_1": together(1),
    "global_3": together(3),
    "global_inf": together(np.inf),
    "leaf": apart(vector_norm),
    "leaf_rms": apart(in_numpy.rms),
    "layer": Scopes(lambda x: [vector_norm(x[:2]), vector_norm(x[2:])], (0, 0, 1)),
    "group": Scopes(lambda x: [vector_norm(x[:1]), vector_norm(x[1:])], (0, 1, 1)),
    "excluding": Scopes(lambda x: [vector_norm(x[1:2]), vector_norm(x[2:])], (0, 0, 1)),
    "own": apart(lambda x: 2 * vector_norm(x, 1)),
}

# --------------------------------------------------------------------------------------
# Thresholds and factors
# --------------------------------------------------------------------------------------

# From a norm and a number near 1 that may be traced.
THRESHOLDS: dict[str, Callable[[Any, Any], Any]] = {
    "number": lambda norm, t: 0.5 * t,
    "traced": lambda norm, t: 0.5 * t,
    "schedule": lambda norm, t: lambda count: 2.0 * t / (1 + count),
    "mapping": lambda norm, t: {"dense": 0.5 * t, "**": 2.0 * t},
    "mapping_of_rules": lambda norm, t: {
        "dense": thresholds.lagged(ema_times(0.5 * t)),
        "**": optax.scale(0.5 * t),
    },
    "relative_to_params": lambda norm, t: thresholds.relative_to_params(0.25 * t, norm),
    "lagged": lambda norm, t: thresholds.lagged(ema_times(0.5 * t)),
    "clipped_history": lambda norm, t: thresholds.clipped_history(
        thresholds.lagged(ema_times(0.5 * t))
    ),
    "mean_plus_std": lambda norm, t: thresholds.mean_plus_std(0.5 * t, decay=0.9),
    "mean_plus_std_window": lambda norm, t: thresholds.mean_plus_std(0.5 * t, window=2),
    "window_percentile": lambda norm, t: thresholds.window_percentile(50.0 * t, 2),
    "streaming_quantile": lambda norm, t: thresholds.streaming_quantile(initial=t),
    "z_score": lambda norm, t: thresholds.z_score(0.5 * t, 0.5, warmup_steps=2),
    "relative_to_mean": lambda norm, t: thresholds.relative_to_mean(
        1.5 * t, 0.5, warmup_steps=1
    ),
    "within_band": lambda norm, t: thresholds.within_band(0.75 * t, 1.25, 0.5),
    "mean_over_rms": lambda norm, t: thresholds.mean_over_rms(0.5 * t, 0.75),
}

FACTORS: dict[str, tuple[Any, Callable[..., Any]]] = {
    "rescale": (factors.rescale, in_numpy.np_rescale),
    "normalize": (factors.normalize, in_numpy.np_normalize),
    "drop": (factors.drop, in_numpy.np_drop),
    "soften": (factors.soften, in_numpy.np_soften),
    "auto_s": (factors.auto_s, lambda norm, most: most / (norm + 0.01 * most)),
}

# --------------------------------------------------------------------------------------
# What goes together
# --------------------------------------------------------------------------------------

# Of a unit's norm, that of its parameters, the path and the step: for units the state
# has only one threshold per leaf, so these are written a second time.
UNIT_LIMITS: dict[str, Callable[..., Any]] = {
    "number": lambda norm, own, path, step: 0.5,
    "traced": lambda norm, own, path, step: 0.5,
    "schedule": lambda norm, own, path, step: 2.0 / (1 + step),
    "mapping": lambda norm, own, path, step: 0.5 if path.startswith("dense") else 2.0,
    "relative_to_params": lambda norm, own, path, step: 0.25 * np.maximum(own, 1e-3),
}
ACROSS_LAYERS = ("global", "global_1", "global_3", "global_inf", "group")


def error_of(norm: str, threshold: str) -> str | None:
    """What a combination that means nothing raises."""
    if norm in ACROSS_LAYERS and threshold in ("mapping", "mapping_of_rules"):
        return "Expected one threshold per norm"
    if norm == "unit" and threshold not in UNIT_LIMITS:
        return "Expected a rule without a state for a norm of units"
    return None


PAIRS = list(itertools.product(NORMS, THRESHOLDS))
RIGHT = [pair for pair in PAIRS if error_of(*pair) is None]
WRONG = [pair for pair in PAIRS if error_of(*pair) is not None]
# The factors in turn: each meets every norm, and every threshold.
IN_TURN = [
    (*pair, name) for pair, name in zip(RIGHT, itertools.cycle(FACTORS), strict=False)
]
# What differs from another norm in its order alone has no factors of its own to meet.
ORDERS = ("global_1", "global_3", "global_inf")
EVERY = [(*pair, name) for pair in RIGHT for name in FACTORS if pair[0] not in ORDERS]
EVERY += [row for row in IN_TURN if row[0] in ORDERS]

COLUMNS = ("norm", "threshold", "factor")
CHOSEN = IN_TURN[::2]  # of each norm every second threshold
MARKED = [row if row in CHOSEN else helpers.thorough(*row) for row in EVERY]
every_combination = pytest.mark.parametrize(COLUMNS, MARKED)
every_pair = pytest.mark.parametrize(COLUMNS, IN_TURN)


EACH = list(enumerate([NORMS, THRESHOLDS, FACTORS]))


@pytest.mark.parametrize(("column", "every"), EACH)
def test_what_is_not_thorough_has_each_norm_threshold_and_factor(column, every):
    assert {row[column] for row in CHOSEN} == {*every}


def made(norm: str, threshold: str, factor: str, t: Any = 1.0) -> Any:
    limit = THRESHOLDS[threshold](NORMS[norm], t)
    return oc.clip_by(NORMS[norm], limit, FACTORS[factor][0])


@functools.cache
def fresh_state(norm: str, threshold: str) -> Any:
    return made(norm, threshold, "rescale").init(PARAMS)


# Few shapes, for each has its own operations to compile.
SHAPES = {"dense": {"bias": (3,), "kernel": (3, 3)}, "head": {"kernel": (3, 3)}}


def mixed(scale: float, seed: int) -> Tree:
    """Float32 but for one leaf of low precision."""
    tree = helpers.random_tree(seed=seed, scale=scale, shapes=SHAPES)
    tree["dense"]["bias"] = tree["dense"]["bias"].astype(jnp.bfloat16)
    return tree


PARAMS = mixed(1.0, seed=9)
# A bad layer on the way, then a spike, and a layer of zeros.
STEPS = [
    mixed(1.0, seed=1),
    helpers.vary(mixed(1.0, seed=2), "dense/kernel", np.nan),
    mixed(9.0, seed=3) | {"head": {"kernel": jnp.zeros((3, 3))}},
]


@pytest.mark.parametrize(("norm", "threshold"), WRONG)
def test_what_means_nothing_raises(norm, threshold):
    with pytest.raises(ValueError, match=error_of(norm, threshold)):
        made(norm, threshold, "rescale").init(PARAMS)


# --------------------------------------------------------------------------------------
# Three steps, of which one is bad
# --------------------------------------------------------------------------------------


def stepped(combination: tuple[str, str, str], updates: Tree, state: Any) -> Any:
    def step(t: Any) -> Any:
        return made(*combination, t).update(updates, state, PARAMS)

    if "traced" not in combination:
        return step(1.0)
    return jax.jvp(step, (jnp.ones(()),), (jnp.ones(()),))[0]


def factor_in_numpy(factor: str, norm: Any, max_norm: Any) -> Any:
    """A norm of zero needs no clip, an infinite threshold is none."""
    with np.errstate(all="ignore"):
        found = FACTORS[factor][1](norm, max_norm)
        found = np.where((norm == 0) | np.isinf(max_norm), 1, found)
        return np.where(np.isfinite(norm), found, np.nan)


def by_scope(norm: str, factor: str, updates: Tree, state: Any) -> Tree:
    """The result by what the state has recorded, and what it must have recorded."""
    leaves = jax.tree.leaves(helpers.truth(updates))
    sizes, of_leaf = SCOPES[norm]
    recorded, max_norms, found = (
        np.ravel(np.asarray(x, np.float64))
        for x in (state.norms, helpers.shown(state.max_norms), state.factors)
    )
    np.testing.assert_allclose(recorded, sizes(leaves), rtol=2e-6)
    expected = factor_in_numpy(factor, recorded, max_norms)
    np.testing.assert_allclose(found, expected, rtol=2e-6)
    results = [x * expected[i] for x, i in zip(leaves, of_leaf, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(updates), results)


def unit_sizes(x: np.ndarray) -> np.ndarray:
    axis = None if x.ndim == 1 else 0
    return np.sqrt(np.sum(x**2, axis=axis, keepdims=True))


def by_unit(threshold: str, factor: str, updates: Tree, state: Any) -> Tree:
    """The result by NumPy alone; the state has the unit that was clipped hardest."""
    step = int(state.update_count) - 1
    names, leaves = helpers.paths_of(updates), jax.tree.leaves(helpers.truth(updates))
    every = []
    rows = zip(names, leaves, jax.tree.leaves(helpers.truth(PARAMS)), strict=True)
    for name, leaf, param in rows:
        size = unit_sizes(leaf)
        limit = UNIT_LIMITS[threshold](size, unit_sizes(param), name, step)
        every.append(factor_in_numpy(factor, size, np.asarray(limit)))
    np.testing.assert_allclose(state.factors, [f.min() for f in every], rtol=2e-6)
    results = [x * f for x, f in zip(leaves, every, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(updates), results)


def kept_where_bad(norms_seen: Any, new: Any, old: Any) -> bool:
    """Whether a rule's state has what it had of the scopes whose norm tells nothing."""
    bad = ~np.isfinite(norms_seen) | (np.asarray(norms_seen) == 0)
    pairs = zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
    return all(
        np.array_equal(np.asarray(a)[..., bad], np.asarray(b)[..., bad])
        for a, b in pairs
        if np.shape(a)[np.ndim(a) - bad.ndim :] == bad.shape
    )


@every_combination
def test_each_step_is_its_factor_times_the_updates(norm, threshold, factor):
    """Structure, shapes, dtypes and state types are kept; a NaN stays in its scope."""
    combination = (norm, threshold, factor)
    state = fresh = fresh_state(norm, threshold)
    for updates in STEPS:
        old = state
        clipped, state = stepped(combination, updates, state)
        assert helpers.types(clipped) == helpers.types(updates)
        assert helpers.types(state) == helpers.types(fresh)
        if norm == "unit":
            expected = by_unit(threshold, factor, updates, state)
        else:
            expected = by_scope(norm, factor, updates, state)
            assert "mapping" in threshold or kept_where_bad(
                state.norms, state.rule_state, old.rule_state
            )
        helpers.assert_close(clipped, expected)


@every_pair
def test_the_state_is_a_carry_for_a_traced_threshold(norm, threshold, factor):
    def run(state: Any, t: Any) -> Any:
        def body(state: Any, _: None) -> Any:
            clip = made(norm, threshold, factor, t)
            clipped, state = clip.update(STEPS[0], state, PARAMS)
            return state, clipped

        return jax.lax.scan(body, state, None, length=3)

    fresh = fresh_state(norm, threshold)
    state, clipped = jax.eval_shape(run, fresh, jnp.ones(()))
    assert helpers.types(state) == helpers.types(fresh)
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), clipped)
    assert helpers.types(one) == helpers.types(STEPS[0])


@every_pair
def test_zeros_stay_zeros_and_enter_no_history(norm, threshold, factor):
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    fresh = fresh_state(norm, threshold)
    clipped, state = stepped((norm, threshold, factor), zeros, fresh)
    assert helpers.bits(clipped) == helpers.bits(zeros)
    assert helpers.bits(state.rule_state) == helpers.bits(fresh.rule_state)


# Backward passes have to be compiled: in one program, and for one norm alone. That of a
# user lets a NaN through which the library's own would stop.
BACKWARD = [("own", threshold, "normalize") for threshold in THRESHOLDS]
BACKWARD += [("own", "lagged", factor) for factor in FACTORS if factor != "normalize"]


@functools.cache
def gradients_at_zero() -> dict[tuple[str, str, str], Tree]:
    def gradient(combination: tuple[str, str, str], zeros: Tree) -> Tree:
        clip = made(*combination)
        state = clip.update(STEPS[0], clip.init(PARAMS), PARAMS)[1]

        def total(updates: Tree) -> Any:
            clipped, _ = clip.update(updates, state, PARAMS)
            return sum(jnp.sum(x) for x in jax.tree.leaves(clipped))

        return jax.grad(total)(zeros)

    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    return jax.jit(lambda u: {x: gradient(x, u) for x in BACKWARD})(zeros)


@pytest.mark.parametrize(COLUMNS, BACKWARD)
def test_the_derivative_at_zero_is_finite(norm, threshold, factor):
    gradient = helpers.truth(gradients_at_zero()[norm, threshold, factor])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))
