"""Where clipping goes wrong elsewhere, and the right answer for each input."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import helpers
import in_numpy
from helpers import oc
from numeric_cases import many_leaves

pytestmark = pytest.mark.usefixtures("strict_shapes")

MEASURED_OPTAX = "0.2.8"


class Case(NamedTuple):
    """One input, the clip with its Optax twin, and the answer by NumPy."""

    updates: Any
    clip: Any
    twin: Any
    expected: Any
    params: Any = None
    rtol: float | None = None  # None: one rounding of the leaf's dtype


def normal(dtype, size, sigma) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.asarray(rng.normal(size=size) * sigma).astype(jnp.dtype(dtype))


def single(values) -> np.ndarray:
    return np.asarray(values, np.float32)


def half(values) -> np.ndarray:
    return np.asarray(values, np.float16)


def by_global_norm(updates, max_norm, **more) -> Case:
    """Expected: the global formula, from the rounded updates, in float64."""
    wide = helpers.truth(updates)
    clipped = in_numpy.by_label(
        in_numpy.every_leaf_together, in_numpy.constant(max_norm)
    )
    return Case(
        jax.tree.map(jnp.asarray, updates),
        oc.clip_by_global_norm(max_norm),
        optax.clip_by_global_norm(max_norm),
        clipped(wide, wide),
        **more,
    )


def by_block_rms(updates, threshold) -> Case:
    wide = helpers.truth(updates)
    clipped = in_numpy.by_label(
        in_numpy.each_leaf, in_numpy.constant(threshold), size=in_numpy.rms
    )
    return Case(
        updates,
        oc.clip_by_block_rms(threshold),
        optax.clip_by_block_rms(threshold),
        clipped(wide, wide),
    )


def by_agc(updates, params, clipping) -> Case:
    reference = in_numpy.by_unit(lambda norm: clipping * np.maximum(norm, 1e-3))
    return Case(
        updates,
        oc.adaptive_grad_clip(clipping),
        optax.adaptive_grad_clip(clipping),
        reference(helpers.truth(updates), helpers.truth(params)),
        params,
    )


ROWS: dict[str, Callable[[], Case]] = {
    "float32, norm 3.1e19": lambda: by_global_norm(
        {"w": normal("float32", 1000, 1e18)}, 1.0
    ),
    "float32, norm just below the largest number": lambda: by_global_norm(
        {"w": single([2e38, -1e38, 2e38])}, 1.0
    ),
    "float32, finite elements with a norm above the largest number": (
        lambda: by_global_norm({"w": single([3e38, -3e38, 3e38])}, 1.0)
    ),
    "float16, norm 309": lambda: by_global_norm(
        {"w": normal("float16", 1000, 10)}, 1.0
    ),
    "float16, 70 000 ones": lambda: by_global_norm(
        {"w": np.ones(70_000, np.float16)}, 1.0
    ),
    "float16 beside a large float32": lambda: by_global_norm(
        {"half": half([2.0]), "single": single([2e5])}, 1e5
    ),
    "float8, four times 20": lambda: by_global_norm(
        {"w": np.full(4, 20.0).astype(jnp.float8_e4m3fn)}, 1.0
    ),
    "bfloat16, sigma 1e20": lambda: by_global_norm(
        {"w": normal("bfloat16", 1000, 1e20)}, 1.0
    ),
    "float16, a million elements of 1e-4": lambda: by_global_norm(
        {"w": np.full(1_000_000, 1e-4).astype(np.float16)}, 0.05
    ),
    "bfloat16, 700 leaves": lambda: by_global_norm(
        many_leaves("bfloat16", [10] * 700), 1.0
    ),
    "bfloat16, a large leaf before 300 small ones": lambda: by_global_norm(
        many_leaves("bfloat16", [1_000_000] + [1000] * 300), 1.0
    ),
    "bfloat16, a large leaf after 300 small ones": lambda: by_global_norm(
        many_leaves("bfloat16", [1000] * 300 + [1_000_000]), 1.0
    ),
    "float32, sigma 1e-19 clipped to 1 % of the norm": lambda: by_global_norm(
        {"w": normal("float32", 1000, 1e-19)}, 3.1e-20
    ),
    "float32, one infinity": lambda: by_global_norm(
        {"w": single([1.0, np.inf]), "b": single([-2.0])}, 1.0
    ),
    "block rms, float32 1e20": lambda: by_block_rms({"w": jnp.full(4, 1e20)}, 0.5),
    "block rms, float16 300": lambda: by_block_rms(
        {"w": jnp.full(4, 300, jnp.float16)}, 0.5
    ),
    "agc, float32 1e20": lambda: by_agc(
        {"w": jnp.full((4, 2), 1e20)}, {"w": jnp.ones((4, 2))}, 0.5
    ),
    "agc, float16 300": lambda: by_agc(
        {"w": jnp.full((4, 2), 300, jnp.float16)},
        {"w": jnp.ones((4, 2), jnp.float16)},
        0.5,
    ),
    "agc, a tiny gradient of a zero parameter": lambda: by_agc(
        {"w": jnp.array([1e-8])}, {"w": jnp.array([0.0])}, 1e-7
    ),
}
LONG = ("bfloat16, 700 leaves", "bfloat16, a large leaf before 300 small ones")
every_row = pytest.mark.parametrize("row", helpers.all_but(ROWS, {*ROWS} - {*LONG}))


@every_row
def test_the_table_has_the_right_answer(row):
    case = ROWS[row]()
    clipped, _ = case.clip.update(
        case.updates, case.clip.init(case.updates), case.params
    )
    helpers.assert_close(clipped, case.expected, rtol=case.rtol)


@every_row
def test_the_table_holds_what_optax_gets_wrong(row):
    case = ROWS[row]()
    clipped, _ = case.twin.update(
        case.updates, case.twin.init(case.updates), case.params
    )
    wrong = not helpers.is_close(clipped, case.expected, rtol=4e-3)
    assert wrong or optax.__version__ != MEASURED_OPTAX


def test_the_table_in_float64(x64):
    case = by_global_norm({"w": np.array([3e200, 4e200])}, 1.0)
    ours, _ = case.clip.update(case.updates, None)
    optaxs, _ = case.twin.update(case.updates, None)
    np.testing.assert_allclose(ours["w"], [0.6, 0.8], rtol=1e-15)
    zeroed = not np.asarray(optaxs["w"]).any()
    assert zeroed or optax.__version__ != MEASURED_OPTAX


# Faults of another kind than a wrong number: `(ours is right, Optax's is wrong)`.
def through_the_clip(clip):
    """The derivative of a loss behind a clip, at a gradient of zero."""

    def loss(u):
        return jnp.sum(clip.update({"w": u}, optax.EmptyState())[0]["w"])

    return jax.grad(loss)(jnp.zeros(3))


def test_the_derivative_at_zero_is_finite_and_optaxs_is_not():
    ours = through_the_clip(oc.clip_by_global_norm(1.0))
    np.testing.assert_array_equal(ours, np.ones(3))
    optaxs = through_the_clip(optax.clip_by_global_norm(1.0))
    assert np.isnan(optaxs).all() or optax.__version__ != MEASURED_OPTAX


def test_a_negative_threshold_raises_where_optax_flips_the_sign():
    with pytest.raises(ValueError, match=r"-1"):
        oc.clip_by_global_norm(-1.0)
    twin: Any = optax.clip_by_global_norm(-1.0)
    flipped, _ = twin.update(jnp.array([3.0, 4.0]), optax.EmptyState())
    assert flipped[0] < 0 or optax.__version__ != MEASURED_OPTAX


def test_a_float32_threshold_keeps_bfloat16_updates_where_optax_fails():
    updates = {"w": jnp.array([3.0, 4.0], jnp.bfloat16)}
    max_norm = jnp.asarray(1.0, jnp.float32)
    clipped, _ = oc.clip_by_global_norm(max_norm).update(updates, None)
    assert clipped["w"].dtype == jnp.bfloat16
    helpers.assert_close(clipped, {"w": np.array([0.6, 0.8])})
    if optax.__version__ == MEASURED_OPTAX:
        with pytest.raises(TypeError):
            optax.clip_by_global_norm(max_norm).update(updates, optax.EmptyState())


def test_integer_leaves_are_untouched_where_optax_fails():
    updates = {"w": jnp.array([3.0, 4.0]), "n": jnp.array([7, -7])}
    clipped, _ = oc.clip_by_global_norm(1.0).update(updates, None)
    assert clipped["n"] is updates["n"]
    np.testing.assert_allclose(clipped["w"], [0.6, 0.8], rtol=1e-6)
    if optax.__version__ == MEASURED_OPTAX:
        with pytest.raises(TypeError):
            optax.clip_by_global_norm(1.0).update(updates, optax.EmptyState())


def test_complex_leaves_are_clipped_by_modulus_where_optax_fails():
    updates = jnp.array([3.0 + 4.0j, 0.1j])
    clipped, _ = oc.clip(1.0).update(updates, None)
    np.testing.assert_allclose(clipped, [0.6 + 0.8j, 0.1j], rtol=1e-6)
    if optax.__version__ == MEASURED_OPTAX:
        with pytest.raises(ValueError, match=r"[cC]omplex"):
            optax.clip(1.0).update(updates, optax.EmptyState())
