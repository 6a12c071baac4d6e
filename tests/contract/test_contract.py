"""What every clip owes, over all clips and dtypes."""

import functools
import itertools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import helpers
import table
from helpers import three_steps
from table import clips, every_clip, first_step, jitted_run, references

pytestmark = pytest.mark.usefixtures("strict_shapes")

# The exemptions: {clip: reason}.
ALWAYS_ACTIVE = {
    "acclip": "has no threshold to set, and keeps a momentum",
    "normalize": "sets the norm, also of a small update",
    "normalize_by_update_norm": "sets the norm, also of a small update",
    "soften": "shrinks every update a little",
    "stable_spam_clip": "sets the norm, also of a small update",
    "stable_adamw": "is a whole optimizer: its threshold is the learning rate",
}
NEVER_INFINITE = {
    "acclip": "has no threshold to set",
    "normalize": "would ask for an infinite norm",
    "normalize_by_update_norm": "would ask for an infinite norm",
    "stable_spam_clip": "has no threshold",
    "stable_adamw": "would ask for an infinite learning rate",
}
NOT_ZERO_AT_ONCE = {
    "acclip": "has no threshold to set",
    "lagged_global": "the first step has no history, so it allows everything",
    "lagged_leaf": "the first step has no history, so it allows everything",
    "clipped_history": "the first step has no history, so it allows everything",
    "mean_plus_std": "the first step has no history, so it allows everything",
    "autoclip": "the first step has no history, so it allows everything",
    "k_sigma_clip": "the first step has no history, so it allows everything",
    "aggc": "the first step has no history, so it allows everything",
    "stable_spam_clip": "has no threshold",
    "mapping_of_rules": "the first step of its rule has no history",
    "agc_excluding": "an excluded leaf is never clipped",
    "spam": "the first step has no history, so it allows everything",
}

# The exemptions by dtype: {(clip, dtype): reason}.
NO_ORDER = {
    ("value_asymmetric", "complex64"): "complex numbers have no order: see test_errors"
}
NO_INFINITY = {
    (name, "float8_e4m3fn"): "the format has no infinity" for name in clips
} | {
    (name, "complex64"): "an infinite complex number has no direction to keep"
    for name in (*table.ELEMENTWISE, "spam")
}


def in_some(names) -> set[tuple[str, str]]:
    """In float32 and in two more dtypes, in turn."""
    return {
        (name, dtype)
        for i, name in enumerate(names)
        for dtype in ("float32", *(helpers.DTYPES[(2 * i + j) % 6] for j in range(2)))
    }


# The other rows have rules, scopes and factors of their own: those see float32 norms.
ORDERS = ("global_norm_ord_3", "leaf_norm_ord_inf")
IN_ALL = {*table.KINDS, *table.ELEMENTWISE, *ORDERS}
EVERY_PAIR = in_some(clips) | set(itertools.product(IN_ALL, helpers.DTYPES))
CHOSEN = in_some(table.KINDS)


def every_clip_and_dtype(exempt: dict[Any, str]):
    """Parametrizes over all pairs less those named, by clip or by clip and dtype."""
    pairs = [x for x in sorted(EVERY_PAIR) if not exempt.keys() & {x, x[0]}]
    marked = [x if x in CHOSEN else helpers.thorough(*x) for x in pairs]
    return pytest.mark.parametrize(("name", "dtype"), marked, indirect=["dtype"])


# --------------------------------------------------------------------------------------
# Over clips and dtypes
# --------------------------------------------------------------------------------------


def step_and_reference(name, dtype, updates, params):
    clipped, _ = first_step(name, str(dtype))(updates, params)
    return clipped, references[name](helpers.truth(updates), helpers.truth(params))


@every_clip_and_dtype(exempt=NO_ORDER)
def test_keeps_structure_shapes_and_dtypes(name, dtype):
    updates, params = helpers.updates_and_params(dtype)
    clipped, _ = first_step(name, str(dtype))(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(clipped, updates)


@every_clip_and_dtype(exempt=NO_ORDER)
def test_the_first_step_is_the_formula_in_float64_rounded_once(name, dtype):
    updates, params = helpers.updates_and_params(dtype)
    clipped, expected = step_and_reference(name, dtype, updates, params)
    helpers.assert_close(clipped, expected, of=name)


@every_clip_and_dtype(exempt=NO_ORDER)
def test_a_nan_makes_its_whole_scope_nan_and_leaves_the_others(name, dtype):
    updates, params = helpers.updates_and_params(dtype)
    updates = helpers.vary(updates, "dense/kernel", np.nan)
    clipped, expected = step_and_reference(name, dtype, updates, params)
    assert np.isnan(expected["dense"]["kernel"]).any()
    helpers.assert_close(clipped, expected, of=name)


@every_clip_and_dtype(exempt=NO_ORDER | NO_INFINITY)
def test_an_infinity_makes_its_scope_nan_or_becomes_the_bound(name, dtype):
    updates, params = helpers.updates_and_params(dtype)
    updates = helpers.vary(updates, "dense/kernel", -np.inf)
    clipped, expected = step_and_reference(name, dtype, updates, params)
    finite = np.isfinite(expected["dense"]["kernel"]).all()
    assert finite == (name in table.ELEMENTWISE)
    helpers.assert_close(clipped, expected, of=name)


@every_clip_and_dtype(exempt=NO_ORDER)
def test_zeros_stay_zeros(name, dtype):
    updates, params = helpers.updates_and_params(dtype)
    zeros = jax.tree.map(jnp.zeros_like, updates)
    clipped, _ = first_step(name, str(dtype))(zeros, params)
    chex.assert_trees_all_equal(clipped, zeros)


def with_odd_values(updates):
    """A subnormal and a negative zero, which a multiplication by 1 would lose."""
    smallest = jnp.finfo(updates["dense"]["kernel"].dtype).smallest_subnormal
    updates = helpers.vary(updates, "dense/kernel", smallest)
    return helpers.vary(updates, "dense/bias", -0.0)


@every_clip_and_dtype(exempt=NO_ORDER | ALWAYS_ACTIVE)
def test_an_update_that_needs_no_clipping_comes_back_bit_for_bit(name, dtype):
    updates, params = helpers.updates_and_params(dtype)
    updates = with_odd_values(updates)
    clipped, state = first_step(name, str(dtype))(updates, params, 1024.0)
    assert helpers.bits(clipped) == helpers.bits(updates)
    factor = getattr(state, "factors", jnp.ones(()))
    np.testing.assert_array_equal(factor, jnp.ones_like(factor))


# --------------------------------------------------------------------------------------
# Thresholds at their limits
# --------------------------------------------------------------------------------------


CONSTANTS = [0.0, 1e-30, 1e30]
# Of each kind all of them; the other rows, in turn, one each.
ROWS = list(itertools.product(table.KINDS, CONSTANTS))
REST = [name for name in clips if name not in table.KINDS]
MORE = list(zip(REST, itertools.cycle(CONSTANTS), strict=False))


@functools.cache
def steps_from_constants(name):
    """The first step from each of `CONSTANTS`, compiled as one program."""
    sizes = [size for own, size in ROWS + MORE if own == name]
    _, params = helpers.updates_and_params("float32")
    shapes = jax.tree.map(jnp.shape, params)

    def step(size, params):
        filled = jax.tree.map(
            lambda shape: jnp.full(shape, size), shapes, is_leaf=helpers.is_shape
        )
        clip = clips[name](1.0)
        return clip.update(filled, clip.init(params), params)

    return jax.jit(lambda params: {size: step(size, params) for size in sizes})


@pytest.mark.parametrize(
    ("name", "size"), [*ROWS, *(helpers.thorough(*row) for row in MORE)]
)
def test_what_the_compiler_knows_beforehand_is_clipped_like_anything(name, size):
    # The gradient of an unused parameter is a constant, and is folded into the rest.
    updates, params = helpers.updates_and_params("float32")
    filled = jax.tree.map(lambda x: jnp.full_like(x, size), updates)
    chex.assert_trees_all_close(
        steps_from_constants(name)(params)[size],
        first_step(name)(filled, params),
        rtol=1e-6,
    )


@every_clip(exempt=NEVER_INFINITE)
def test_an_infinite_threshold_is_the_identity(name):
    updates, params = helpers.updates_and_params()
    updates = with_odd_values(updates)
    clipped, _ = first_step(name)(updates, params, float("inf"))
    assert helpers.bits(clipped) == helpers.bits(updates)


@every_clip(exempt=NOT_ZERO_AT_ONCE)
def test_a_zero_threshold_gives_zeros(name):
    updates, params = helpers.updates_and_params()
    clipped, _ = first_step(name)(updates, params, 0.0)
    chex.assert_trees_all_equal(clipped, jax.tree.map(jnp.zeros_like, updates))


# --------------------------------------------------------------------------------------
# JAX's transformations
# --------------------------------------------------------------------------------------


@every_clip()
def test_jit_is_eager_with_a_single_trace_and_what_it_got_donated(name):
    clip, jitted, jitted_state, params = jitted_run(name)
    eager, eager_state = helpers.run(clip, clip.update, three_steps(), params)
    helpers.assert_close(jitted, eager)
    assert helpers.types(jitted_state) == helpers.types(eager_state)
    chex.assert_trees_all_close(jitted_state, eager_state, rtol=2e-6)


def stacked(trees):
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


@every_clip()
def test_the_state_is_a_scan_carry(name):
    clip, looped, looped_state, params = jitted_run(name)

    def body(state, updates):
        updates, state = clip.update(updates, state, params)
        return state, updates

    fresh, scan = clip.init(params), functools.partial(jax.lax.scan, body)
    state, scanned = jax.jit(scan)(fresh, stacked(three_steps()))
    assert helpers.types(state) == helpers.types(fresh)
    helpers.assert_close(scanned, stacked(looped))
    chex.assert_trees_all_close(state, looped_state, rtol=2e-6)


@every_clip()
def test_the_state_keeps_its_types_under_x64(name, x64):
    clip = clips[name]()
    wide = helpers.random_tree("float64")
    mixed = wide | {"dense": helpers.random_tree("float32")["dense"]}
    fresh = jax.eval_shape(clip.init, mixed)
    _, state = jax.eval_shape(clip.update, mixed, fresh, mixed)
    assert helpers.types(state) == helpers.types(fresh)


@every_clip()
def test_vmap_over_updates_and_thresholds_is_a_loop(name):
    params, sweep = helpers.random_tree(seed=9), jnp.array([0.5, 1.0, 4.0])
    vmapped, states = jax.jit(jax.vmap(first_step(name), (0, None, 0)))(
        stacked(three_steps()), params, sweep
    )
    looped = [
        first_step(name)(updates, params, float(t))
        for updates, t in zip(three_steps(), sweep, strict=True)
    ]
    helpers.assert_close(vmapped, stacked([updates for updates, _ in looped]))
    chex.assert_trees_all_close(states, stacked([s for _, s in looped]), rtol=2e-6)


@functools.cache
def derivative(name):
    clip, params = clips[name](), helpers.random_tree(seed=9)

    def loss(updates):
        clipped, _ = clip.update(updates, clip.init(params), params)
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(clipped))

    return jax.jit(jax.grad(loss))


@every_clip()
@pytest.mark.parametrize("scale", [0.0, 1e-3, 2.0])
def test_the_derivative_is_finite(name, scale):
    gradient = derivative(name)(helpers.random_tree(seed=1, scale=scale))
    chex.assert_tree_all_finite(gradient)


@every_clip()
def test_eval_shape_agrees_with_the_run(name):
    clip, clipped, state, params = jitted_run(name)
    shapes = jax.eval_shape(lambda x: x, params)
    state_shapes = jax.eval_shape(clip.init, shapes)
    out_shapes = jax.eval_shape(clip.update, shapes, state_shapes, shapes)
    assert helpers.types(out_shapes) == helpers.types((clipped[-1], state))


@every_clip()
def test_init_accepts_shapes_in_place_of_arrays(name):
    clip, params = clips[name](), helpers.random_tree()
    shapes = jax.eval_shape(lambda x: x, params)
    chex.assert_trees_all_equal(clip.init(shapes), clip.init(params))


@every_clip()
def test_unknown_extra_arguments_are_ignored(name):
    clip = clips[name]()
    updates, params = helpers.updates_and_params()
    extra = functools.partial(clip.update, value=1.0, something_else="x")
    arguments = (updates, clip.init(params), params)
    plain = jax.make_jaxpr(clip.update)(*arguments)
    assert str(jax.make_jaxpr(extra)(*arguments)) == str(plain)
